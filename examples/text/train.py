"""Train the sentence encoder on one CPU thread: `python -m examples.text.train`.

A sentence must find its neighbour in the text among the others of the batch, by InfoNCE (van den
Oord et al., 2018, arXiv 1807.03748), and, in the same pass, the words hidden from it (Devlin et
al., 2018, arXiv 1810.04805). The head for the latter shares the word embeddings and is not saved.
"""

import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from examples.checkpoints import save, training_parser
from examples.text.data import Passage, Split, encode, sentences, training_passages
from examples.text.model import CHECKPOINT, SentenceEncoder
from examples.text.quality import retrieval
from examples.text.tokens import MASK, SPECIAL, VOCABULARY, learn, vocabulary, words

Ints = NDArray[np.int64]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a training run.

    Attributes:
        steps: optimiser steps.
        pairs: pairs of sentences per step.
        rate: peak learning rate of AdamW.
        weight_decay: decoupled weight decay of the matrices.
        warmup: fraction of the steps in which the learning rate rises; it then falls as a cosine.
        temperature: divisor of the cosines in the contrastive loss.
        hidden: share of the tokens that are hidden.
        word_weight: weight of the loss over hidden words.
        itself: share of the pairs that are one sentence with different words hidden.
        ema: decay per step of the averaged weights, which are the ones saved.
        reports: progress lines in a run.
    """

    steps: int = 700
    pairs: int = 48
    rate: float = 2e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    temperature: float = 0.06
    hidden: float = 0.2
    word_weight: float = 0.5
    itself: float = 0.25
    ema: float = 0.99
    reports: int = 20

    def rate_factor(self, step: int) -> float:
        """Fraction of the peak learning rate to use at a step."""
        done = step / self.steps
        rise = min(1.0, (done + 1 / self.steps) / self.warmup)
        return rise * (0.5 + 0.5 * math.cos(math.pi * done))


@dataclass(frozen=True)
class Corpus:
    """Encoded sentences, int64 [n, 64] each, and where each sentence's neighbours are.

    `before` and `after` are int64 [n]; a sentence without such a neighbour names itself.
    """

    ids: Ints
    mask: Ints
    before: Ints
    after: Ints


def corpus(passages: Sequence[Passage]) -> Corpus:
    """Encode passages, one after the other."""
    coded = encode([sentence for passage in passages for sentence in passage])
    place = np.arange(len(coded["input_ids"]))
    ends = np.cumsum([len(passage) for passage in passages])
    starts = np.concatenate(([0], ends[:-1]))
    before, after = place - 1, place + 1
    before[starts], after[ends - 1] = starts, ends - 1
    return Corpus(coded["input_ids"], coded["attention_mask"], before, after)


def batches(text: Corpus, recipe: Recipe, random: np.random.Generator) -> Iterator[Batch]:
    """Yield pairs of neighbours for ever, like lengths together, each at most once an epoch.

    A batch holds `input_ids` and `attention_mask`, int64 [2 * pairs, T], the first sentences before
    the second ones, and `index`, int64 [2 * pairs], which sentences they are.
    """
    count, lengths = len(text.ids), text.mask.sum(1)
    place = np.arange(count)
    while True:
        order = random.permutation(count)
        step = np.where(random.random(count) < 0.5, text.before, text.after)
        other = text.before + text.after - place  # at an end, the only neighbour
        partner = np.where(step == place, other, step)
        partner = np.where(random.random(count) < recipe.itself, place, partner)
        for chunk in np.array_split(order, max(1, count // (16 * recipe.pairs))):
            chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
            whole = chunk[: len(chunk) // recipe.pairs * recipe.pairs].reshape(-1, recipe.pairs)
            for first in random.permutation(whole):
                index = np.concatenate((first, partner[first]))
                end = lengths[index].max()
                yield {
                    "input_ids": torch.from_numpy(text.ids[index, :end]),
                    "attention_mask": torch.from_numpy(text.mask[index, :end]),
                    "index": torch.from_numpy(index),
                }


class Learner(nn.Module):
    """The model together with the word head that only training needs."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.model = SentenceEncoder()
        width = self.model.bert.config.hidden_size
        self.word_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.word_bias = nn.Parameter(torch.zeros(len(vocabulary())))
        self.recipe = recipe

    def forward(self, batch: Batch) -> Tensor:
        """Loss, a float scalar, on a batch."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        hidden = (torch.rand(ids.shape) < self.recipe.hidden) & (ids >= len(SPECIAL))
        # As in BERT, some hidden words show another word or themselves.
        shown = torch.rand(ids.shape)
        seen = torch.where(hidden & (shown < 0.8), vocabulary()[MASK], ids)
        other = torch.randint(len(SPECIAL), len(vocabulary()), ids.shape)
        seen = torch.where(hidden & (shown > 0.9), other, seen)
        states = self.model.hidden(seen, mask)
        words = self.model.bert.embeddings.word_embeddings.weight
        logits = self.word_head(states[hidden]) @ words.T + self.word_bias
        word_loss = F.cross_entropy(logits, ids[hidden])
        first, second = self.model.pool(states, mask).chunk(2)
        contrast = _contrast(first, second, batch["index"], self.recipe.temperature)
        return contrast + self.recipe.word_weight * word_loss


def _contrast(first: Tensor, second: Tensor, index: Tensor, temperature: float) -> Tensor:
    """InfoNCE in both directions; a sentence that occurs twice is not its own negative."""
    count = len(first)
    ours, theirs = index.chunk(2)
    same = (ours[:, None] == theirs) | (theirs[:, None] == theirs) | (ours[:, None] == ours)
    same = same & ~torch.eye(count, dtype=torch.bool)
    logits = (first @ second.T / temperature).masked_fill(same, -math.inf)
    target = torch.arange(count)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.inference_mode()
def embed(model: nn.Module, texts: Sequence[str], batch: int = 64) -> NDArray[np.float32]:
    """Embed sentences, float32 [n, 128], in batches."""
    parts = []
    for start in range(0, len(texts), batch):
        inputs = {k: torch.from_numpy(v) for k, v in encode(texts[start : start + batch]).items()}
        parts.append(model(**inputs)["embedding"].numpy())
    return np.concatenate(parts)


def score(model: nn.Module, split: Split) -> float:
    """Share of a split's sentences whose nearest other one is the neighbour in the text."""
    return retrieval(embed(model, sentences(split)))


def _optimiser(learner: Learner, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [p for p in learner.parameters() if p.ndim == 2]
    vectors = [p for p in learner.parameters() if p.ndim != 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98))


def train(recipe: Recipe, seed: int) -> SentenceEncoder:
    """Train from scratch, reporting on standard error; the result depends on the arguments alone.

    Returns:
        The model, in evaluation mode, with the averaged weights.
    """
    torch.manual_seed(seed)
    learner, average = Learner(recipe), SentenceEncoder()
    average.load_state_dict(learner.model.state_dict())
    optimiser = _optimiser(learner, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, recipe.rate_factor)
    stream = batches(corpus(training_passages()), recipe, np.random.default_rng(seed))
    started, recent, period = time.monotonic(), 0.0, max(1, recipe.steps // recipe.reports)
    for step in range(1, recipe.steps + 1):
        loss = learner(next(stream))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        _follow(average, learner.model, min(recipe.ema, step / (step + 10)))
        recent += loss.item() / period
        if step % period == 0:
            line = f"step {step}/{recipe.steps}  loss {recent:.3f}"
            line += f"  neighbour {score(average, 'calibration'):.1%}"
            print(f"{line}  {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            recent = 0.0
    return average.eval()


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the exponential moving average of a model's weights by one step."""
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight, 1 - decay)


def learn_vocabulary(size: int) -> None:
    """Write the vocabulary of the training text."""
    text = (sentence for passage in training_passages() for sentence in passage)
    found = learn(Counter(word for sentence in text for word in words(sentence)), size)
    VOCABULARY.write_text("".join(f"{piece}\n" for piece in found), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save the checkpoint and print the retrieval figure of the evaluation sentences."""
    parser = training_parser(
        "Train the sentence encoder on one CPU thread and save its weights.",
        CHECKPOINT,
        Recipe.steps,
    )
    parser.add_argument("--pieces", type=int, help="learn the vocabulary anew, of this size, first")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.pieces is not None:
        learn_vocabulary(options.pieces)
    model = train(Recipe(steps=options.steps), options.seed)
    save(model, options.output, torch.float16)
    found = score(model, "evaluation")
    print(f"{found:.1%} of 512 sentences find their neighbour; weights in {options.output}")


if __name__ == "__main__":
    main()
