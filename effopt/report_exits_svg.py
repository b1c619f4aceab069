"""Pictures of exits: where rows leave, and the loss at each setting of the thresholds."""

from collections.abc import Sequence
from itertools import pairwise

from effopt.markup import Markup, tag
from effopt.plain import figure, shorten
from effopt.promise import Promise
from effopt.report_exits import ExitReport, ExitRow, per_cent, share_text
from effopt.report_svg import BAR, LABEL, PLOT, ROW, TALL, WIDTH, bar, picture, text

_LEFT = 70.0
_RIGHT = 24.0
_TOP = 14.0
_ABOVE = 3.0
"""How many times epsilon the picture of losses reaches, where lines go that far."""
_BEHIND = 1.25
"""How many times the setting that was taken the picture reaches."""
_LEAST = 8
"""How many settings it shows, if there are as many."""
_TICKS = 6

Place = tuple[float, float]


def leaves_picture(found: ExitReport) -> Markup:
    """Draw the share of rows that leave at each exit and at the end, on a scale from zero."""
    most = max(row.leaves for row in found.rows) or 1.0
    bars = [_leaves(row, n + 1, PLOT / most, ROW * n) for n, row in enumerate(found.rows)]
    return picture("share of rows that leave at each exit", ROW * len(found.rows), *bars)


def _leaves(row: ExitRow, number: int, scale: float, top: float) -> Markup:
    width, middle = row.leaves * scale, top + BAR / 2
    name = "end" if row.threshold is None else f"exit {number}, block {row.name}"
    return tag(
        "g",
        tag("title", f"{name} {row.path}: {share_text(row.leaves)} of rows"),
        text(LABEL - 12, middle + 4.5, shorten(name, 24), "name", "end"),
        bar(LABEL, top, width, "bar base" if row.threshold is None else "bar"),
        text(LABEL + max(width, 1.0) + 10, middle + 4.5, share_text(row.leaves), "value"),
    )


def loss_picture(found: Promise) -> Markup:
    """Draw the mean loss and its upper bound at each setting, up to where they are too large.

    A dashed line is at epsilon, a dot at the setting that was taken.
    """
    top = min(1.0, max(_ABOVE * found.epsilon, 1.5 * found.bounds[found.index]))
    last = _last(found, top)
    step, unit = (WIDTH - _LEFT - _RIGHT) / last, TALL / top

    def spot(setting: float, loss: float) -> Place:
        return _LEFT + setting * step, _TOP + TALL - loss * unit

    x, y = spot(found.index, found.risk)
    limit = spot(0, found.epsilon)[1]
    return picture(
        "loss at each setting of the thresholds",
        _TOP + TALL + 44,
        *(_level(loss, spot(0, loss)[1]) for loss in (0.0, found.epsilon, top)),
        tag("line", x1=_LEFT, x2=WIDTH, y1=limit, y2=limit, class_="limit"),
        *(_tick(found, place, spot(place, 0)) for place in _ticks(last)),
        text((_LEFT + WIDTH) / 2, _TOP + TALL + 40, _axis(found), "tick", "middle"),
        _curve([spot(*place) for place in _until(found.bounds, last, top)], "curve base"),
        _curve([spot(*place) for place in _until(found.risks, last, top)], "curve"),
        tag("line", x1=x, x2=x, y1=_TOP + TALL, y2=y, class_="whisker"),
        tag(
            "circle",
            tag("title", f"taken: {_setting(found, found.index)}, {per_cent(found.risk)}"),
            cx=x,
            cy=y,
            r=5,
            class_="dot",
        ),
    )


def _last(found: Promise, top: float) -> int:
    """Return the last setting to draw: where the mean loss leaves the picture, or further."""
    out = next((n for n, risk in enumerate(found.risks) if risk > top), len(found.risks))
    wanted = max(out, int(_BEHIND * found.index), _LEAST)
    return max(1, min(wanted, len(found.risks) - 1))


def _until(values: Sequence[float], last: int, top: float) -> list[Place]:
    """Return the places of a line up to where it first crosses the top."""
    found = list(enumerate(values[: last + 1]))
    for (one, low), (other, high) in pairwise(found):
        if high > top:
            part = (top - low) / (high - low) if low < top else 0.0
            return [*found[:other], (one + part, top)]
    return [*found]


def _curve(places: Sequence[Place], kind: str) -> Markup:
    return tag("path", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places), class_=kind)


def _level(loss: float, y: float) -> Markup:
    words = text(_LEFT - 8, y + 4, per_cent(loss), "tick", "end")
    return tag("g", tag("line", x1=_LEFT, x2=WIDTH, y1=y, y2=y, class_="grid"), words)


def _ticks(last: int) -> list[int]:
    """Return settings to name, in even steps."""
    step = max(1, -(-last // _TICKS))
    return list(range(0, last + 1, step))


def _tick(found: Promise, place: int, foot: Place) -> Markup:
    x, y = foot
    return text(x, y + 20, _setting(found, place), "tick", "middle" if place else "start")


def _is_shared(found: Promise) -> bool:
    """Tell whether one threshold is that of all exits, at every setting."""
    return all(len(set(row)) == 1 for row in found.grid)


def _setting(found: Promise, place: int) -> str:
    """Write a setting: its threshold where exits share it, else its number."""
    if not place:
        return "never"
    return figure(found.grid[place][0]) if _is_shared(found) else str(place)


def _axis(found: Promise) -> str:
    what = "threshold of all exits" if _is_shared(found) else "setting"
    return f"{what}: further right, more rows leave"
