"""Fingerprint: the hash of what a program computes, its graph and its weights."""

import hashlib

import torch
from torch import Tensor

from effopt.exits import find_exits
from effopt.program import Program


def fingerprint(program: Program) -> str:
    """Return the SHA-256 of a program's graph and weights, in hex digits, without thresholds."""
    found, digest = program.get(find_exits), hashlib.sha256(program.text().encode())
    for node in program.nodes():
        if node.op == "get_attr" and (found is None or node is not found.tau):
            digest.update(str(node.target).encode())
            digest.update(_bytes(program.weight(node)))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
