"""Spec strings: what parses, what is told to a user who wrote something else, and round trips."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effopt.errors import UsageError
from effopt.passes import TABLE
from effopt.passes.schemes import SCHEMES
from effopt.pipeline import Pass, parse_passes, pass_class, spec_of
from effopt.spec import Item, parse

TYPES = "see `effopt passes` for the options of"
UNREAD: dict[str, tuple[str, str]] = {
    "merge-tokens": (
        "merge-tokens needs the option 'r'",
        "write merge-tokens{r=...}",
    ),
    "merge-token{r=1}": ("unknown pass 'merge-token'", "did you mean 'merge-tokens'?"),
    "merge-tokens{r=1,frist=1}": (
        "unknown option of merge-tokens 'frist'",
        "did you mean 'first'?",
    ),
    "merge-tokens{r=1,q=1}": (
        "unknown option of merge-tokens 'q'",
        "known: axis, first, inflect, last, proportional, r, schedule, sites",
    ),
    "merge-tokens{r=fast}": (
        "option 'r' of merge-tokens is 'fast', not of type int or float or tuple[int | float, ...]",
        f"{TYPES} merge-tokens",
    ),
    "merge-tokens{r=[a,b]}": (
        "option 'r' of merge-tokens is '[a,b]', not of type int or float or "
        "tuple[int | float, ...]",
        f"{TYPES} merge-tokens",
    ),
    "merge-tokens{r=[true,false]}": (
        "option 'r' of merge-tokens is '[true,false]', not of type int or float or "
        "tuple[int | float, ...]",
        f"{TYPES} merge-tokens",
    ),
    "merge-tokens{r=1,sites=2}": (
        "option 'sites' of merge-tokens is '2', not of type tuple[int | float, ...]",
        f"{TYPES} merge-tokens",
    ),
    "merge-tokens{r=1,sites=[true]}": (
        "option 'sites' of merge-tokens is '[true]', not of type tuple[int | float, ...]",
        f"{TYPES} merge-tokens",
    ),
    "prune-tokens{keep=true}": (
        "option 'keep' of prune-tokens is 'true', not of type float or tuple[float, ...]",
        f"{TYPES} prune-tokens",
    ),
    "prune-tokens{keep=[a]}": (
        "option 'keep' of prune-tokens is '[a]', not of type float or tuple[float, ...]",
        f"{TYPES} prune-tokens",
    ),
    "prune-tokens{keep=0.5,schedule=cosine}": (
        "unknown schedule 'cosine'",
        "known: constant, linear",
    ),
    "merge-tokens{r=nan}": (
        "spec 'merge-tokens{r=nan}': nan is no finite number at character 18",
        "write name{key=value,...},name,... as in merge-tokens{r=8,first=2}",
    ),
    "merge-tokens{r=1.0}": (
        "r of merge-tokens is 1.0",
        "give a whole number from 0 on, or a share below 1 such as 0.3",
    ),
}


@pytest.mark.parametrize("spec", UNREAD)
def test_a_spec_that_cannot_be_read(spec: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_passes(spec)
    assert (caught.value.reason, caught.value.remedy) == UNREAD[spec]


def test_items_with_every_kind_of_value() -> None:
    text = "a{i=1,f=0.5,n=-2,t=true,w=word,l=[1,0.5,x],e=[]},b-c,d{}"
    values = {"i": 1, "f": 0.5, "n": -2, "t": True, "w": "word", "l": (1, 0.5, "x"), "e": ()}
    assert parse(text) == [Item("a", values), Item("b-c", {}), Item("d", {})]


def test_spaces_do_not_matter() -> None:
    assert parse(" merge-tokens { r = 8 , sites = [ 0 , 1 ] } , canonicalize ") == [
        Item("merge-tokens", {"r": 8, "sites": (0, 1)}),
        Item("canonicalize", {}),
    ]


def test_a_dash_in_an_option_is_an_underline() -> None:
    assert parse("a{some-option=1}") == [Item("a", {"some_option": 1})]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "expected a name at character 0"),
        ("a,", "expected a name at character 2"),
        ("a b", "expected ',' or the end at character 1"),
        ("a{r}", "expected '=' at character 3"),
        ("a{r=}", "expected a value at character 5"),
        ("a{r=1", "expected '}' at character 5"),
        ("a{r=[1,2}", "expected ']' at character 8"),
        ("a{r=1,r=2}", "option 'r' is given twice at character 7"),
        ("a{1=2}", "expected a name at character 2"),
        ("{r=1}", "expected a name at character 0"),
        ("a{r=nan}", "nan is no finite number at character 7"),
        ("a{r=-1e999}", "-1e999 is no finite number at character 10"),
        ("a{r=[1,Infinity]}", "Infinity is no finite number at character 15"),
    ],
)
def test_the_first_place_that_does_not_fit_is_named(text: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert caught.value.reason == f"spec {text!r}: {why}"
    assert caught.value.remedy.startswith("write name{key=value,...}")


words = st.from_regex(r"[a-z_][a-z0-9_.-]*", fullmatch=True).filter(
    lambda word: word not in ("true", "false", "nan", "inf", "infinity")
)
numbers = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans())
flat = st.one_of(numbers, words)
values = st.one_of(flat, st.lists(flat | st.lists(flat, max_size=2).map(tuple)).map(tuple))
keys = st.from_regex(r"[a-z_][a-z0-9_]*", fullmatch=True)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.builds(Item, words, st.dictionaries(keys, values, max_size=3)), min_size=1))
def test_what_is_written_is_read_back(items: list[Item]) -> None:
    text = ",".join(map(str, items))
    back = parse(text)
    assert back == items
    assert [_kinds(item.options) for item in back] == [_kinds(item.options) for item in items]


def _kinds(value: object) -> object:
    """Tell 1 from 1.0 and True, which are equal."""
    if isinstance(value, dict):
        return {key: _kinds(item) for key, item in value.items()}
    return tuple(map(_kinds, value)) if isinstance(value, tuple) else type(value)


shares = st.floats(0.01, 0.99)
depths = st.lists(st.one_of(st.integers(0, 40), shares), max_size=3).map(tuple)
counts = st.one_of(st.integers(0, 500), shares)
schedules = st.sampled_from(("constant", "linear"))
OPTIONS: dict[str, st.SearchStrategy[dict[str, object]]] = {
    "merge-tokens": st.fixed_dictionaries(
        {"r": st.one_of(counts, st.lists(counts, min_size=1, max_size=4).map(tuple))},
        optional={
            "sites": depths,
            "first": st.integers(0, 9),
            "last": st.integers(-9, 9),
            "schedule": schedules,
            "inflect": st.floats(-1, 1),
            "proportional": st.booleans(),
        },
    ),
    "prune-tokens": st.fixed_dictionaries(
        {"keep": st.one_of(shares, st.lists(shares, min_size=1, max_size=4).map(tuple))},
        optional={
            "sites": depths,
            "schedule": schedules,
            "fuse": st.booleans(),
            "normalize": st.booleans(),
        },
    ),
    "drop-layers": st.fixed_dictionaries({"count": st.integers(1, 9)}),
    "quantize": st.fixed_dictionaries(
        {"scheme": st.sampled_from(sorted(SCHEMES))},
        optional={
            "keep_float": st.integers(0, 40),
            "embeddings": st.booleans(),
            "least": st.integers(1, 999),
            "heads": st.booleans(),
        },
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_pass_is_read_back_from_its_spec(name: str) -> None:
    kind = pass_class(name)

    @settings(max_examples=20, deadline=None)
    @given(OPTIONS.get(name, st.just({})))
    def holds(options: dict[str, object]) -> None:
        made: Pass = kind(**options)
        assert parse_passes(spec_of(made)) == [made]

    holds()


def test_a_spec_holds_only_what_differs_from_the_defaults() -> None:
    text = "merge-tokens{r=8,sites=[0,0.5]},prune-tokens{keep=0.7,fuse=true},canonicalize"
    assert ",".join(map(spec_of, parse_passes(text))) == text
    assert spec_of(*parse_passes("merge-tokens{r=8,first=0,last=-1}")) == "merge-tokens{r=8}"
