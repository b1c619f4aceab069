"""Captured programs that several tests read: each is made once a session, and never changed."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from effopt.capture import capture
from effopt.pipeline import Pipeline, Step, parse_passes
from effopt.program import Program
from tests import zoo
from tests.check import NORMAL

Inputs = dict[str, Tensor]


@functools.cache
def made(name: str) -> tuple[nn.Module, Inputs]:
    """Return a zoo model and its example inputs."""
    return zoo.make(name)


@functools.cache
def captured(name: str, *dynamic: str) -> Program:
    """Return a zoo model as captured; the batch is dynamic if nothing else is said."""
    model, inputs = made(name)
    return capture(model, inputs, dynamic=dynamic or ("batch",))


@functools.cache
def normal(name: str, *dynamic: str) -> Program:
    """Return a zoo model in normal form."""
    return apply(captured(name, *dynamic), NORMAL)[0]


@functools.cache
def reduced(name: str, spec: str, *dynamic: str) -> tuple[Program, tuple[str, ...]]:
    """Return a zoo model after one lossy pass, and the notes of the pass."""
    return apply(normal(name, *dynamic), spec)


def apply(program: Program, spec: str) -> tuple[Program, tuple[str, ...]]:
    """Run a spec over a program; returns the result and the notes of the last pass."""
    after, records = Pipeline([Step(step) for step in parse_passes(spec)]).run(program)
    return after, records[-1].notes


def draw(name: str, batch: int, seed: int = 1) -> Inputs:
    """Draw inputs of a zoo model for another batch; texts and sequences have padding."""
    torch.manual_seed(seed)
    given: dict[str, Any] = made(name)[1]
    if "input_ids" in given:
        return zoo.texts(batch, 16, (16, 11, 13, 9, 16, 12, 14)[-batch:])
    inputs = {key: torch.randn(batch, *x.shape[1:]) for key, x in given.items()}
    if "padding" in given:
        ends = torch.tensor((12, 8, 10, 9, 11, 12, 7)[-batch:])
        inputs["padding"] = torch.arange(12)[None] >= ends[:, None]
    return inputs


def run(program: Program, inputs: Inputs) -> tuple[Tensor, ...]:
    """Run a program on inputs by name."""
    return program.run(program.flatten((), dict(inputs)))


def real(inputs: Inputs) -> Tensor | None:
    """Return which tokens are no padding [B, N]; None where all are."""
    if "attention_mask" in inputs:
        return inputs["attention_mask"] == 1
    return ~inputs["padding"] if "padding" in inputs else None


def without_padding(outputs: tuple[Tensor, ...], inputs: Inputs) -> tuple[Tensor, ...]:
    """Cut outputs that name every token to real tokens; at padding no value is promised."""
    seen = real(inputs)
    if seen is None:
        return outputs
    return tuple(out[seen] if out.shape[:2] == seen.shape else out for out in outputs)
