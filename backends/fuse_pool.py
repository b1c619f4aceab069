"""Means over tokens weighted by their sizes, as mending writes them, become one kernel.

What `effopt.mend_rules.pool` emits is five nodes on a value of the size of the hidden states; on a
GPU one launch reads that once.
"""

import torch
from torch.fx import Graph, Node

from effopt.axes import same_sizes
from effopt.backends.kernels.pool_tokens import FLOOR
from effopt.kernel import kernel
from effopt.match import Call, Capture, Match, match
from effopt.program import value

aten = torch.ops.aten

_TOKENS = 1
_WIDE = Capture("wide", Call((aten.unsqueeze.default,), (Capture("size"), 2)))
_WEIGHTED = Call((aten.mul.Tensor,), (Capture("x"), _WIDE))
_SUM, _COUNT = (Call((aten.sum.dim_IntList,), (of, [_TOKENS])) for of in (_WEIGHTED, _WIDE))
_MEAN = Call((aten.div.Tensor,), (_SUM, Call((aten.clamp_min.default,), (_COUNT, FLOOR))))
"""Σ s x / max(Σ s, 1e-6) over dimension 1 of x [B, N, C], with sizes s [B, N]."""


def fuse_pool(graph: Graph) -> None:
    """Put `pool_tokens` in the place of every weighted mean whose result has the type of x.

    A mean of x in half precision is one together with the cast to it that follows.
    """
    changed = False
    for node in graph.find_nodes(op="call_function", target=aten.div.Tensor):
        found = match(_MEAN, node)
        last = None if found is None else _last(node, found)
        if found is not None and last is not None:
            _put(graph, last, found)
            changed = True
    if changed:
        graph.eliminate_dead_code()


def _last(mean: Node, found: Match) -> Node | None:
    """Return the node whose value the kernel computes; None where it computes another."""
    x, size = value(found["x"]), value(found["size"])
    if (x.ndim, size.ndim, size.dtype) != (3, 2, torch.float32) or not x.is_floating_point():
        return None
    if not same_sizes(x.shape[:2], size.shape):  # sizes that all samples share are broadcast
        return None
    if value(mean).dtype == x.dtype:
        return mean
    users = list(mean.users)
    casts = [user for user in users if user.target is aten.to.dtype and user.args[1] == x.dtype]
    return users[0] if len(casts) == len(users) == 1 else None


def _put(graph: Graph, last: Node, found: Match) -> None:
    with graph.inserting_before(last):
        made = graph.call_function(kernel("pool_tokens").op, (found["x"], found["size"]))
        made.meta = dict(last.meta)
        if value(last).ndim == 3:
            made.meta["val"] = value(last).squeeze(_TOKENS)
            flat, made = made, graph.call_function(aten.unsqueeze.default, (made, _TOKENS))
            made.meta = {**flat.meta, "val": value(last)}
    last.replace_all_uses_with(made)
