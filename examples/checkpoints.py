"""Checkpoints of the small trained models: reading, writing, and the words of their scripts."""

import argparse
import os
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def load(model: Model, path: Path, script: str) -> Model:
    """Fill a model from a safetensors file, in the model's own types, ready for evaluation.

    Raises FileNotFoundError, which names the training `script`, where there is no file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: make it with `python -m {script}`")
    model.load_state_dict(load_file(path))
    return model.eval()


def save(model: nn.Module, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a model's weights as safetensors of a type, replacing the file in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: held.to(dtype) for name, held in model.state_dict().items()}, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def training_parser(about: str, output: Path, steps: int) -> argparse.ArgumentParser:
    """Return the parser of a training script: --output, --steps and --seed."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=output, help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of all randomness in training")
    return parser
