"""A whole forward of the transformer as one CUDA graph: launched at once, with the host out of the way.

A graph reads and writes fixed memory. Inputs are copied into static buffers before a replay: latents and timestep at
every step, texts and history, whose buffers all stages share, only when they have changed. It reads the rest (weights,
rotary table, t = 0 rows) where it lies. The transformer drops all graphs when its weights move.

One graph serves one text and inputs of the same shapes and frame indices, that is one stage in one layout. Prompt and
negative prompt take turns in every step, so each has a number, and by it buffers and graphs of its own: neither is
copied over the other. NCCL's collectives are captured with the rest, so all ranks must capture and replay in step. Only
shapes and numbers decide, because they are the same on all ranks. Nothing here but `CudaCapture` needs a GPU.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from helios_cp.model.conditions import HistoryCondition, TextCondition
from helios_cp.model.transformer import HeliosTransformer

MOST_CAPTURED = 24
"""Graphs kept at a time: four sizes of three stages, guided. The next one frees all of them."""
WARM_UPS = 2

Input = Tensor | TextCondition | HistoryCondition

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""`function -> (replay, output)`: replaying computes `function` again, on what its inputs hold then, into `output`."""


class CudaCapture:
    """Captures on a stream of its own, into memory that all graphs share: never two of them run at a time."""

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream(device)
            # Held here too: when the last graph is gone, the allocator would refuse the pool to the next.
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
    """Python collects no garbage inside: to collect a graph or a kernel of Triton would break a capture."""
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_collecting:
            gc.enable()


class StaticInput:
    """Fixed memory for a tensor or condition of certain shapes, and which condition was last copied there."""

    def __init__(self, value: Input) -> None:
        empty = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
        self.value: Input = empty(value) if isinstance(value, Tensor) else value.map(empty)
        self._content: object | None = None

    def fill(self, value: Input) -> None:
        """Copy, unless this very condition is in place already. Conditions are never changed, tensors are."""
        if isinstance(value, Tensor):
            self.value.copy_(value)
            return
        if value.token is self._content:
            return
        self._content = None
        for target, source in zip(self.value.tensors, value.tensors, strict=True):
            target.copy_(source)
        self._content = value.token


@dataclass(frozen=True)
class CapturedForward:
    """A graph, and all memory that it reads outside of its own: while it lives, none of it may be given to others."""

    replay: Callable[[], None]
    output: Tensor
    inputs: tuple[StaticInput, ...]
    reads: tuple[Tensor, ...]


class GraphedForward:
    """Stands in for `HeliosTransformer.forward`: captures it once for each kind of inputs, and replays it from then on.

    At most `most` graphs are kept; the next one takes the place of all.
    """

    def __init__(self, transformer: HeliosTransformer, capture: Capture, most: int = MOST_CAPTURED) -> None:
        self.transformer = transformer
        self.forward = transformer.forward
        self.capture = capture
        self.most = most
        self.captured: dict[Hashable, CapturedForward] = {}
        self._inputs: dict[Hashable, StaticInput] = {}
        transformer.on_changed_weights.append(self.drop)

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
        kinds = tuple((place, *_kind(value)) for place, value in enumerate(values))
        key = kinds, frame_indices
        if key not in self.captured and len(self.captured) >= self.most:
            self.drop()
        inputs = tuple(self._input(kind, value) for kind, value in zip(kinds, values, strict=True))
        for static, value in zip(inputs, values, strict=True):
            static.fill(value)
        if key not in self.captured:
            arguments = [static.value for static in inputs] + [None] * (4 - len(inputs))
            reads = tuple(self.transformer.reads_besides(latents, frame_indices))
            replay, output = self.capture(lambda: self.forward(*arguments, frame_indices))
            self.captured[key] = CapturedForward(replay, output, inputs, reads)
        found = self.captured[key]
        found.replay()
        return found.output.clone()

    def drop(self) -> None:
        """Forget all graphs and buffers, as when weights go elsewhere.

        None goes alone: with it PyTorch frees the workspace of matrix products of the stream that all were captured on,
        and the others would go on writing there (pytorch/pytorch issue 193402).
        """
        self.captured.clear()
        self._inputs.clear()

    def _input(self, kind: Hashable, value: Input) -> StaticInput:
        if kind not in self._inputs:
            self._inputs[kind] = StaticInput(value)
        return self._inputs[kind]


def capture_forwards(transformer: HeliosTransformer, device: torch.device) -> None:
    """Have a transformer replay its forwards as CUDA graphs."""
    transformer.forward = GraphedForward(transformer, CudaCapture(device))


def _kind(value: Input) -> tuple[Hashable, ...]:
    """What two inputs must share to have one buffer: shape, dtype and device, and all that is no tensor.

    Pairs of keys and values are alike in all blocks, so the first pair stands for them.
    """
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, TextCondition):
        return "text", value.number, len(value.keys_values), _kind(value.keys_values[0][0])
    return "history", value.lengths, _kind(value.tokens), _kind(value.rotary)
