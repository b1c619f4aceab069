"""An explanation as a picture: every mark is there, and nothing overlaps."""

import itertools
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from effopt.explanation import Explanation
from tests.explained import cumulated, explained, of_net, renamed

EVIL = "</text><script>\x1b[2J"
SVG = "{http://www.w3.org/2000/svg}"


def drawn(found: Explanation) -> ET.Element:
    return ET.fromstring(found.svg())


def marks(picture: ET.Element, kind: str) -> int:
    return sum(kind in (element.get("class") or "").split() for element in picture.iter())


@pytest.mark.parametrize("name", ["vit", "bert", "net"])
def test_the_picture_marks_every_site_and_exit(name: str) -> None:
    found = of_net(cumulated) if name == "net" else explained(name)
    sites = [site.usable for axis in found.axes for site in axis.sites]
    legend = 1
    picture = drawn(found)
    assert marks(picture, "site") == sum(sites) + legend
    assert marks(picture, "refused") == len(sites) - sum(sites) + legend
    assert marks(picture, "exit") == len(found.exits) + legend
    assert marks(picture, "box") == len(found.calls) + legend


@pytest.mark.parametrize("copies", [1, 2, 3, 5])
def test_nothing_in_the_picture_overlaps(copies: int) -> None:
    """Lines of text at one height end before the next begins, by the width of a wide font."""
    found = of_net(cumulated)
    axes = tuple(replace(found.axes[0], name=f"{'tower' * 9}.{n}") for n in range(copies))
    calls = tuple(
        replace(call, queries=axis.name, place=replace(call.place, path="encoder.layer" * 20))
        for axis in axes
        for call in found.calls
    )
    picture = drawn(replace(found, axes=axes, calls=calls))
    edge = float(str(picture.get("width")))
    rows: dict[float, list[tuple[float, float]]] = {}
    for text in picture.iter(f"{SVG}text"):
        wide = len(text.text or "") * (10.0 if text.get("class") == "lane" else 6.9)
        x = float(str(text.get("x")))
        left = x - {"end": wide, "middle": wide / 2}.get(str(text.get("text-anchor")), 0.0)
        rows.setdefault(float(str(text.get("y"))), []).append((left, left + wide))
    for spans in rows.values():
        ordered = sorted(spans)
        assert all(a[1] <= b[0] + 1 for a, b in itertools.pairwise(ordered))
        assert ordered[-1][1] <= edge


def test_names_from_the_model_cannot_leave_the_picture() -> None:
    picture = drawn(renamed(of_net(), EVIL))
    assert not list(picture.iter("script"))
    assert "\\x1b" in ET.tostring(picture, "unicode")
