"""How models and token passes are drawn; what does not go together is settled, not thrown away."""

from hypothesis import strategies as st

from tests.fuzz.settle import settled
from tests.fuzz.spec import (
    CALLS,
    HEADS,
    HOSTILE,
    MASKS,
    MLPS,
    NORMS,
    ORDERS,
    POSITIONS,
    QKV,
    STAGES,
    TOWERS,
    WINDOWS,
    ZEROS,
    Spec,
)


def _mostly(plain: tuple[str, ...], others: tuple[str, ...]) -> st.SearchStrategy[str]:
    """Draw a plain choice half of the time."""
    return st.one_of(st.sampled_from(plain), st.sampled_from(others))


def _seldom(plain: str, others: tuple[str, ...]) -> st.SearchStrategy[str]:
    """Draw something else than the plain choice one time in four."""
    just = st.just(plain)
    return st.one_of(just, just, just, st.sampled_from(others))


def _hostile() -> st.SearchStrategy[tuple[tuple[int, str], ...]]:
    one = st.tuples(st.integers(0, 2), st.sampled_from(HOSTILE))
    none: st.SearchStrategy[tuple[tuple[int, str], ...]] = st.just(())
    return st.one_of(none, none, st.lists(one, min_size=1, max_size=2).map(tuple))


def specs() -> st.SearchStrategy[Spec]:
    """Draw a model."""
    return st.builds(
        Spec,
        seed=st.integers(0, 999),
        source=st.sampled_from(("vision", "text", "float")),
        tokens=st.integers(6, 14),
        grid=st.tuples(st.integers(2, 4), st.integers(2, 4)),
        depth=st.sampled_from((1, 2, 2, 3, 3, 4)),
        heads=st.sampled_from((1, 2, 2, 3)),
        head=st.sampled_from((4, 4, 6, 8)),
        front=st.sampled_from((0, 0, 1, 1, 2, 3)),
        back=st.sampled_from((0, 0, 0, 1, 2)),
        front_by=st.sampled_from(("expand", "repeat")),
        position=st.sampled_from(POSITIONS),
        types=st.booleans(),
        norm=_mostly(("layer",), NORMS),
        order=_mostly(("pre", "post"), ORDERS),
        gain=st.booleans(),
        call=_mostly(("sdpa",), CALLS),
        qkv=st.sampled_from(QKV),
        mask=_mostly(("none",), MASKS),
        zero=_seldom("none", ZEROS),
        mlp=_mostly(("gelu",), MLPS),
        window=_seldom("none", WINDOWS),
        stage=_seldom("none", STAGES),
        tower=_seldom("none", TOWERS),
        axis=st.sampled_from((-1, -1, 0, 1)),
        hostile=_hostile(),
        out=st.sampled_from(HEADS),
        tokens_first=st.sampled_from((False, False, False, True)),
        final_norm=st.booleans(),
        free_length=st.booleans(),
    ).map(settled)


def _places(depth: int) -> st.SearchStrategy[str]:
    some = st.lists(st.integers(0, depth - 1), min_size=1, max_size=3, unique=True)
    return some.map(lambda found: f"sites=[{','.join(map(str, sorted(found)))}]")


def _options(*parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(*parts).map(lambda found: ",".join(one for one in found if one))


def _maybe(text: str) -> st.SearchStrategy[str]:
    return st.sampled_from(("", "", text))


def passes(spec: Spec) -> st.SearchStrategy[str]:
    """Draw a token pass, now and then two."""
    depth = spec.depth
    counts, shares = st.integers(1, 4).map(str), st.sampled_from(("0.2", "0.34", "0.49"))
    # A share of a free number of tokens is refused: then it is seldom asked for.
    r = st.one_of(counts, counts, counts, shares) if spec.free_length else counts | shares
    ends = ("first=1", "last=-2") if depth > 1 else ("first=0",)
    where = st.one_of(st.just(""), _places(depth), st.sampled_from(ends))
    merge = _options(
        r.map(lambda n: f"r={n}"), where, _maybe("proportional=false"), _maybe("schedule=linear")
    ).map(lambda found: f"merge-tokens{{{found}}}")
    prune = _options(
        st.sampled_from(("0.3", "0.5", "0.7", "0.9")).map(lambda n: f"keep={n}"),
        st.one_of(_places(depth), _places(depth), st.just("")),
        _maybe("fuse=true"),
        _maybe("schedule=linear"),
    ).map(lambda found: f"prune-tokens{{{found}}}")
    both = st.tuples(merge, prune).map(",".join)
    if spec.free_length:
        return st.one_of(*[merge] * 8, prune)
    return st.one_of(*[merge] * 5, *[prune] * 5, both)


def trials(count: int) -> st.SearchStrategy[tuple[Spec, tuple[str, ...]]]:
    """Draw a model and some passes for it."""
    return specs().flatmap(
        lambda spec: st.tuples(
            st.just(spec),
            st.lists(passes(spec), min_size=count, max_size=count, unique=True).map(tuple),
        )
    )
