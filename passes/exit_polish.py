"""Polish: a ridge head that learns to give the whole model's probabilities, not its logits.

Distillation by Adam (Kingma and Ba, arXiv 1412.6980) on KL(softmax(end) || softmax(head)). Where
what is wanted is sure of one class, as a label is, that is the cross-entropy.
"""

import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear

from effopt.passes.exit_heads import Head, by_class, deviation_of

_RATE = 1e-3
"""Adam's step, in units of features of deviation 1."""

SURE = 1e4
"""A logit above the others by so much has all of the probability: exp(-1e4) is 0."""


def polish(
    head: Head,
    rows: tuple[Tensor, Tensor],
    held: tuple[Tensor, Tensor],
    classes: int,
    steps: int,
) -> Head:
    """Train a head on rows of features [n, F] and wanted [n, C]; keep it if it is better.

    Better on the rows `held`, by what was descended: agreement there would be noise, of a few
    hundred rows. All rows are one batch, so nothing is drawn. `classes` as of `fitness`.
    """
    features, wanted = (x.double() for x in rows)
    mean = features.mean(0)
    scale = deviation_of(mean, features.std(0, correction=0))
    table = (features - mean) / scale
    weight = (head.weight * scale.nan_to_num(posinf=0.0)).requires_grad_()
    bias = (head.bias + head.weight @ mean).requires_grad_()
    adam = torch.optim.Adam([weight, bias], lr=_RATE)
    with torch.enable_grad():
        for _ in range(steps):
            adam.zero_grad()
            _divergence(linear(table, weight, bias), wanted, classes).backward()  # type: ignore[no-untyped-call]
            adam.step()
    folded = weight.detach() / scale
    trained = Head(folded, bias.detach() - folded @ mean, head.lam)

    def wrong(one: Head) -> float:
        return float(_divergence(one(held[0]), held[1].double(), classes))

    return min(head, trained, key=wrong)


def _divergence(given: Tensor, wanted: Tensor, classes: int) -> Tensor:
    """Return KL(softmax(wanted) || softmax(given)), summed over what a row [C] has of classes."""
    p, q = (by_class(logits, classes).log_softmax(-1) for logits in (wanted, given))
    return kl_div(q, p, log_target=True, reduction="sum") / len(given)
