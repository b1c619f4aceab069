"""How models and token passes are drawn; what does not go together is settled, not thrown away."""

from dataclasses import replace

from hypothesis import strategies as st

from tests.fuzz.model import MASKED
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
    Spec,
)


def _mostly(plain: tuple[str, ...], others: tuple[str, ...]) -> st.SearchStrategy[str]:
    """Draw a plain choice half of the time."""
    return st.one_of(st.sampled_from(plain), st.sampled_from(others))


def _hostile() -> st.SearchStrategy[tuple[tuple[int, str], ...]]:
    one = st.tuples(st.integers(0, 2), st.sampled_from(HOSTILE))
    return st.one_of(st.just(()), st.just(()), st.lists(one, min_size=1, max_size=2).map(tuple))


def specs() -> st.SearchStrategy[Spec]:
    """Draw a model."""
    return st.builds(
        Spec,
        seed=st.integers(0, 999),
        source=st.sampled_from(("vision", "text", "float")),
        tokens=st.integers(6, 14),
        grid=st.tuples(st.integers(2, 4), st.integers(2, 4)),
        depth=st.integers(1, 4),
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
        mlp=_mostly(("gelu",), MLPS),
        hostile=_hostile(),
        out=st.sampled_from(HEADS),
        final_norm=st.booleans(),
        free_length=st.booleans(),
    ).map(settled)


def settled(spec: Spec) -> Spec:
    """Bring together what does not go together."""
    if spec.source == "vision":
        out = spec.out == "masked_mean"
        spec = replace(
            spec,
            mask="none" if spec.mask in MASKED else spec.mask,
            out="mean" if out else spec.out,
            free_length=False,
        )
    elif spec.out == "grid_conv":
        spec = replace(spec, out="tokens")
    if spec.out == "eos" and spec.source != "text":
        spec = replace(spec, out="cls")
    if spec.mask in MASKED or spec.out in ("masked_mean", "eos"):
        spec = replace(spec, front=0, back=0)
    if spec.out in ("mean_patches", "patches") and not spec.front:
        spec = replace(spec, front=1 if spec.mask not in MASKED else 0, out="mean")
    if spec.call == "mha":
        good = ("none", "bool")
        spec = replace(
            spec,
            mask=spec.mask if spec.mask in good else "none",
            position="learned" if spec.position == "rotary" else spec.position,
        )
    if spec.call != "sdpa" and spec.mask == "causal":
        spec = replace(spec, mask="tril")
    if spec.source != "text" or spec.mask == "relative":
        spec = replace(spec, free_length=False)
    if spec.free_length:
        fixed = ("linear_tokens", "matmul_tokens", "einsum", "table", "index_tokens")
        kept = tuple(one for one in spec.hostile if one[1] not in fixed)
        spec = replace(spec, hostile=kept)
    kept = tuple(one for one in spec.hostile if one[0] < spec.depth)
    return replace(spec, hostile=kept)


def _places(depth: int) -> st.SearchStrategy[str]:
    some = st.lists(st.integers(0, depth - 1), min_size=1, max_size=3, unique=True)
    return some.map(lambda found: f"sites=[{','.join(map(str, sorted(found)))}]")


def _options(*parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(*parts).map(lambda found: ",".join(one for one in found if one))


def _maybe(text: str) -> st.SearchStrategy[str]:
    return st.sampled_from(("", "", text))


def passes(depth: int) -> st.SearchStrategy[str]:
    """Draw a token pass, now and then two."""
    r = st.one_of(st.integers(1, 4).map(str), st.sampled_from(("0.2", "0.34", "0.49")))
    ends = ("first=1", "last=-2") if depth > 1 else ("first=0",)
    where = st.one_of(st.just(""), _places(depth), st.sampled_from(ends))
    merge = _options(
        r.map(lambda n: f"r={n}"), where, _maybe("proportional=false"), _maybe("schedule=linear")
    ).map(lambda found: f"merge-tokens{{{found}}}")
    prune = _options(
        st.sampled_from(("0.3", "0.5", "0.7", "0.9")).map(lambda n: f"keep={n}"),
        st.one_of(_places(depth), st.just("")),
        _maybe("fuse=true"),
        _maybe("schedule=linear"),
    ).map(lambda found: f"prune-tokens{{{found}}}")
    both = st.tuples(merge, prune).map(",".join)
    return st.one_of(merge, merge, prune, prune, both)


def trials(count: int) -> st.SearchStrategy[tuple[Spec, tuple[str, ...]]]:
    """Draw a model and some passes for it."""
    return specs().flatmap(
        lambda spec: st.tuples(
            st.just(spec),
            st.lists(passes(spec.depth), min_size=count, max_size=count, unique=True).map(tuple),
        )
    )
