"""Capture: forms of inputs, nesting of outputs, dynamic sizes; the caller's model is left alone."""

import hashlib
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from effopt.capture import capture
from effopt.errors import UsageError
from effopt.program import Program
from tests import zoo
from tests.programs import made


class Sum(nn.Module):
    """Two inputs, one output; `scale` has a default."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return self.up(x + y) * scale


X, Y = torch.randn(2, 4), torch.randn(2, 4)


@pytest.mark.parametrize(
    "given",
    [
        (X, Y),
        [X, Y],
        {"x": X, "y": Y},
        {"y": Y, "x": X},
        ((X,), {"y": Y}),
        ((X, Y), {}),
        ((), {"x": X, "y": Y}),
        ((X, Y, 2.0), {}),
        ((X, Y), {"scale": 3.0}),
    ],
)
def test_inputs_by_place_by_name_and_both(given: Any) -> None:
    model = Sum().eval()
    program = capture(model, given)
    args, kwargs = _call(given)
    for batch in (1, 2, 7):
        rows = [x[:1].repeat(batch, 1) if isinstance(x, Tensor) else x for x in args]
        named = {
            key: x[:1].repeat(batch, 1) if isinstance(x, Tensor) else x for key, x in kwargs.items()
        }
        with torch.no_grad():
            want = model(*rows, **named)
        torch.testing.assert_close(program(*rows, **named), want, rtol=0, atol=1e-6)
    assert program.signature.inputs[0].shape == ("batch", 4)


def _call(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(given, dict):
        return (), given
    if len(given) == 2 and isinstance(given[1], dict):
        return given
    return tuple(given), {}


def test_a_bare_tensor() -> None:
    program = capture(nn.Linear(4, 3), X)
    assert program(X).shape == (2, 3)


def test_inputs_named_in_another_order_keep_their_own_dynamic_sizes() -> None:
    class Ordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(9, 4)

        def forward(self, image: Tensor, ids: Tensor) -> Tensor:
            return self.words(ids).mean(1) + image.mean(1)

    given = {"ids": torch.randint(0, 9, (2, 6)), "image": torch.randn(2, 5, 4)}
    program = capture(Ordered(), given, dynamic=("batch", "length"))
    shapes = {item.name: item.shape for item in program.signature.inputs}
    assert shapes == {"image": ("batch", 5, 4), "ids": ("batch", "length")}


class Variadic(nn.Module):
    """Takes whatever it is given."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return sum(args) + sum(kwargs.values())  # type: ignore[return-value]


@pytest.mark.parametrize("given", [(X, Y), ((X,), {"more": Y}), {"one": X, "other": Y}])
def test_a_forward_that_takes_anything(given: Any) -> None:
    program = capture(Variadic(), given)
    args, kwargs = _call(given)
    torch.testing.assert_close(program(*args, **kwargs), X + Y, rtol=0, atol=0)


class Pair(NamedTuple):
    """A named tuple among outputs."""

    left: Tensor
    right: Tensor | None


class Nested(nn.Module):
    """Outputs in a dict, a tuple, a named tuple, a list; a None, an input, and one twice."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = x + 1
        return {"a": y, "b": (y * 2, None, [x]), "pair": Pair(y - 1, None), "again": y}


def test_nested_outputs_come_back_as_they_are() -> None:
    program = capture(Nested(), X)
    x = torch.randn(5, 4)
    found = program(x)
    assert list(found) == ["a", "b", "pair", "again"]
    torch.testing.assert_close(found["a"], x + 1)
    assert isinstance(found["b"], tuple)
    assert found["b"][1] is None
    assert isinstance(found["b"][2], list)
    torch.testing.assert_close(found["b"][2][0], x)
    assert isinstance(found["pair"], Pair)
    assert found["pair"].right is None
    torch.testing.assert_close(found["again"], x + 1)
    names = [item.name for item in program.signature.outputs]
    assert names == ["a", "b.0", "b.2.0", "pair.left", "again"]
    assert all(item.shape == ("batch", 4) for item in program.signature.outputs)


@pytest.mark.parametrize("name", ["vit", "bert", "clip_vision"])
def test_a_hugging_face_output_keeps_its_class(name: str) -> None:
    model, inputs = made(name)
    found, want = capture(model, inputs)(**inputs), model(**inputs)
    assert type(found) is type(want)
    assert list(found.keys()) == list(want.keys())


def test_an_example_of_one_row_serves_every_batch() -> None:
    model, inputs = zoo.make("bert")
    program = capture(model, {key: x[:1] for key, x in inputs.items()})
    for batch in (1, 2, 7):
        given = zoo.texts(batch, 16, (16, 9, 12, 16, 3, 7, 8)[:batch])
        with torch.no_grad():
            want = model(**given).logits
        torch.testing.assert_close(program(**given).logits, want, rtol=0, atol=1e-5)


def state(model: nn.Module) -> tuple[Any, ...]:
    digest = hashlib.sha256()
    for key, held in model.state_dict().items():
        digest.update(key.encode())
        digest.update(held.detach().contiguous().view(torch.uint8).numpy().tobytes())
    flags = [module.training for module in model.modules()]
    grads = [(p.requires_grad, p.grad is None, id(p)) for p in model.parameters()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    return digest.hexdigest(), flags, grads, hooks, torch.get_rng_state().tolist()


def test_the_callers_model_is_left_as_it_was() -> None:
    model, inputs = zoo.make("vit")
    model.train()
    model.vit.layers[1].eval()  # type: ignore[operator]
    before = state(model)
    program = capture(model, inputs, dynamic=("batch",))
    assert state(model) == before
    first, second = program(**inputs).logits, program(**inputs).logits
    assert torch.equal(first, second), "dropout is captured as in evaluation"


def test_the_callers_model_is_left_as_it_was_by_a_failed_capture() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no")

    model = Fails().train()
    with pytest.raises(Exception, match="no"):
        capture(model, X)
    assert model.training
    assert model.drop.training


def test_dynamic_length_up_to_the_position_table() -> None:
    model, inputs = made("bert")
    program = capture(model, inputs, dynamic=("batch", "length"))
    assert program.ranges["length"][1] == 66
    assert program.signature.inputs[0].shape == ("batch", "length")
    for batch, length in ((1, 5), (2, 16), (3, 66)):
        given = zoo.texts(batch, length, (length,) * batch)
        with torch.no_grad():
            want = model(**given).logits
        torch.testing.assert_close(program(**given).logits, want, rtol=0, atol=1e-5)


def test_nothing_dynamic() -> None:
    program = capture(Sum(), (X, Y), dynamic=())
    assert program.dynamic == {}
    assert [item.shape for item in program.signature.inputs] == [(2, 4), (2, 4)]


def exported(dynamic: bool) -> torch.export.ExportedProgram:
    batch = Dim("rows")
    shapes = ({0: batch}, {0: batch}) if dynamic else None
    return export(Sum().eval(), (X, Y), dynamic_shapes=shapes)


def test_an_exported_program_is_taken_with_its_own_dynamic_sizes() -> None:
    program = capture(exported(dynamic=True))
    assert [item.shape for item in program.signature.inputs] == [("batch", 4), ("batch", 4)]
    assert program(torch.randn(6, 4), torch.randn(6, 4)).shape == (6, 3)
    fixed = capture(exported(dynamic=False))
    assert [item.shape for item in fixed.signature.inputs] == [(2, 4), (2, 4)]


@pytest.mark.parametrize("name", ["vit", "bert", "roberta"])
def test_a_hugging_face_model_needs_no_example_inputs(name: str) -> None:
    model, _ = zoo.make(name)
    program, again = capture(model, seed=3), capture(model, seed=3)
    for a, b in zip(program.samples, again.samples, strict=True):
        assert torch.equal(a, b)
        assert a.shape[0] == 2
    with torch.no_grad():
        want = model(**dict(zip(_names(program), program.samples, strict=True))).logits
    got = program.run(program.samples)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def _names(program: Program) -> list[str]:
    return [item.name for item in program.signature.inputs]


def test_calls_that_nest_otherwise_than_at_capture_are_told() -> None:
    program = capture(Sum(), (X, Y))
    for args, kwargs in (((X,), {}), ((X,), {"y": Y}), ((X, Y), {"z": X}), ((), {})):
        with pytest.raises(UsageError, match="the inputs do not nest as at capture") as caught:
            program(*args, **kwargs)
        assert "x" in str(caught.value)
        assert "y" in str(caught.value)


def test_a_fork_shares_weights_and_not_the_graph() -> None:
    program = capture(Sum(), (X, Y))
    fork = program.fork()
    assert fork.text() == program.text()
    nodes = zip(fork.nodes(), program.nodes(), strict=True)
    assert not any(a is b for a, b in nodes)
    weights = zip(fork.module.parameters(), program.module.parameters(), strict=True)
    assert all(a is b for a, b in weights)
