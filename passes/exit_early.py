"""exit-early: rows that a model is sure of leave behind an early block, with an answer from there.

Heads are fitted in closed form to the model's own outputs, without labels: ridge regression, or a
tuned lens (Belrose et al., arXiv 2303.08112) ahead of the model's own head. Rows leave by one of
the scores of BranchyNet (1709.01686), DeeBERT (2004.12993), PABEE (2006.04152) and CALM
(2207.07061). None does until thresholds are calibrated, when all other passes have run.

Where the calibration data has labels, ridge heads may be fitted to those: 1 for the class, 0 for
others. What such a head gives is not on the scale of the model's logits, and no logarithm of a
probability unless it is polished. Its margin still orders rows by how sure they are, and that is
all that a threshold reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

from torch.fx import Node

from effopt.edit import Edit
from effopt.errors import PreconditionError, UsageError, unknown
from effopt.exits import insert_exits
from effopt.losses import LOSSES, Loss
from effopt.passes.exit_calibration import Wish, calibrate, said
from effopt.passes.exit_checks import check_options, check_samples
from effopt.passes.exit_fit import Fit, agreements, fit_heads
from effopt.passes.exit_nodes import Heads, read_features, score
from effopt.passes.exit_plan import SATURATION, Asked, Plan, plan_exits
from effopt.passes.exit_reads import POOLS
from effopt.pipeline import Outcome
from effopt.program import Program, module_path
from effopt.report import StepRecord
from effopt.risk import least_samples
from effopt.risk_rules import RULES

SCORES = ("max", "margin", "probability-margin", "entropy", "patience", SATURATION)
LOWER = ("auto", "if", "compact", "split")
_WORDS = {
    "score": SCORES,
    "head": ("auto", "ridge", "lens"),
    "pool": ("auto", *POOLS),
    "rule": tuple(RULES),
    "fit": ("outputs", "labels"),
    "loss": tuple(LOSSES),
    "reference": ("self", "original"),
    "unit": ("sample", "token"),
    "lower": LOWER,
}


_PROMISED = ("score", "rule", "epsilon", "delta", "loss", "reference", "unit", "share")
"""The options that say what calibration has to keep."""


@dataclass(frozen=True)
class ExitEarly:
    """Add exits behind chosen blocks, with heads and scores; calibrate them when all is done."""

    name: ClassVar[str] = "exit-early"
    exact: ClassVar[bool] = False

    cuts: int | tuple[int, ...] = field(
        default=2, metadata={"help": "how many exits, spread over the work; or blocks from 0"}
    )
    score: str = field(
        default="margin", metadata={"help": f"how sure an exit is: {', '.join(SCORES)}"}
    )
    head: str = field(
        default="auto",
        metadata={
            "help": "ridge, or lens (the model's own head again); auto: lens for outputs of tokens"
        },
    )
    pool: str = field(
        default="auto",
        metadata={"help": f"what a ridge head reads: {', '.join(POOLS)}; auto: as outputs do"},
    )
    fit: str = field(
        default="outputs",
        metadata={"help": "what heads learn: outputs, or labels, for the output that is judged"},
    )
    norm: bool = field(default=False, metadata={"help": "normalize what heads read"})
    shared: bool = field(default=False, metadata={"help": "one head for all exits"})
    polish: int = field(
        default=0, metadata={"help": "steps of distillation, after ridge heads are fitted"}
    )
    rule: str = field(
        default="ltt", metadata={"help": f"how the loss is bounded: {', '.join(RULES)}"}
    )
    epsilon: float = field(default=0.01, metadata={"help": "the loss that exits may cost"})
    delta: float = field(
        default=0.05, metadata={"help": "how probably it may be more (all rules but crc)"}
    )
    loss: str = field(
        default="disagree",
        metadata={"help": f"what is bounded: {', '.join(LOSSES)} (more errors by labels)"},
    )
    reference: str = field(
        default="self", metadata={"help": "compared with: self, or the original model"}
    )
    unit: str = field(default="sample", metadata={"help": "what the loss counts: sample or token"})
    share: float = field(
        default=0.4, metadata={"help": "part of the calibration samples that fits the heads"}
    )
    lower: str = field(
        default="auto",
        metadata={"help": "if, compact or split; auto: split on a GPU, compact elsewhere"},
    )

    def __post_init__(self) -> None:
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise unknown(name, getattr(self, name), words)
        for holds, given, remedy in self._ranges():
            if not holds:
                raise UsageError(given, remedy)
        least_samples(self.rule, self.epsilon, self.level)

    @property
    def level(self) -> float | None:
        """Delta, where the rule has one."""
        return None if RULES[self.rule].test is None else self.delta

    @property
    def labelled(self) -> str:
        """The options that need labels, in words; "" where none does."""
        asked = {"fit=labels": self.fit == "labels", f"loss={self.loss}": self._loss.labelled}
        return " and ".join(words for words, is_so in asked.items() if is_so)

    @property
    def _loss(self) -> Loss:
        return LOSSES[self.loss]

    def _ranges(self) -> list[tuple[bool, str, str]]:
        """Return what must hold of each option, what was given, and what to give instead."""
        blocks = self.cuts if isinstance(self.cuts, tuple) else ()
        several = len(blocks) > 0 and len(set(blocks)) == len(blocks) and min(blocks) >= 0
        count = isinstance(self.cuts, int) and self.cuts >= 1
        return [
            (count or several, f"cuts is {self.cuts}", "give a count from 1, or blocks, each once"),
            (0 < self.share < 1, f"share is {self.share}", "give a share between 0 and 1"),
            (self.polish >= 0, f"polish is {self.polish}", "give a count from 0"),
            (
                self.head != "lens" or self.pool == "auto",
                f"a lens reads every token, and pool is {self.pool}",
                "leave pool out, or use head=ridge",
            ),
            (
                self.head != "lens" or not self.polish,
                "polish trains ridge heads, and head is lens",
                "leave polish out, or use head=ridge",
            ),
            (
                self.head != "lens" or self.fit == "outputs",
                f"a lens learns hidden states, and fit is {self.fit}",
                "leave fit out, or use head=ridge",
            ),
            (
                self.unit == "sample" or not self._loss.labelled,
                f"loss={self.loss} counts samples, and unit is {self.unit}",
                "leave unit out, or choose another loss",
            ),
        ]

    def check(self, program: Program) -> list[PreconditionError]:
        """Refuse without enough data, a cut, or outputs that heads can be fitted to."""
        try:
            plan = self._plan(program)
            check_options(program, plan, self, self._form(program))
            check_samples(program, plan, self)
        except PreconditionError as refusal:
            return [refusal]
        return []

    def run(self, program: Program) -> Outcome:
        """Fit heads and insert exits at thresholds of infinity; the facts list every exit."""
        plan, edit = self._plan(program), Edit(program, self.name)
        features = [read_features(edit, plan, stream, self.norm) for stream in plan.streams]
        data = program.calibration
        labels = data.labels if data is not None and self.fit == "labels" else None
        fit = fit_heads(program, plan, features, self.share, self.shared, self.polish, labels)
        maker = Heads(edit, plan)
        logits = [
            maker.logits(place, node, heads)
            for place, (node, heads) in enumerate(zip(features, fit.heads, strict=True), 1)
        ]
        answers = [maker.answers(found) for found in logits]
        scored = [found[plan.scored] for found in logits]
        scores = self._scores(edit, plan, features, scored)
        by_name: dict[str, Sequence[Node]] = {
            name: [found[name] for found in answers] for name in plan.answers
        }
        insert_exits(edit, scores, by_name, self._form(program))
        edit.close()
        agreed = agreements(program, plan, fit, [found[plan.scored] for found in answers])
        return Outcome(True, *self._told(plan, fit, agreed))

    def finish(self, program: Program, original: Program, record: StepRecord) -> Outcome:
        """Calibrate the thresholds on the engine of the whole pipeline; see `exit_calibration`."""
        facts = record.facts
        options = {name: getattr(self, name) for name in _PROMISED}
        wish = Wish(**options, output=facts["scored"], position=facts["position"])
        promise = calibrate(program, original, wish, facts["order"])
        program.promise = promise
        rows = [{name: row[name] for name in ("path", "block", "share")} for row in facts["exits"]]
        return Outcome(True, said(promise, program), {"promise": promise.to_json(), "exits": rows})

    def _plan(self, program: Program) -> Plan:
        return plan_exits(program, Asked(self.cuts, self.head, self.pool, self.score))

    def _scores(
        self, edit: Edit, plan: Plan, features: Sequence[Node], logits: Sequence[Node]
    ) -> list[Node]:
        """Make the score of each exit, of what its kind compares."""
        if self.score != SATURATION:
            whole = self.score == "patience"
            seen = (logits[0 if whole else n : n + 1] for n in range(len(logits)))
            return [score(edit, self.score, found, plan.position) for found in seen]
        assert plan.before is not None
        before = read_features(edit, plan, plan.before, self.norm)
        position = None if plan.position is None else plan.last.tokens[0]
        pairs = pairwise([before, *features])
        return [score(edit, self.score, pair, position) for pair in pairs]

    def _form(self, program: Program) -> str:
        """Return how engines lower the exits: "compact" was as fast as "if" at batch 1."""
        if self.lower != "auto":
            return self.lower
        if program.target is not None and program.target.gpu:
            return "split"
        return "compact" if "batch" in program.ranges else "if"

    def _told(
        self, plan: Plan, fit: Fit, agreed: Sequence[float | None]
    ) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Return notes and facts."""
        kind = "lens" if plan.reads.is_lens else "ridge"
        names = ["hidden states"] if plan.reads.is_lens else list(plan.answers)
        rows, notes = list[dict[str, Any]](), list[str]()
        for place, (stream, heads) in enumerate(zip(plan.streams, fit.heads, strict=True)):
            cut, part = stream.cut, agreed[place]
            penalties = {name: head.lam for name, head in zip(names, heads, strict=True)}
            rows.append(
                {
                    "block": cut.block,
                    "path": module_path(cut.node),
                    "share": cut.share,
                    "head": kind,
                    "reads": str(plan.reads),
                    "lambda": penalties,
                    "agreement": part,
                    "fit_rows": fit.rows[place],
                }
            )
            share = "" if cut.share is None else f", at {cut.share:.0%} of the work"
            learned = ", fitted to labels" if self.fit == "labels" else ""
            notes.append(f"block {cut.block}{share}: a {kind} head on {plan.reads}{learned}")
            if part is not None:
                notes[-1] += f", agrees with the model on {part:.1%} of held-out samples"
        facts = {"exits": rows, "outputs": list(plan.answers), "scored": plan.scored}
        return tuple(notes), {**facts, "position": plan.position, "order": fit.order}
