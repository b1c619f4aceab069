"""Running a TensorRT plan on numpy arrays: memory of the device, one stream, CUDA graphs.

Free of torch: memory and streams come from CUDA's driver, see `effopt.backends.cuda_driver`. The
API is that which `tensorrt` 10.x and 11.x and TensorRT-RTX 1.7 share. Checked against stand-ins for
both libraries; not run on a device.
"""

import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from effopt.backend import Array
from effopt.backends.cuda_driver import Buffer, Device, Graph, Pinned, Stream, device
from effopt.backends.trt_load import DEFAULTS, Options, Plan, Shape, explain, open_plan
from effopt.errors import EffoptError, UsageError
from effopt.signature import Signature, TensorSpec

_RUNS = 2
"""Runs of a shape before it gets a graph: most shapes of a changing length never come again."""


class TrtRunner:
    """A plan on one GPU: flat arrays in and out, in the signature's order.

    `notes` say what was not done, and why, such as a CUDA graph that could not be captured. Calls
    from several threads take turns.
    """

    def __init__(
        self,
        plan: Path,
        signature: Signature,
        module_name: str,
        *,
        options: Options = DEFAULTS,
        gpu: Device | None = None,
    ) -> None:
        """Load the plan with a module such as "tensorrt", on the first GPU by default.

        Errors are those of `cuda_driver.device` and `trt_load.open_plan`.
        """
        self.notes: tuple[str, ...] = ()
        self._lanes: dict[tuple[Shape, ...], Lane] = {}
        self._seen = Counter[tuple[Shape, ...]]()
        self._graphs = options.graphs
        self._lock = threading.Lock()
        self._device = gpu or device()
        self._plan = open_plan(plan, signature, module_name, self._device, options)
        self._shared = Lane(self._plan, Stream(self._device))

    def run(self, inputs: list[Array]) -> list[Array]:
        """Run once; the arrays that are returned belong to the caller.

        Raises UsageError for a wrong number, type or size of inputs, MissingError where the GPU
        has not enough memory, VerificationError where the run fails.
        """
        shapes = _checked(self._plan.inputs, inputs)
        with self._lock:
            self._device.use()
            lane = self._lane(shapes)
            outputs = lane.run(inputs, shapes)
            if lane is not self._shared and lane.graph is None:
                self._capture(lane, shapes)
            return outputs

    def _lane(self, shapes: tuple[Shape, ...]) -> "Lane":
        """Return what runs these shapes: a lane of their own from the third time, if there is room.

        A graph holds the state of its execution context, which must not change afterwards: hence a
        context for each shape.
        """
        self._seen[shapes] += 1
        if shapes in self._lanes:
            return self._lanes[shapes]
        if len(self._lanes) >= self._graphs or self._seen[shapes] <= _RUNS:
            return self._shared
        try:
            made = Lane(self._plan, self._shared.stream)
            made.fit(shapes)
        except EffoptError as error:
            return self._without_graph(shapes, error)
        self._lanes[shapes] = made
        return made

    def _capture(self, lane: "Lane", shapes: tuple[Shape, ...]) -> None:
        """Capture a lane that has run once, as what a context does first cannot be captured."""
        try:
            lane.capture()
        except EffoptError as error:
            self._without_graph(shapes, error)

    def _without_graph(self, shapes: tuple[Shape, ...], error: EffoptError) -> "Lane":
        """Go on without graphs for further shapes, and note why."""
        self._lanes.pop(shapes, None)
        self._graphs = len(self._lanes)
        self.notes += (f"no CUDA graph for {[list(s) for s in shapes]}: {error.reason}",)
        return self._shared


class Lane:
    """An execution context with a stream, and memory of its own for inputs and outputs."""

    def __init__(self, plan: Plan, stream: Stream) -> None:
        """Make a context; MissingError where the GPU has no memory for it."""
        self.graph: Graph | None = None
        self._context = plan.engine.create_execution_context()
        if self._context is None:
            raise explain(plan.said, "no execution context can be made")
        self._plan, self.stream = plan, stream
        self._inputs = [Slot(stream.device, spec) for spec in plan.inputs]
        self._outputs = [Slot(stream.device, spec) for spec in plan.outputs]
        self._profile = 0
        self._shapes: tuple[Shape, ...] | None = None

    def run(self, inputs: Sequence[Array], shapes: tuple[Shape, ...]) -> list[Array]:
        """Copy inputs in, run, copy outputs out; wait for all of it."""
        self.fit(shapes)
        for slot, array in zip(self._inputs, inputs, strict=True):
            slot.host[...] = array
        if self.graph:
            self.graph.launch(self.stream)
        else:
            self._work()
        self.stream.synchronize()
        return [slot.host.copy() for slot in self._outputs]

    def capture(self) -> None:
        """Make a graph of a run on the shapes of the last one, unless it is too early for that.

        TensorRT-RTX compiles kernels for a shape while it runs on others, and says when it is done.
        """
        ready = getattr(self._context, "is_stream_capturable", None)
        if ready is None or ready(self.stream.handle):
            self.graph = self.stream.capture(self._work)

    def fit(self, shapes: tuple[Shape, ...]) -> None:
        """Tell the context the shapes of inputs, and where all tensors lie."""
        if shapes == self._shapes:
            return
        self._shapes = None  # until all of it has succeeded
        profile = self._plan.profile(shapes)
        if profile != self._profile:
            change = self._context.set_optimization_profile_async(profile, self.stream.handle)
            self._require(change, f"profile {profile} cannot be set")
            self._profile = profile
        for slot, shape in zip(self._inputs, shapes, strict=True):
            done = self._context.set_input_shape(slot.port, shape)
            self._require(done, f"the shape {list(shape)} of {slot.port} cannot be set")
            self._place(slot, shape)
        lacking = self._context.infer_shapes()
        self._require(not lacking, f"the sizes do not follow from the inputs: {lacking}")
        for slot in self._outputs:
            shape = tuple(self._context.get_tensor_shape(slot.port))
            self._require(min(shape, default=1) >= 0, f"the size of {slot.port} depends on values")
            self._place(slot, shape)
        self._shapes = shapes

    def _place(self, slot: "Slot", shape: Shape) -> None:
        slot.fit(shape)
        done = self._context.set_tensor_address(slot.port, slot.device.handle)
        self._require(done, f"the address of {slot.port} cannot be set")

    def _work(self) -> None:
        """Put one run into the stream, with its copies: all of it can be captured."""
        for slot in self._inputs:
            self.stream.upload(slot.device, slot.host)
        done = self._context.execute_async_v3(self.stream.handle)
        self._require(done, "the engine cannot run")
        for slot in self._outputs:
            self.stream.download(slot.host, slot.device)

    def _require(self, done: bool, what: str) -> None:
        if not done:
            raise explain(self._plan.said, what)


class Slot:
    """One tensor: memory of the device, and pinned memory as the array `host`; both only grow."""

    def __init__(self, gpu: Device, spec: TensorSpec) -> None:
        """Begin with memory for one element."""
        self.port, self._dtype, self._gpu = spec.port, np.dtype(spec.dtype), gpu
        self._take(self._dtype.itemsize)
        self.fit(())

    def fit(self, shape: Shape) -> None:
        """Make `host` an array of this shape; take more memory where there is too little.

        Nothing that runs may use the old memory.
        """
        size = int(np.prod(shape, dtype=np.int64)) * self._dtype.itemsize
        if size > self.device.size:
            # The new before the old is given back: where there is none, all stays as it is.
            self._take(size)
        self.host = self._pinned.array(shape, self._dtype)

    def _take(self, size: int) -> None:
        device, pinned = Buffer(self._gpu, size), Pinned(self._gpu, size)
        self.device, self._pinned = device, pinned


def _checked(specs: Sequence[TensorSpec], inputs: Sequence[Array]) -> tuple[Shape, ...]:
    """Return the shapes of inputs; UsageError for a wrong number or type of them."""
    if len(inputs) != len(specs):
        names = ", ".join(spec.name for spec in specs)
        raise UsageError(f"{len(inputs)} inputs were given", f"the inputs are: {names}")
    for spec, array in zip(specs, inputs, strict=True):
        if array.dtype.name != spec.dtype:
            reason = f"input {spec.name!r} must be {spec.dtype}, got {array.dtype.name}"
            raise UsageError(reason, f"convert it first, e.g. x.astype({spec.dtype!r})")
    return tuple(array.shape for array in inputs)
