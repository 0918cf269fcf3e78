"""A whole forward of the transformer as one CUDA graph: launched at once, with the host out of the way.

A graph reads and writes fixed memory. Inputs are copied into static buffers before it is replayed: latents and timestep
at every step; keys and values of a prompt, and the history with its rotary table, only when they are other ones than
those in the buffer. The buffers of equal shapes are shared, so that all pyramid stages have the texts and the history
once. What a forward reads besides (weights, rotary table, t = 0 rows) is read where it lies, and a graph is captured
anew when any of that lies elsewhere.

One graph serves inputs of the same shapes and frame indices, that is one stage in one layout, and one text: prompt and
negative prompt, which take turns in every step, have buffers and graphs of their own, so that neither is ever copied
over the other. Collectives of NCCL are captured with the rest, so all ranks capture and replay in step. Nothing here
but `CudaCapture` needs a GPU.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from helios_cp.model.transformer import HeliosTransformer, HistoryCondition, TextCondition

MOST_GRAPHS = 24
"""Kept at a time: four sizes of three stages, guided. What all of them hold is freed for the next."""
MOST_TEXTS = 2
"""In buffers of equal shapes: the prompt and the negative prompt."""
WARM_UPS = 2

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""`function -> (replay, output)`: replaying computes `function` again, on what its inputs hold then, into `output`."""


class CudaCapture:
    """Captures on a stream of its own, into memory that all graphs share: never two of them run at a time."""

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream(device)
            # Held here, and not by the graphs alone: once the last of them is gone the allocator would refuse the next.
            self.memory = torch.cuda.MemPool()

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):  # compiles, chooses algorithms, connects ranks; none of it may be captured
                function()
        current.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's watchdog and a writer of frames, may go on calling CUDA meanwhile.
        capturing = torch.cuda.graph(graph, pool=self.memory.id, stream=self.stream, capture_error_mode="thread_local")
        with keeping_garbage(), capturing:
            output = function()
        return graph.replay, output


@contextmanager
def keeping_garbage() -> Iterator[None]:
    """Python collects none inside. Another graph, or a kernel of Triton, that went during a capture would spoil it."""
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_collecting:
            gc.enable()


class StaticInputs:
    """Fixed memory for one condition (or tensor) of certain shapes, and what was last copied there."""

    def __init__(self, value: Any) -> None:
        tensors, self._structure = _flatten(value)
        self.tensors = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
        self._content: weakref.ref | None = None
        self.last_used = 0

    @property
    def content(self) -> Any:
        """The condition that was last copied there, while somebody has it; `None` for tensors."""
        return None if self._content is None else self._content()

    @property
    def value(self) -> Any:
        """The same kind of thing as was given, made of the static tensors."""
        return _unflatten(self.tensors, self._structure)

    def fill(self, value: Any) -> None:
        """Copy, unless this very object is in place already. Conditions are never changed, tensors are."""
        if not isinstance(value, Tensor) and self.content is value:
            return
        for target, source in zip(self.tensors, _flatten(value)[0], strict=True):
            target.copy_(source)
        self._content = None if isinstance(value, Tensor) else weakref.ref(value)


@dataclass(frozen=True)
class CapturedForward:
    """A graph, and all memory that it reads outside of its own: while it lives, none of it may be given to others."""

    replay: Callable[[], None]
    output: Tensor
    inputs: tuple[StaticInputs, ...]
    reads: tuple[Tensor, ...]


class GraphedForward:
    """Stands in for `HeliosTransformer.forward`: captures it once for each kind of inputs, and replays it from then on.

    At most `most` graphs are kept; the next one takes the place of all.
    """

    def __init__(self, transformer: HeliosTransformer, capture: Capture, most: int = MOST_GRAPHS) -> None:
        self.transformer = transformer
        self.forward = transformer.forward
        self.capture = capture
        self.most = most
        self.captured: dict[Hashable, CapturedForward] = {}
        self._buffers: weakref.WeakValueDictionary[Hashable, StaticInputs] = weakref.WeakValueDictionary()
        self._clock = itertools.count(1)

    def __call__(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: TextCondition,
        history: HistoryCondition | None = None,
        frame_indices: tuple[int, ...] | None = None,
    ) -> Tensor:
        """As `HeliosTransformer.forward`; what is returned is the caller's to keep."""
        values = (latents, timestep, text) if history is None else (latents, timestep, text, history)
        reads = tuple(self.transformer.reads_besides(latents, frame_indices))
        kinds = tuple((place, *_kind(value)) for place, value in enumerate(values))
        kinds = tuple((*kind, self._number(kind, value)) for kind, value in zip(kinds, values, strict=True))
        key = (kinds, frame_indices, tuple(map(_address, reads)))
        found = self.captured.get(key)
        if found is None:
            self._make_room(kinds, frame_indices)
            inputs = tuple(self._buffer(kind, value) for kind, value in zip(kinds, values, strict=True))
        else:
            inputs = found.inputs
        for buffer, value in zip(inputs, values, strict=True):
            buffer.fill(value)
            buffer.last_used = next(self._clock)
        if found is None:
            static = [buffer.value for buffer in inputs]
            static += [None] * (4 - len(static))
            replay, output = self.capture(lambda: self.forward(*static, frame_indices))
            found = self.captured[key] = CapturedForward(replay, output, inputs, reads)
        found.replay()
        return found.output.clone()

    def _make_room(self, kinds: Hashable, frame_indices: tuple[int, ...] | None) -> None:
        """Drop all graphs where that of these inputs has its weights elsewhere now, or where there are too many.

        None goes alone: with it PyTorch frees the workspace of matrix products of the stream that all were captured on,
        and the others would go on writing there (pytorch/pytorch issue 193402).
        """
        is_stale = any(key[:2] == (kinds, frame_indices) for key in self.captured)
        if is_stale or len(self.captured) >= self.most:
            self.captured.clear()

    def _number(self, kind: tuple[Hashable, ...], value: Any) -> int:
        """Which of the buffers of a kind is for this value: that with it, one whose text is gone, or the oldest.

        Ranks let go of their texts in step, so all of them choose alike.
        """
        if not isinstance(value, TextCondition):
            return 0
        found = {number: self._buffers.get((*kind, number)) for number in range(MOST_TEXTS)}
        there = {number: buffer for number, buffer in found.items() if buffer is not None}
        for content in (value, None):
            for number, buffer in there.items():
                if buffer.content is content:
                    return number
        if len(there) < MOST_TEXTS:
            return next(number for number in found if number not in there)
        return min(there, key=lambda number: there[number].last_used)

    def _buffer(self, kind: Hashable, value: Any) -> StaticInputs:
        buffer = self._buffers.get(kind)
        if buffer is None:
            buffer = self._buffers[kind] = StaticInputs(value)
        return buffer


def capture_forwards(transformer: HeliosTransformer, device: torch.device) -> None:
    """Have a transformer replay its forwards as CUDA graphs."""
    transformer.forward = GraphedForward(transformer, CudaCapture(device))


def _flatten(value: Any) -> tuple[list[Tensor], Any]:
    """The tensors of a condition, and what puts others in their places; that holds no tensor itself."""
    if isinstance(value, Tensor):
        return [value], None
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    leaves, structure = tree_flatten(fields)
    rest = tuple(Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], (type(value), rest, structure)


def _unflatten(tensors: Iterable[Tensor], structure: Any) -> Any:
    supply = iter(tensors)
    if structure is None:
        return next(supply)
    kind, rest, tree = structure
    return kind(**tree_unflatten([next(supply) if leaf is Tensor else leaf for leaf in rest], tree))


def _address(tensor: Tensor) -> int:
    """Where a tensor lies; a tensor made of others, as a quantised one is, stays the same object where it stays."""
    return tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else id(tensor)


def _kind(value: Any) -> tuple[Hashable, ...]:
    """What two inputs must share to have one buffer: shapes, dtypes, devices, and all that is no tensor."""
    tensors, structure = _flatten(value)
    rest = None if structure is None else structure[:2]
    return (rest, tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors))
