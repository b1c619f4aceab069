"""Where exits go: behind which blocks, which outputs they answer, and what their heads read."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from effopt.attention import SDPA
from effopt.axes import Dim, find_axes, same_sizes
from effopt.causal import looks_back
from effopt.cuts import Cut, find_cuts
from effopt.errors import PreconditionError
from effopt.passes.exit_reads import POOLS, Reads, Stream, reads_of
from effopt.program import Program, is_tensor, shape, value, where
from effopt.rows import mixes_rows
from effopt.signature import EXIT_INDEX
from effopt.sites import TokenAxis, find_tokens

SATURATION = "saturation"
_FEWER = "choose fewer or other cuts: `effopt inspect` lists them"


@dataclass(frozen=True)
class Asked:
    """The options of the pass that say where exits go and what they are."""

    cuts: int | tuple[int, ...]
    head: str
    pool: str
    score: str


@dataclass(frozen=True)
class Plan:
    """Exits behind `streams`, in order, which give the outputs `answers`: name → whole model's.

    `last` is the stream behind the last block, and `before` the one ahead of the first exit, if
    the score compares the two. `scored` is the output that is scored; `position` its dimension of
    tokens where the last of them counts alone. `tail` is what follows the last stream.
    """

    streams: tuple[Stream, ...]
    before: Stream | None
    last: Stream
    answers: dict[str, Node]
    scored: str
    position: int | None
    reads: Reads
    tail: tuple[Node, ...]


def plan_exits(program: Program, asked: Asked) -> Plan:
    """Plan the exits of a program; PreconditionError says why there can be none."""
    if EXIT_INDEX in [spec.name for spec in program.signature.outputs]:
        remedy = "insert exits once, and rename an output of that name"
        raise PreconditionError("model", f"there is an output {EXIT_INDEX!r} already", remedy)
    cuts = program.get(find_cuts)
    chosen = _chosen(program, cuts, asked.cuts)
    answers = _answers(program, chosen[-1].node)
    batch = program.get(find_axes).of(next(iter(answers.values())))[0]
    streams, last = [_stream(program, cut, batch) for cut in chosen], cuts[-1]
    end = _stream(program, last, batch)
    tail = tuple(node for node in behind(program, last.node) if node.op != "output")
    reads = _reads(program, asked, [*streams, end], tail, answers)
    before = None
    if asked.score == SATURATION:
        before = _stream(program, _ahead(cuts, chosen[0]), batch)
        _check_alike([before, *streams], reads)
    for stream in [*streams, *([before] if before else [])]:
        _check_shape(stream, end, reads)
    if reads.is_lens:
        _check_tail(program, streams[0], end, tail)
    if mixing := mixes_rows(program, batch):
        reason = "rows of a batch see each other here, so an answer depends on who else is there"
        raise PreconditionError(where(mixing), reason, "let the model treat each row by itself")
    scored = _scored(answers, asked.score)
    position = _last_position(program, answers[scored])
    return Plan(tuple(streams), before, end, answers, scored, position, reads, tail)


def behind(program: Program, start: Node) -> list[Node]:
    """Return the nodes that depend on one, in execution order."""
    found = {start: None}
    for node in program.nodes():
        if any(source in found for source in node.all_input_nodes):
            found[node] = None
    return list(found)[1:]


# --- cuts


def _chosen(program: Program, cuts: Sequence[Cut], asked: int | tuple[int, ...]) -> list[Cut]:
    """Choose cuts ahead of the last block, by its number or spread over the work."""
    usable = [cut for cut in cuts if cut.block < _last_block(program)]
    known = ", ".join(str(cut.block) for cut in usable)
    if not usable:
        raise PreconditionError("model", _why_none(program, cuts), "leave exit-early out")
    if isinstance(asked, int):
        if asked > len(usable):
            reason = f"{asked} cuts are asked for, and there are {len(usable)} (blocks {known})"
            raise PreconditionError("model", reason, _FEWER)
        return _spread(usable, asked)
    by_block = {cut.block: cut for cut in usable}
    if missing := [block for block in asked if block not in by_block]:
        reason = f"there is no cut behind block {missing[0]}: there are behind {known}"
        raise PreconditionError("model", reason, _FEWER)
    return [by_block[block] for block in sorted(asked)]


def _last_block(program: Program) -> int:
    """Return the number of the last attention call; -1 without one."""
    return sum(node.target is SDPA for node in program.nodes()) - 1


def _why_none(program: Program, cuts: Sequence[Cut]) -> str:
    last = _last_block(program)
    if last < 0:
        return "there is no attention call, so no block to stop behind"
    if cuts:
        return f"the only cut is behind the last block ({last})"
    return "no value carries all that outputs need: some leave early, or by a way of their own"


def _spread(usable: Sequence[Cut], count: int) -> list[Cut]:
    """Choose cuts, in order and each once, nearest to 1/(n+1), 2/(n+1), ... of the work."""
    found = list[Cut]()
    for place in range(count):
        begin = usable.index(found[-1]) + 1 if found else 0
        end = len(usable) - (count - 1 - place)
        wanted = (place + 1) / (count + 1)
        near = [(abs(_depth(usable, n) - wanted), n, usable[n]) for n in range(begin, end)]
        found.append(min(near, key=lambda one: one[:2])[2])
    return found


def _depth(usable: Sequence[Cut], place: int) -> float:
    """Return the share of the work that is done at a cut; of the cuts, where that is unknown."""
    share = usable[place].share
    return (place + 1) / (len(usable) + 1) if share is None else share


def _ahead(cuts: Sequence[Cut], first: Cut) -> Cut:
    """Return the cut ahead of the first exit."""
    place = list(cuts).index(first)
    if not place:
        reason = "saturation compares with the block before, and the first exit has none"
        raise PreconditionError(where(first.node), reason, "name later cuts, or another score")
    return cuts[place - 1]


# --- outputs


def _answers(program: Program, cut: Node) -> dict[str, Node]:
    """Return the outputs that come after the last exit, by name."""
    after, axes = set(behind(program, cut)), program.get(find_axes)
    (outputs,) = program.output().args
    found = dict[str, Node]()
    starts = {axes.of(node)[0] for node in program.inputs() if is_tensor(node) and shape(node)}
    for spec, node in zip(program.signature.outputs, outputs, strict=True):  # type: ignore[arg-type]
        if not isinstance(node, Node) or node not in after:
            continue
        if not value(node).is_floating_point():
            reason = f"output {spec.name!r} is {spec.dtype}: no head is fitted to that"
            remedy = "let the model return its scores in place of what is read off them"
            raise PreconditionError(where(node), reason, remedy)
        if not shape(node) or axes.of(node)[0] not in starts:
            reason = f"the first dimension of output {spec.name!r} is not the batch"
            remedy = "let the model return one row for each sample"
            raise PreconditionError(where(node), reason, remedy)
        found[spec.name] = node
    return found


def _scored(answers: dict[str, Node], score: str) -> str:
    """Return the first output that can be scored."""
    several = (
        name
        for name, node in answers.items()
        if score == SATURATION or (len(shape(node)) > 1 and _is_several(shape(node)[-1]))
    )
    found = next(several, None)
    if found is None:
        reason = f"no output gives scores of classes ({', '.join(answers)})"
        raise PreconditionError("model", reason, "let the model return the scores of its classes")
    return found


def _is_several(size: object) -> bool:
    return isinstance(size, int) and size > 1


def _last_position(program: Program, output: Node) -> int | None:
    """Return the dimension of tokens of an output whose last token counts alone: if causal."""
    axis = _axis_of(program, output)
    if axis is None or not looks_back(program, axis):
        return None
    return next(iter(axis.tokens.on(output)))


# --- what is read


def _axis_of(program: Program, node: Node) -> TokenAxis | None:
    return next((axis for axis in program.get(find_tokens) if axis.tokens.on(node)), None)


def _stream(program: Program, cut: Cut, batch: Dim) -> Stream:
    """Find samples and channels of the value at a cut."""
    dims = program.get(find_axes).of(cut.node)
    samples = [place for place, dim in enumerate(dims) if dim == batch]
    channels = shape(cut.node)[-1]
    if len(samples) != 1 or samples[0] == len(dims) - 1 or not isinstance(channels, int):
        reason = "the value behind the block is not laid out as samples, tokens and channels"
        raise PreconditionError(where(cut.node), reason, _FEWER)
    return Stream(cut, samples[0])


def _reads(
    program: Program,
    asked: Asked,
    streams: Sequence[Stream],
    tail: Sequence[Node],
    answers: dict[str, Node],
) -> Reads:
    """Choose between a lens and a ridge head, and what that reads."""
    wide = [name for name, node in answers.items() if _is_wide(program, node)]
    if asked.head == "lens" or (asked.head == "auto" and asked.pool == "auto" and wide):
        return Reads()
    if wide:
        reason = f"output {wide[0]!r} has tokens: a ridge head gives one answer a sample"
        raise PreconditionError(where(answers[wide[0]]), reason, "use head=lens")
    if asked.pool != "auto":
        return POOLS[asked.pool]
    return reads_of(program, streams, tail)


def _is_wide(program: Program, output: Node) -> bool:
    """Tell whether an output has tokens, or another size that is free."""
    free = any(not isinstance(size, int) for size in shape(output)[1:])
    return free or _axis_of(program, output) is not None


def _check_shape(stream: Stream, last: Stream, reads: Reads) -> None:
    """Raise PreconditionError where a head cannot read a stream as the last one is read."""
    here = shape(stream.node)
    if reads.is_lens and not same_sizes(here, shape(last.node)):
        reason = "a lens maps to the value behind the last block, which has another shape"
        remedy = "use head=ridge; or reduce tokens behind exit-early, not ahead of it"
        raise PreconditionError(where(stream.node), reason, remedy)
    if reads.places and len(stream.tokens) != 1:
        reason = "tokens cannot be picked where they are laid out as a grid"
        raise PreconditionError(where(stream.node), reason, "use pool=mean")


def _check_tail(program: Program, first: Stream, last: Stream, tail: Sequence[Node]) -> None:
    """Raise PreconditionError where outputs do not follow from the last stream alone."""
    if any(node.target is SDPA for node in tail):
        reason = "a lens maps to the value behind the last block, where there is no cut"
        raise PreconditionError(where(last.node), reason, "use head=ridge")
    later = set(behind(program, first.node)) - {last.node, *tail}
    for node in tail:
        if any(arg in later and is_tensor(arg) for arg in node.all_input_nodes):
            reason = "a lens would run all blocks: this reads the size of a value in one of them"
            raise PreconditionError(where(node), reason, "use head=ridge")


def _check_alike(streams: Sequence[Stream], reads: Reads) -> None:
    """Raise PreconditionError where the features of one exit cannot be compared with the next's."""
    for stream in streams[1:]:
        if stream.channels != streams[0].channels or (reads.is_lens and stream.samples):
            reason = "saturation compares streams of one width, with samples first"
            raise PreconditionError(where(stream.node), reason, "use another score")
