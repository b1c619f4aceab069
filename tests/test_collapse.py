"""Rows that say the same are told once: ranges, stars and braces in place of names."""

import pytest

from effopt.collapse import alike, bare, braced, ranges, starred


@pytest.mark.parametrize(
    ("numbers", "words"),
    [([], ""), ([3], "3"), ([0, 1, 2, 3], "0-3"), ([0, 2, 4, 5, 9], "0, 2, 4-5, 9")],
)
def test_ranges(numbers: list[int], words: str) -> None:
    assert ranges(numbers) == words


def test_paths_that_differ_in_numbers_are_one() -> None:
    assert starred(["vit.layers.0.attn", "vit.layers.1.attn"]) == "vit.layers.*.attn"
    assert starred(["layers.0.blocks.1", "layers.1.blocks.1"]) == "layers.*.blocks.1"
    assert starred(["a.0", "a"]) == "a.0"
    assert bare("layers.10.fc2.0") == "layers.*.fc2.*"


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["a.q", "a.k"], "a.{q, k}"),
        (["a.q.dense", "a.k.dense"], "a.{q, k}.dense"),
        (["a.proj", "a.proj"], "a.proj"),
        (["proj", "attn.qkv"], "{proj, attn.qkv}"),
        (["a", "a.b"], "a.{, b}"),
        (["head"], "head"),
    ],
)
def test_paths_in_braces(paths: list[str], words: str) -> None:
    assert braced(paths) == words


def test_rows_of_one_key_are_gathered_in_order() -> None:
    assert alike([3, 1, 5, 2], lambda n: n % 2) == [(1, [3, 1, 5]), (0, [2])]
