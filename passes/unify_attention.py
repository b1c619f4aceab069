"""unify-attention: every spelling of attention becomes one call in four dimensions."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.fx import Node

from effopt.attention import SDPA, mask_of, qkv_of, with_mask
from effopt.axes import AxisMap, find_axes
from effopt.edit import MAKER, Edit
from effopt.errors import PreconditionError, VerificationError
from effopt.passes.attention_logits import Fact, Logits, Lost, Weights, fact_of
from effopt.passes.attention_products import Operand, Product, product_of
from effopt.passes.attention_shapes import (
    UnfitError,
    around,
    bias_for,
    find_lead,
    four,
    four_mask,
    joined,
    mask_for,
    spread,
    turned,
)
from effopt.pipeline import Outcome
from effopt.program import Program, is_tensor, shape, where

aten = torch.ops.aten
ORIGIN = ("nn_module_stack", "stack_trace")


@dataclass(frozen=True)
class UnifyAttention:
    """Bring attention written with products and a softmax, or in 3-D, to one 4-D call. Exact.

    A query that may attend to nothing has no answer, and may get another one than before.
    """

    name: ClassVar[str] = "unify-attention"
    exact: ClassVar[bool] = True

    def check(self, program: Program) -> list[PreconditionError]:
        """Accept every program: what is no plain attention is left alone, with the reason."""
        return []

    def run(self, program: Program) -> Outcome:
        """Carry facts forward from each product; rewrite where softmax weights meet values."""
        walk = _walked(program)
        changed = walk.edit.close()
        noun = "call" if walk.unified == 1 else "calls"
        done = f"{walk.unified} attention {noun} unified" if changed else "no attention to unify"
        left = (f"{refusal.node}: {refusal.reason}" for refusal in walk.left_alone())
        return Outcome(changed, (done, *left))


def left_alone(program: Program) -> list[PreconditionError]:
    """Say which attention of a program is in no form that can be unified, and why."""
    return list(_walked(program.fork()).left_alone())


def _walked(program: Program) -> "Walk":
    axes = program.get(find_axes) if _needs_axes(program) else None
    walk = Walk(Edit(program, UnifyAttention.name), _dead(program), axes)
    for node in list(program.nodes()):
        walk.visit(node)
    return walk


def _needs_axes(program: Program) -> bool:
    """Tell whether a product or a call in three dimensions may hold samples and heads in one."""
    return any(
        len(shape(node)) == 3
        for node in program.nodes()
        if is_tensor(node) and (node.target is SDPA or product_of(node) is not None)
    )


def _dead(program: Program) -> set[Node]:
    """Find the nodes whose value no output reads."""
    nodes = list(program.nodes())
    live = {node for node in nodes if node.op == "output" or node.is_impure()}
    for node in reversed(nodes):
        if node in live:
            live.update(node.all_input_nodes)
    return set(nodes) - live


@dataclass
class Walk:
    """One walk over a graph in execution order; `left` says why an attention stays as it is."""

    edit: Edit
    dead: set[Node]
    axes: AxisMap | None
    facts: dict[Node, Fact] = field(default_factory=dict)
    left: dict[Node, str] = field(default_factory=dict)
    unified: int = 0

    def visit(self, node: Node) -> None:
        """Rewrite a node that ends an attention, or note what it says of one."""
        if node.op != "call_function" or node in self.dead:
            return
        product = product_of(node)
        weights = self.facts.get(product.left.node) if product is not None else None
        if product is not None and isinstance(weights, Weights):
            if self._attempt(node, weights.softmax, lambda: self._unify(node, product, weights)):
                return
        elif node.target is SDPA and len(shape(node)) == 3:
            self._attempt(node, node, lambda: self._lift(node))
            return
        fact = fact_of(node, self.facts)
        if fact is not None:
            self.facts[node] = fact
        if isinstance(fact, Weights) and node is fact.softmax and fact.logits is not None:
            lost = fact.logits.reason if isinstance(fact.logits, Lost) else ""
            readers = ", ".join(user.name for user in node.users if user not in self.dead)
            self.left[node] = lost or f"its weights are read by {readers}, not by a product"

    def _attempt(self, node: Node, call: Node, rewrite: Callable[[], None]) -> bool:
        """Try a rewrite, and note why one does not fit."""
        before = node.prev
        try:
            with self.edit.attempt(node):
                rewrite()
        except (UnfitError, VerificationError) as refusal:
            self.left[call] = str(refusal)
            return False
        made = before.next
        while made.op == "call_function" and made.meta.get(MAKER) == self.edit.by:
            made.meta.update({key: call.meta[key] for key in ORIGIN if key in call.meta})
            made = made.next
        self.left.pop(call, None)
        self.unified += 1
        return True

    def _unify(self, node: Node, product: Product, weights: Weights) -> None:
        """Make one call of a product, its softmax and the product with the values."""
        logits = weights.logits
        if isinstance(logits, Lost):
            raise UnfitError(logits.reason)
        if logits is None:
            raise UnfitError("its logits are no product of queries and keys")
        self._only_here(weights.path, (node,), "weights")
        self._only_here(logits.path, (weights.softmax, *logits.passed), "logits")
        rank = len(product.right.order)
        if product.left.order != tuple(range(rank)):
            raise UnfitError("its weights are transposed")
        values = (*product.right.order[:-2], product.right.order[-1], product.right.order[-2])
        operands = (
            *(logits.product.left, logits.product.right),
            Operand(product.right.node, values),
        )
        near = around(operands, (*logits.path, *weights.path), node)
        lead = find_lead(logits.path[0], near, self.axes)
        q, k, v = spread(self.edit, tuple(four(self.edit, one, lead) for one in operands))
        mask = mask_for(self.edit, logits, q, lead)
        for factor in logits.rows:
            q = self.edit.call(aten.mul.Tensor, q, bias_for(self.edit, factor, logits, q, lead))
        scale = _scale(logits, q)
        masked = () if mask is None else (mask,)
        call = self.edit.call(SDPA, q, k, v, *masked, name="attention", **scale)
        result = joined(self.edit, call, rank)
        self.edit.replace(node, turned(self.edit, result, product.order))

    def _only_here(self, path: tuple[Node, ...], readers: tuple[Node, ...], what: str) -> None:
        """Refuse values that something else reads, which would have to be computed as well."""
        for one in path:
            for user in one.users:
                if user not in path and user not in readers and user not in self.dead:
                    by = "an output" if user.op == "output" else f"read by {user.name}"
                    raise UnfitError(f"its {what} are {by}")

    def _lift(self, node: Node) -> None:
        """Bring a call in three dimensions to four."""
        if node.kwargs.get("enable_gqa"):
            raise UnfitError("its heads are grouped in three dimensions")
        operands = tuple(Operand(one, (0, 1, 2)) for one in qkv_of(node))
        lead = find_lead(node, around(operands, (), node), self.axes)
        qkv = spread(self.edit, tuple(four(self.edit, one, lead) for one in operands))
        mask = mask_of(node)
        if mask is not None:
            mask = four_mask(self.edit, mask, node, (), lead)
        args, kwargs = with_mask(node, qkv, mask)
        call = self.edit.call(SDPA, *args, name="attention", **kwargs)
        self.edit.replace(node, joined(self.edit, call, 3))

    def left_alone(self) -> Iterator[PreconditionError]:
        """Yield each attention that stays as it was, and why."""
        remedy = "write the attention as scaled_dot_product_attention, or keep the model as it is"
        return (PreconditionError(where(node), why, remedy) for node, why in self.left.items())


def _scale(logits: Logits, q: Node) -> dict[str, Any]:
    """Write the factor on the logits, if it is not the one that a call has by itself."""
    size = shape(q)[-1]
    usual = float(size) ** -0.5 if isinstance(size, int) else math.nan
    return {} if abs(logits.scale - usual) <= math.ulp(usual) else {"scale": logits.scale}
