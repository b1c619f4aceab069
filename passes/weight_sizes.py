"""How many bytes the weights of a program take, by what reads them."""

from math import prod

import torch
from torch.fx import Node

from effopt.kernel import kernel
from effopt.passes.quantizable import LINEAR
from effopt.passes.quantized_tables import EMBEDDING
from effopt.program import Program, is_tensor, shape, value

KINDS = ("embeddings", "linear", "other")
"""What reads a weight; of several readers the first here counts."""


def weight_sizes(program: Program) -> dict[str, int]:
    """Return the bytes of the weights that embeddings, linear layers and others read.

    Each weight counts once, for the first of these; codes of 4 bits count as half a byte, as files
    hold them.
    """
    kinds: dict[object, str] = {
        EMBEDDING: "embeddings",
        LINEAR: "linear",
        kernel("quantized_linear").op: "linear",
    }
    found: dict[str, tuple[str, int]] = {}
    for node in program.nodes():
        if node.op == "get_attr" and node.users and is_tensor(node):
            readers = [kinds.get(user.target, KINDS[-1]) for user in _readers(node)]
            kind = min(readers, key=KINDS.index)
            size = prod(map(int, shape(node))) * value(node).element_size()
            halved = any(_codes_of_four(user, node) for user in node.users)
            known = found.get(str(node.target), (kind, 0))[0]
            first = min(kind, known, key=KINDS.index)
            found[str(node.target)] = first, size // 2 if halved else size
    sizes = dict.fromkeys(KINDS, 0)
    for kind, size in found.values():
        sizes[kind] += size
    return sizes


def _readers(node: Node) -> list[Node]:
    """Return what reads a weight, behind a change of its type."""
    casts = [user for user in node.users if user.target is torch.ops.aten.to.dtype]
    return [user for held in (node, *casts) for user in held.users if user not in casts]


def _codes_of_four(user: Node, node: Node) -> bool:
    operator = kernel("quantized_linear").op
    return user.target is operator and bool(user.args[1] is node and user.args[5] == 4)
