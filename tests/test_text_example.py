"""The sentence encoder: its text, its tokens, its checkpoint, and the measures of its quality."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from effopt.errors import UsageError
from examples.checkpoints import save
from examples.text import data, model, quality, tokens
from examples.text.train import Recipe, batches, corpus, embed


@pytest.fixture(scope="module")
def evaluation() -> np.ndarray:
    return embed(model.load(), data.sentences("evaluation"))


# --- text -------------------------------------------------------------------------------------


OWN = "This sentence occurs in no Python but in this library alone."


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of one module, whose docstring repeats what is evaluated on."""
    repeated = [one.lower() for one in data.sentences("evaluation")]
    text = "\n\n".join([OWN, *repeated, OWN])
    (tmp_path / "module.py").write_text(f"def function():\n    {text!r}\n", encoding="utf-8")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "broken.py").write_text("this is no Python", encoding="utf-8")
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def test_the_splits_share_no_sentence(library: Path) -> None:
    calibration, evaluation = data.sentences("calibration"), data.sentences("evaluation")
    training = [sentence for passage in data.training_passages() for sentence in passage]
    parts = [set(map(data._key, part)) for part in (calibration, evaluation, training)]
    assert [len(part) for part in parts] == [128, 512, len(training)]
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert all(8 <= len(one.split()) <= 40 for one in [*calibration, *evaluation, *training])
    assert training[-1] == OWN
    assert len(training) > 1000


def test_a_sentence_is_held_out_wherever_it_occurs() -> None:
    """Case, quotes and line breaks, in which versions of Python differ, do not matter."""
    here, there = 'The "if" statement is\nused here.', "the `if` Statement is used here"
    assert data._place(here) == data._place(there)
    assert data._place(here) != data._place("The if statement is used there.")


def test_sentences_are_cut_by_their_words() -> None:
    text = """Heading
    *******

    This first sentence has exactly eight words, see.  This one is too short.

       >>> this("is code, and has more than eight words in it") # really, it does

    The second paragraph
    is cut nowhere since e.g. this abbreviation goes on small.
    """
    assert data._split(text) == [
        "This first sentence has exactly eight words, see.",
        "The second paragraph is cut nowhere since e.g. this abbreviation goes on small.",
    ]


def test_neighbours_are_held_out_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n\n".join(f"This is sentence number {place} of the passage." for place in range(40))
    monkeypatch.setattr(data.pydoc_data.topics, "topics", {"numbers": text})
    pairs = data._held_out.__wrapped__()
    lines = data._split(text)
    assert 0 < len(pairs) < 20
    assert all(lines.index(second) == lines.index(first) + 1 for first, second in pairs)
    places = [data._place(first) for first, _ in pairs]
    assert places == sorted(places)
    assert max(places) < data._HELD_OUT


def test_too_little_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_held_out", lambda: (("a", "b"),) * 300)
    assert len(data.sentences("evaluation")) == 512
    with pytest.raises(UsageError, match="300 of 320 sentence pairs"):
        data.sentences("calibration")


# --- tokens -----------------------------------------------------------------------------------


def test_the_vocabulary_is_as_committed() -> None:
    pieces = tokens.VOCABULARY.read_text(encoding="utf-8").splitlines()
    assert len(pieces) == len(tokens.vocabulary()) == 2048
    assert tuple(pieces[:5]) == tokens.SPECIAL


@pytest.mark.parametrize(
    "sentence",
    [
        "The quick brown fox jumps over the lazy dog.",
        "object.__getattribute__(self, name) -> zyzzyva42",
        "#hash ##marks [PAD] [MASK] stay what they are",
        "",
    ],
)
def test_text_survives_its_tokens(sentence: str) -> None:
    ids = tokens.encode([sentence])["input_ids"][0]
    assert 1 not in ids
    assert tokens.decode(ids) == " ".join(tokens.words(sentence))


def test_evaluation_sentences_survive_their_tokens() -> None:
    texts = data.sentences("evaluation")
    coded = tokens.encode(texts)
    whole = coded["attention_mask"].sum(1) < tokens.LENGTH
    known = ~(coded["input_ids"] == 1).any(1)
    assert (whole & known).mean() > 0.8
    for place in np.flatnonzero(whole & known):
        text = " ".join(tokens.words(texts[place]))
        assert tokens.decode(coded["input_ids"][place]) == text


def test_a_mark_outside_ascii_is_unknown() -> None:
    assert tokens.pieces("é") == ("[UNK]",)
    assert tokens.decode(tokens.encode(["cafés open"])["input_ids"][0]) == "caf [UNK] s open"


def test_padding_is_masked_and_long_sentences_are_cut() -> None:
    coded = tokens.encode(["return it", "return " * 100])
    assert coded["input_ids"].shape == coded["attention_mask"].shape == (2, 64)
    assert {array.dtype for array in coded.values()} == {np.dtype(np.int64)}
    assert coded["attention_mask"].sum(1).tolist() == [4, 64]
    assert coded["input_ids"][:, 0].tolist() == [2, 2]
    assert coded["input_ids"][0, 3:].tolist() == [3] + [0] * 60
    assert coded["input_ids"][1, 63] == 3


def test_pieces_are_learned_by_the_most_frequent_pair() -> None:
    """By hand: o+w 7 times, lo+w 7 times, then e+r and e+w 2 times; ties by the alphabet."""
    found = tokens.learn(Counter({"low": 5, "lower": 2, "new": 2, "42": 9}), 5 + 68 + 26 + 4)
    assert found[-4:] == ["##ow", "low", "##er", "##ew"]
    assert len(set(found)) == len(found)


# --- checkpoint -------------------------------------------------------------------------------


def test_the_checkpoint_is_small_and_loads_in_float32() -> None:
    made, inputs = model.sentence_encoder()
    assert not made.training
    assert model.CHECKPOINT.stat().st_size < 3_000_000
    assert {weight.dtype for weight in made.parameters()} == {torch.float32}
    with torch.inference_mode():
        found = made(**inputs)["embedding"]
    assert found.shape == (8, 128)
    assert torch.allclose(found.norm(dim=1), torch.ones(8))


def test_a_missing_checkpoint_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "CHECKPOINT", Path("nowhere.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"python -m examples\.text\.train"):
        model.load()


def test_padding_does_not_change_an_embedding() -> None:
    made = model.load()
    coded = tokens.encode(sorted(data.sentences("calibration"), key=len)[:4])
    whole = {name: torch.from_numpy(array) for name, array in coded.items()}
    end = int(coded["attention_mask"].sum(1).max())
    assert end < 32
    with torch.inference_mode():
        long = made(**whole)["embedding"]
        short = made(**{name: tensor[:, :end] for name, tensor in whole.items()})["embedding"]
    # Sums of another length round differently: 6e-8 was measured, and numbers are below 1.
    assert torch.allclose(long, short, rtol=0, atol=1e-6)


def test_saving_rounds_to_half_precision_and_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model.load()
    save(made, tmp_path / "again.safetensors", torch.float16)
    monkeypatch.setattr(model, "CHECKPOINT", tmp_path / "again.safetensors")
    again = model.load().state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in made.state_dict().items())


# --- training ---------------------------------------------------------------------------------


def test_batches_pair_neighbours_and_pass_over_the_text() -> None:
    """With passages of one, two and three sentences; `itself` would pair the others so, too."""
    sizes = [1, 2, 3] * 100
    text = corpus([[f"sentence {place} of {size}" for place in range(size)] for size in sizes])
    stream = batches(text, Recipe(pairs=30, itself=0.0), np.random.default_rng(0))
    passage = np.repeat(np.arange(300), sizes)
    seen = []
    for _ in range(20):
        batch = next(stream)
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        first, second = batch["index"].numpy().reshape(2, 30)
        assert np.array_equal(passage[first], passage[second])
        alone = np.array(sizes)[passage[first]] == 1
        assert np.array_equal(np.abs(first - second), np.where(alone, 0, 1))
        seen.extend(first)
    assert sorted(seen) == list(range(600))


# --- quality ----------------------------------------------------------------------------------


def test_the_model_finds_neighbours_that_it_has_not_seen(evaluation: np.ndarray) -> None:
    """Among the 10 nearest of 511: chance 2.0 %, untrained 16.8 %, the checkpoint 32.8 %."""
    assert quality.retrieval(evaluation, 10) > 0.25


def test_distinct_sentences_have_distinct_embeddings(evaluation: np.ndarray) -> None:
    cosines = evaluation @ evaluation.T
    assert cosines[np.triu_indices(len(cosines), k=1)].max() < 0.9999


def test_the_reference_agrees_with_itself(evaluation: np.ndarray) -> None:
    found = quality.compare(evaluation, evaluation)
    assert list(found) == ["cos_mean", "cos_min", "top1", "top10", "rho"]
    assert found == pytest.approx(dict.fromkeys(found, 1.0), abs=1e-12)


def circle(degrees: Any) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


GOLDEN = [0, 1, 3, 6, 10, 15, 21, 28, 36, 45, 55, 66]
"""Degrees with growing gaps: the nearest other of each but the first is the one before it."""


def test_turning_and_scaling_everything_changes_cosines_only() -> None:
    angles = np.random.default_rng(0).uniform(0, 180, 12)
    found = quality.compare(circle(angles), 3 * circle(angles + 60))
    assert found == pytest.approx(
        {"cos_mean": 0.5, "cos_min": 0.5, "top1": 1, "top10": 1, "rho": 1}
    )


def test_moving_one_point_by_hand() -> None:
    """The last of 12 goes from 66 to -2 degrees.

    Its own nearest was 55 and is 0. That of 0 was 1 and still is. All others keep theirs: 11 of 12.
    Each of 12 points has 11 others, so its 10 nearest leave out the farthest. Before, that is 66
    for those at 0 to 28 and 0 for those at 36 to 66. After, it is 55 for those at 0 to 21 and for
    the moved one, and -2 for those at 28 to 55. So 28 leaves out the same point twice, and the
    other eleven share 9 of 10.
    """
    moved = circle([*GOLDEN[:-1], -2])
    found = quality.compare(circle(GOLDEN), moved)
    assert found["cos_min"] == pytest.approx(np.cos(np.radians(68)))
    assert found["cos_mean"] == pytest.approx((11 + np.cos(np.radians(68))) / 12)
    assert found["top1"] == pytest.approx(11 / 12)
    assert found["top10"] == pytest.approx((1 + 11 * 0.9) / 12)
    assert found["rho"] < 0.9


def test_ranks_share_ties_as_spearman_asks() -> None:
    assert quality._ranks(np.array([3.0, 1.0, 3.0, 2.0, 3.0])).tolist() == [3, 0, 3, 1, 3]


def test_rho_is_the_rank_correlation_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")  # comes with scikit-learn
    random = np.random.default_rng(0)
    first = random.standard_normal((20, 4))
    second = first + random.standard_normal((20, 4))
    upper = np.triu_indices(20, k=1)
    cosines = [(u @ u.T)[upper] for u in map(quality._unit, (first, second))]
    expected = stats.spearmanr(*cosines).statistic
    assert quality.compare(first, second)["rho"] == pytest.approx(expected, abs=1e-12)


def test_retrieval_by_hand() -> None:
    """Partners are (0, 2) and (1, 3); 3 is nearer to 2 than to 1, the rest find theirs."""
    points = circle([0, 40, 5, 22])
    assert quality.retrieval(points) == 0.75
    assert quality.retrieval(points, 2) == 1.0


@pytest.mark.parametrize(
    ("reference", "other", "reason"),
    [
        (np.ones((12, 2)), circle(GOLDEN), "same reference embedding"),
        (circle(GOLDEN), circle(GOLDEN)[:-1], "cannot be compared"),
        (circle(GOLDEN[:5]), circle(GOLDEN[:5]), "cannot be compared"),
        (circle(GOLDEN), circle(GOLDEN) * np.nan, "not finite"),
    ],
)
def test_what_would_mislead_is_refused(
    reference: np.ndarray, other: np.ndarray, reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        quality.compare(reference, other)
