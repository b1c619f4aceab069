"""Scale groups: which are found, that any scales of them are free, and what is refused."""

import json
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from effopt.capture import capture
from effopt.edit import Edit
from effopt.errors import PreconditionError, UsageError
from effopt.labels import Labels
from effopt.program import Program, module_path
from effopt.scale_edit import apply_scales
from effopt.scales import ScaleGroup, describe, find_scales
from effopt.verify import verify
from tests.architectures.base import scramble
from tests.check import NORMAL
from tests.programs import apply, normal, reduced
from tests.scaling import by_place, new_inputs, powers, prove, rescaled

WIDTH, HEADS, INNER, WORDS = 32, 4, 64, 50


class Attention(nn.Module):
    """Attention in one spelling: fused or apart, called or written out, with grouped heads."""

    def __init__(self, fused: bool = False, plain: bool = False, groups: int = HEADS) -> None:
        super().__init__()
        self.fused, self.plain, self.groups = fused, plain, groups
        inner = WIDTH // HEADS * groups
        sizes = (WIDTH + 2 * inner,) if fused else (WIDTH, inner, inner)
        self.inputs = nn.ModuleList(nn.Linear(WIDTH, size) for size in sizes)
        self.output = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        found = torch.cat([layer(x) for layer in self.inputs], dim=-1) if self.fused else None
        parts = found.chunk(3, dim=-1) if found is not None else [f(x) for f in self.inputs]
        q, k, v = (p.view(b, n, -1, WIDTH // HEADS).transpose(1, 2) for p in parts)
        k, v = (self.repeat(t) for t in (k, v))
        if self.plain:
            y = (q @ k.transpose(-2, -1) / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v
        else:
            y = functional.scaled_dot_product_attention(q, k, v)
        return self.output(y.transpose(1, 2).reshape(b, n, WIDTH))

    def repeat(self, x: Tensor) -> Tensor:
        if self.groups == HEADS:
            return x
        b, heads, n, width = x.shape
        wide = x[:, :, None].expand(b, heads, HEADS // heads, n, width)
        return wide.reshape(b, HEADS, n, width)


class Feedforward(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


Part = Callable[[], nn.Module]


class Network(nn.Module):
    """Words, two blocks, a norm and a head; norms stand before each part or behind its sum."""

    def __init__(self, attention: Part, inner: Part, norm: Part, first: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.parts = nn.ModuleList(made() for _ in range(2) for made in (attention, inner))
        self.norms = nn.ModuleList(norm() for _ in range(4))
        self.first, self.norm, self.head = first, norm(), nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for part, norm in zip(self.parts, self.norms, strict=True):
            x = x + part(norm(x)) if self.first else norm(x + part(x))
        return self.head(self.norm(x))


def layer_norm() -> nn.Module:
    return nn.LayerNorm(WIDTH)


def rms_norm() -> nn.Module:
    return nn.RMSNorm(WIDTH)


def gelu() -> nn.Module:
    return Feedforward(functional.gelu)


def relu() -> nn.Module:
    return Feedforward(functional.relu)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "pre-LN, explicit softmax, GELU": (
        lambda: Network(lambda: Attention(plain=True), gelu, layer_norm),
        {"folded": 7, "mul": 2},
    ),
    "pre-LN, ReLU": (lambda: Network(Attention, relu, layer_norm), {"folded": 9}),
    "post-LN, GELU": (
        lambda: Network(Attention, gelu, layer_norm, first=False),
        {"folded": 3, "mul": 6},
    ),
    "fused qkv, SDPA, GELU": (
        lambda: Network(lambda: Attention(fused=True), gelu, layer_norm),
        {"folded": 7, "mul": 2},
    ),
    "RMSNorm, GQA 4/2, SwiGLU": (
        lambda: Network(lambda: Attention(groups=2), Gated, rms_norm),
        {"folded": 7, "tied": 2},
    ),
    "RMSNorm, MHA, SwiGLU": (lambda: Network(Attention, Gated, rms_norm), {"folded": 9}),
}
"""Networks and their groups: from the maths of each, two blocks and the head."""


def program_of(model: nn.Module, inputs: object, *dynamic: str) -> Program:
    scramble(model)
    return apply(capture(model.eval(), inputs, dynamic=dynamic or ("batch",)), NORMAL)[0]


def ids(length: int = 6) -> Tensor:
    return torch.randint(0, WORDS, (3, length))


def groups(program: Program) -> tuple[ScaleGroup, ...]:
    return program.get(find_scales).groups


def kinds(program: Program) -> dict[str, int]:
    return dict(Counter(group.kind for group in groups(program)))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_groups_of_each_network_are_found_and_free(name: str) -> None:
    build, expected = NETWORKS[name]
    assert prove(program_of(build(), (ids(),))) == expected


def test_a_free_length_gives_the_same_groups() -> None:
    build, expected = NETWORKS["RMSNorm, GQA 4/2, SwiGLU"]
    program = program_of(build(), (ids(),), "batch", "length")
    assert prove(program) == expected


def test_grouped_heads_share_the_scales_of_their_values() -> None:
    program = program_of(NETWORKS["RMSNorm, GQA 4/2, SwiGLU"][0](), (ids(),))
    tied = next(group for group in groups(program) if group.kind == "tied")
    width = WIDTH // HEADS
    heads = torch.tensor(tied.roots).view(HEADS, width)
    first, second = torch.arange(width), torch.arange(width, 2 * width)
    assert torch.equal(heads, torch.stack([first, first, second, second]))
    assert [module_path(node) for node in tied.producers] == ["parts.0.inputs.2"]


def test_only_the_rows_of_the_values_change_in_a_fused_projection() -> None:
    program = program_of(NETWORKS["fused qkv, SDPA, GELU"][0](), (ids(),))
    scales = program.get(find_scales)
    place = next(
        n for n, g in enumerate(scales.groups) if module_path(g.linears[0]) == "parts.0.output"
    )
    after = rescaled(program, {place: torch.full((WIDTH,), 4.0)})
    before, now = (weight_of(p, "parts.0.inputs.0") for p in (program, after))
    assert torch.equal(now[: 2 * WIDTH], before[: 2 * WIDTH])
    assert torch.equal(now[2 * WIDTH :], before[2 * WIDTH :] / 4)


def weight_of(program: Program, path: str) -> Tensor:
    node = next(n for n in program.nodes() if n.op == "call_function" and module_path(n) == path)
    weight = node.args[1]
    assert isinstance(weight, torch.fx.Node)
    return program.weight(weight)


def test_nothing_else_is_touched() -> None:
    program = program_of(NETWORKS["post-LN, GELU"][0](), (ids(),))
    places = [n for n, group in enumerate(groups(program)) if group.kind == "mul"][:1]
    after = rescaled(program, {place: torch.full((WIDTH,), 2.0) for place in places})
    was = {n.target: program.weight(n) for n in program.nodes() if n.op == "get_attr"}
    new = {n.target for n in after.nodes() if n.op == "get_attr"} - set(was)
    # Query, key and value of the first block, and the one factor that they all read.
    assert len(new) == 4
    assert set(was) - {n.target for n in after.nodes()} == {
        f"parts.0.inputs.{n}.weight" for n in range(3)
    }


class Tied(nn.Module):
    """The head reads the table of words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return functional.linear(self.norm(self.body(self.words(ids))), self.words.weight)


def test_a_weight_with_two_readers_is_pinned() -> None:
    program = program_of(Tied(), (ids(),))
    (group,) = groups(program)
    assert group.kind == "mul"
    assert module_path(group.linears[0]) == "body"
    # The table is read twice, so its columns are not free; the last layer is no candidate.
    assert program.get(find_scales).pinned[group.source] == "embedding (embedding.default) in words"
    prove(program)


class Twisted(nn.Module):
    """Two layers read the same channels in different orders: they cannot both choose."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.one, self.other = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.one(y) + self.other(y.flip(-1))


def test_layers_that_read_other_orders_get_a_multiplication_each() -> None:
    program = program_of(Twisted(), (torch.randn(2, 5, WIDTH),))
    assert kinds(program) == {"mul": 2}
    reason = "other layers read its channels in another order"
    assert set(program.get(find_scales).pinned.values()) == {reason}
    prove(program)


class Folding(nn.Module):
    """The batch is folded into the channels: what a channel is follows from a free size."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        mixed = self.norm(x).reshape(4 * batch).reshape(4, batch)
        return self.body(mixed.t().contiguous())


def test_labels_that_follow_a_free_size_are_pinned() -> None:
    program = program_of(Folding(), (torch.randn(6, 4),))
    assert kinds(program) == {"mul": 1}
    after = rescaled(program, {0: torch.tensor([2.0, 0.5, 4.0, 0.25])})
    for batch in (2, 5, 9):
        x = torch.randn(batch, 4)
        assert torch.equal(after.run((x,))[0], program.run((x,))[0])


class Scaled(nn.Module):
    """A gain for each channel takes scales on both sides (LayerScale)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x) * self.gain)


def test_a_gain_absorbs_scales() -> None:
    program = program_of(Scaled(), (torch.randn(2, 8),))
    first, second = groups(program)
    assert (first.kind, second.kind) == ("mul", "folded")
    assert [node.target for node in second.producers] == [torch.ops.aten.mul.Tensor]
    prove(program)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("vit", "merge-tokens{r=4}"),
        ("vit", "prune-tokens{keep=0.5}"),
        ("bert", "merge-tokens{r=3}"),
    ],
)
def test_scales_are_free_after_a_reduction(name: str, spec: str) -> None:
    program, _ = reduced(name, spec)
    scales = program.get(find_scales)
    # The classifier reads a token of the last norm through the kernels: nothing new is pinned.
    assert kinds(program) == kinds(normal(name))
    after = rescaled(program, by_place(scales, powers(scales)))
    verify(after, "test")
    inputs = new_inputs(program)
    # Powers of two round nothing, so not even a choice among equal tokens can turn out otherwise.
    for got, want in zip(after.run(inputs), program.run(inputs), strict=True):
        assert torch.equal(got, want)


def test_a_lower_precision_is_kept() -> None:
    model = NETWORKS["pre-LN, ReLU"][0]().to(torch.bfloat16)
    program = program_of(model, (ids(),))
    scales = program.get(find_scales)
    after = rescaled(program, by_place(scales, powers(scales)))
    verify(after, "test")
    inputs = new_inputs(program)
    assert torch.equal(after.run(inputs)[0], program.run(inputs)[0])


def attempt(program: Program, scale: Tensor) -> None:
    scales = program.get(find_scales)
    apply_scales(Edit(program, "test"), scales, {scales.groups[0]: scale})


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_is_refused(bad: float) -> None:
    program = program_of(Scaled(), (torch.randn(2, 8),))
    with pytest.raises(PreconditionError, match="not a positive finite number"):
        attempt(program, torch.tensor([1.0] * 7 + [bad]))


def test_a_weight_that_would_overflow_is_refused() -> None:
    program = program_of(Scaled(), (torch.randn(2, 8),))
    text = program.text()
    with pytest.raises(PreconditionError, match=r"leaves the range of torch\.float32"):
        attempt(program, torch.full((8,), 1e45, dtype=torch.float64))
    assert program.text() == text


def test_scales_of_another_program_or_size_are_refused() -> None:
    program = program_of(Scaled(), (torch.randn(2, 8),))
    with pytest.raises(UsageError, match="one scale for each root"):
        attempt(program, torch.ones(3))
    scales = program.get(find_scales)
    with pytest.raises(UsageError, match="of another program"):
        apply_scales(Edit(program.fork(), "test"), scales, {scales.groups[0]: torch.ones(8)})


def test_the_description_is_plain_data() -> None:
    program = normal("bert")
    rows = describe(program.get(find_scales))
    assert json.loads(json.dumps(rows)) == rows
    assert rows[1] == {
        "kind": "folded",
        "linears": ["bert.encoder.layer.0.attention.output.dense"],
        "source": "bert.encoder.layer.0.attention.self",
        "width": 32,
        "roots": 32,
        "producers": ["bert.encoder.layer.0.attention.self.value"],
        "pinned": "",
    }
    assert rows[3]["kind"] == "mul"
    assert rows[3]["pinned"].startswith("gelu (gelu.default) in ")


def test_pinned_labels_pin_what_they_meet() -> None:
    labels = Labels()
    a, b, c = labels.fresh(4), labels.fresh(4), labels.fresh(2, 4)
    labels.unite(a, b, cause=1)
    assert (labels.roots(a) == labels.roots(b)).all()
    labels.pin(b[:1], cause=2)
    labels.unite(c, a, cause=3)
    assert labels.roots(c).tolist() == [[0, *labels.roots(a).tolist()[1:]]] * 2
    assert labels.causes(a).tolist()[0] == 2
    assert labels.causes(c)[:, 0].tolist() == [3, 3]


def test_a_chain_of_unions_in_one_call_is_one_class() -> None:
    labels = Labels()
    chain = labels.fresh(5000)
    labels.unite(chain[1:], chain[:-1], cause=1)
    assert len(set(labels.roots(chain).tolist())) == 1
