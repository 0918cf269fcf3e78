"""Unit: when chunks are decoded, in a real thread on the CPU; and GPU: on real streams. Nothing here has a tolerance.

Threads wait for events and for each other, never for a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from helios_cp.config.execution import Execution
from helios_cp.config.request import Request
from helios_cp.device.memory import MARGIN, allocated_memory, peak_memory, reset_peak_memory
from helios_cp.device.streams import Pace
from helios_cp.device.timing import Measured
from helios_cp.generate.background import HostCopies
from helios_cp.pipeline import pipeline as pipeline_module
from helios_cp.pipeline.decoding import Chunk, Denoised, Room, add_frames, with_frames
from helios_cp.pipeline.parallelize import SplitCodec
from helios_cp.pipeline.pipeline import Pipeline
from helios_cp.sampling.denoise import Step
from helios_cp.sampling.state import ChunkState

CPU = torch.device("cpu")
STEPS = 3
PATIENCE = 60.0
"""Seconds after which an event that does not come fails a test."""


class Mark:
    """Takes a quarter of a second from any mark to any other."""

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Mark) -> float:
        return 250.0


def make_chunk(index: int) -> Chunk:
    empty = torch.empty(0)
    return Chunk(index, torch.full((2,), index + 1.0), None, ChunkState(index + 1, empty, None, empty), {})


class Run:
    """The events of a run of `chunks`, what decodes them, and a log of what happens in which order.

    Chunk k is decoded once `may_decode[k]` is set, as it is from the start unless `is_held`.
    """

    def __init__(self, chunks: int, *, is_held: bool = False, fail_at: tuple[int, int] | None = None) -> None:
        self.chunks = chunks
        self.fail_at = fail_at
        self.log: list[str] = []
        self.may_decode = [threading.Event() for _ in range(chunks)]
        for event in () if is_held else self.may_decode:
            event.set()

    def events(self) -> Iterator[Step | Denoised]:
        for index in range(self.chunks):
            for step in range(STEPS):
                if (index, step) == self.fail_at:
                    raise RuntimeError("the lens broke")
                self.log.append(f"step {index}.{step}")
                yield Step(index, 0, 1, step + 1, STEPS)
            yield Denoised(make_chunk(index), (Measured("denoise_1", Mark(), Mark()),), Mark())

    def decoder(self, fail: int | None = None) -> Callable[[Denoised], Chunk]:
        """Ten times the latents."""

        def decode(latents: torch.Tensor) -> torch.Tensor:
            index = int(latents[0]) - 1
            assert self.may_decode[index].wait(PATIENCE)
            where = "beside" if threading.current_thread().name.startswith("decoder") else "in turn"
            assert not torch.is_grad_enabled()
            self.log.append(f"decode {index} {where}")
            if index == fail:
                raise RuntimeError("out of memory")
            return latents * 10

        return partial(add_frames, decode=decode, device=CPU)

    def chunk_values(self, chunks: Iterator[Chunk], found: list[float] | None = None) -> list[float]:
        """The frames' values as chunks come; logs when."""
        found = [] if found is None else found
        for chunk in chunks:
            self.log.append(f"chunk {chunk.index}")
            found.append(chunk.frames[0].item())
        return found

    def make(self, found: list[float] | None = None, *, fail: int | None = None, on_step=None) -> list[float]:
        with torch.no_grad():
            return self.chunk_values(with_frames(self.events(), self.decoder(fail), lambda: True, on_step), found)


def test_a_chunk_comes_between_two_steps_of_the_next():
    """As soon as it is there: chunk 1 here has as many steps as it takes until chunk 0 has come."""
    run = Run(2, is_held=True)
    run.may_decode[1].set()

    def events() -> Iterator[Step | Denoised]:
        for event in run.events():
            yield event
            if isinstance(event, Step) and (event.chunk, event.index) == (1, 1):
                run.may_decode[0].set()
                while "chunk 0" not in run.log:
                    yield event

    assert run.chunk_values(with_frames(events(), run.decoder(), lambda: True)) == [10, 20]
    assert run.log == [
        *("step 0.0", "step 0.1", "step 0.2"),
        *("step 1.0", "decode 0 beside", "chunk 0", "step 1.1", "step 1.2"),
        *("decode 1 beside", "chunk 1"),
    ]


def test_a_slow_decoder_is_waited_for_with_one_chunk_on_its_way():
    """A chunk then comes when the next is denoised, and before that is decoded."""
    run = Run(3, is_held=True)

    def events() -> Iterator[Step | Denoised]:
        for event in run.events():
            if isinstance(event, Denoised):
                for each in run.may_decode[: event.chunk.index]:
                    each.set()
            yield event
        run.may_decode[-1].set()

    assert run.chunk_values(with_frames(events(), run.decoder(), lambda: True)) == [10, 20, 30]
    assert run.log[3:] == [
        *("step 1.0", "step 1.1", "step 1.2", "decode 0 beside", "chunk 0"),
        *("step 2.0", "step 2.1", "step 2.2", "decode 1 beside", "chunk 1"),
        *("decode 2 beside", "chunk 2"),
    ]


def test_in_turn():
    run = Run(2)
    assert run.chunk_values(with_frames(run.events(), run.decoder(), lambda: False)) == [10, 20]
    assert run.log == [
        *("step 0.0", "step 0.1", "step 0.2", "decode 0 in turn", "chunk 0"),
        *("step 1.0", "step 1.1", "step 1.2", "decode 1 in turn", "chunk 1"),
    ]


def test_seconds_are_those_of_the_chunk():
    run = Run(2)
    chunks = list(with_frames(run.events(), run.decoder(), lambda: True))
    assert all(chunk.seconds.keys() == {"denoise_1", "decode"} for chunk in chunks)
    assert [chunk.seconds["denoise_1"] for chunk in chunks] == [0.25, 0.25]
    latents_alone = add_frames(Denoised(make_chunk(0), (), Mark()), None, CPU)
    assert latents_alone.frames is None and latents_alone.seconds == {}


def test_a_chunk_comes_before_the_error_of_the_next():
    run, found = Run(3, fail_at=(2, 1)), []
    with pytest.raises(RuntimeError, match="lens"):
        run.make(found)
    assert found == [10, 20]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_chunk_comes_before_a_stop_in_a_step(error):
    def on_step(step: Step) -> None:
        if step.chunk == 1:
            raise error

    run, found = Run(3), []
    with pytest.raises(error):
        run.make(found, on_step=on_step)
    assert found == [10]


def test_a_failing_decoder_is_told_once():
    """Chunk 1 fails while chunk 2 is denoised: chunk 0 has come, nothing is decoded again, nothing comes after."""
    run, found = Run(4), []
    with pytest.raises(RuntimeError, match="out of memory"):
        run.make(found, fail=1)
    assert found == [10] and [line for line in run.log if "decode" in line][1:] == ["decode 1 beside"]


def test_the_first_error_is_told_where_decoding_fails_too():
    with pytest.raises(RuntimeError, match="lens"):
        Run(2, fail_at=(1, 0)).make(fail=0)


def test_closing_early_decodes_nothing_more_and_leaves_no_thread():
    run = Run(3)
    chunks = with_frames(run.events(), run.decoder(), lambda: True)
    assert next(chunks).index == 0
    chunks.close()
    assert [line for line in run.log if "decode" in line] in (
        ["decode 0 beside"],
        ["decode 0 beside", "decode 1 beside"],  # it came only when chunk 1 was denoised
    )
    assert not any(thread.name.startswith("decoder") for thread in threading.enumerate())


def test_frames_are_copied_without_a_stop(monkeypatch):
    """Through `to_host`, which takes pinned memory. All of the chunk is there when it comes."""
    log = []
    mark = SimpleNamespace(synchronize=lambda: log.append("wait"))
    monkeypatch.setattr("helios_cp.pipeline.decoding.to_host", lambda frames: log.append("copy") or frames + 1)
    monkeypatch.setattr("helios_cp.pipeline.decoding.make_mark", lambda device: mark)
    chunk = add_frames(Denoised(make_chunk(0), (), Mark()), lambda it: log.append("decode") or it * 10, CPU)
    assert log == ["decode", "copy", "wait"]
    assert chunk.frames[0] == 11


class Stream:
    """Logs what is waited for, and what runs on it."""

    def __init__(self, log: list[object]) -> None:
        self.log = log

    def __enter__(self) -> None:
        self.log.append("on the stream")

    def __exit__(self, *_: object) -> None:
        self.log.append("off the stream")

    def wait_event(self, event: object) -> None:
        self.log.append(event)


def test_the_stream_waits_for_the_latents_first():
    log, ready = [], Mark()
    add_frames(Denoised(make_chunk(0), (), ready), lambda it: log.append("decode") or it, CPU, Stream(log))
    assert log == ["on the stream", ready, "decode", "off the stream"]


def test_a_chunk_is_copied_to_the_host():
    history, anchor, generators = torch.ones(1), torch.full((1,), 2.0), torch.zeros(1)
    chunk = Chunk(0, torch.full((1,), 3.0), torch.full((1,), 4.0), ChunkState(1, history, anchor, generators), {})
    copy = HostCopies(CPU)(chunk)
    assert (copy.state.history, copy.state.anchor, copy.latents, copy.frames) == (1, 2, 3, 4)
    assert copy.state.generators is generators
    without = replace(chunk, frames=None, state=ChunkState(1, history, None, generators))
    assert HostCopies(CPU)(without).state.anchor is None


def test_the_host_is_one_step_ahead(monkeypatch):
    """Behind step n it waits for step n − 1; a device without streams is not asked."""
    log = []

    def make_mark(device):
        number = sum(line.startswith("mark") for line in log)
        log.append(f"mark {number}")
        return SimpleNamespace(synchronize=lambda: log.append(f"wait {number}"))

    monkeypatch.setattr("helios_cp.device.streams.mark", make_mark)
    pace = Pace(torch.device("cuda"))
    for _ in range(3):
        pace.step()
    assert log == ["mark 0", "mark 1", "wait 0", "mark 2", "wait 1"]
    Pace(CPU).step()
    assert len(log) == 5


# In a pipeline


@pytest.fixture(scope="module")
def distilled(presets) -> Pipeline:
    return Pipeline.from_pretrained(str(presets["random-distilled"]), dtype=torch.float32)


REQUEST = Request(
    prompt=("a fox",), height=64, width=64, num_frames=99, pyramid_num_inference_steps_list=(1, 1, 1), seed=(3,)
)


def seen(pipeline: Pipeline, **options) -> tuple[list[Chunk], list[tuple[int, int]]]:
    """The chunks, and the step before which each came."""
    steps, chunks, places = [], [], []
    for chunk in pipeline.stream(REQUEST, on_step=steps.append, **options):
        chunks.append(chunk)
        places.append((steps[-1].chunk, steps[-1].index))
    return chunks, places


def same(one: Chunk, other: Chunk) -> bool:
    return (
        one.index == other.index == one.state.index - 1
        and torch.equal(one.latents, other.latents)
        and torch.equal(one.frames, other.frames)
        and all(torch.equal(tensor, other.state.to_tensors()[name]) for name, tensor in one.state.to_tensors().items())
        and one.seconds.keys() == other.seconds.keys()
    )


@pytest.mark.parametrize("output_type", ["uint8", "float"])
def test_the_same_video_either_way(distilled, monkeypatch, output_type):
    monkeypatch.setattr(distilled, "decodes_beside", False)
    in_turn, places = seen(distilled, output_type=output_type)
    assert places == [(0, 6), (1, 3), (2, 3)]  # the first chunk of a distilled model has twice the steps
    distilled.decodes_beside = True
    chunks, places = seen(distilled, output_type=output_type)
    assert [chunk for chunk, _ in places] == [1, 2, 2]
    assert len(chunks) == 3 and all(same(a, b) for a, b in zip(chunks, in_turn, strict=True))
    assert not torch.equal(chunks[0].frames, chunks[1].frames)
    rest = list(distilled.stream(REQUEST, state=chunks[0].state, output_type=output_type))
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(rest, chunks[1:], strict=True))


@pytest.fixture
def decoded(distilled, monkeypatch) -> Callable[..., list[str]]:
    """Makes a video of three chunks and tells where each was decoded; `None` in place of frames takes no time."""
    places = []

    def decode(latents, output_type):
        places.append("beside" if threading.current_thread().name.startswith("decoder") else "in turn")

    def run(request: Request = REQUEST, **options) -> list[str]:
        places.clear()
        monkeypatch.setattr(distilled.codec, "decode", decode)
        list(distilled.stream(request, **options))
        return list(places)

    return run


def test_what_is_decoded_in_turn(distilled, decoded, monkeypatch):
    """A VAE that is shared with other ranks, and one whose weights are offloaded."""
    monkeypatch.setattr(distilled, "decodes_beside", True)
    assert decoded() == ["beside"] * 3
    assert decoded(output_type="latent") == []
    with monkeypatch.context() as patch:
        patch.setattr(distilled, "card", SimpleNamespace(expect=lambda _: None, measured=dict))
        assert decoded() == ["in turn"] * 3
    for vae, ranks, place in ((distilled.codec.vae, 2, "in turn"), (object(), 1, "beside"), (None, 2, "beside")):
        with monkeypatch.context() as patch:
            patch.setattr(distilled, "codec", SplitCodec(vae, SimpleNamespace(size=ranks)))
            assert decoded() == [place] * 3, (vae, ranks)


def test_a_device_without_streams_decodes_in_turn(decoded):
    assert decoded() == ["in turn"] * 3


class Meter:
    """A card on which denoising needs 60 bytes and decoding 40, and `free` are free; counts measurements."""

    def __init__(self) -> None:
        self.measured = 0
        self.room = 0

    def begin(self) -> None:
        self.measured += 1

    def needed(self) -> int:
        return 60 if self.measured % 2 else 40

    def free(self) -> int:
        return self.room


def test_what_a_chunk_needs_is_measured_on_the_first(distilled, decoded, monkeypatch):
    """It is decoded in turn. The others are decoded beside, if both fit; and all of the next video of this size."""
    meter = Meter()
    monkeypatch.setattr(pipeline_module, "has_streams", lambda device: True)
    monkeypatch.setitem(vars(distilled), "_side", None)
    monkeypatch.setattr(distilled, "room", Room(meter))
    meter.room = MARGIN * 100
    assert decoded(output_type="latent") == [] and meter.measured == 0
    assert decoded() == ["in turn", "beside", "beside"] and meter.measured == 2
    assert decoded() == ["beside"] * 3 and meter.measured == 2
    meter.room = MARGIN * 100 - 1
    assert decoded() == ["in turn"] * 3 and meter.measured == 2
    meter.room = MARGIN * 100
    larger = replace(REQUEST, height=128, width=128, num_frames=66)
    assert decoded(larger) == ["in turn", "beside"] and meter.measured == 4
    for told, place in ((True, "beside"), (False, "in turn")):
        monkeypatch.setattr(distilled, "decodes_beside", told)
        assert decoded(replace(larger, width=64)) == [place] * 2 and meter.measured == 4


# On a card

needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def on_card(presets) -> Pipeline:
    return Pipeline.from_pretrained(str(presets["random-distilled"]), dtype=torch.float32, device="cuda")


@pytest.mark.gpu
@needs_card
def test_real_streams_give_the_same_bits(on_card):
    """Five times, as what a missing wait does is a matter of luck."""
    on_card.decodes_beside = False
    in_turn, _ = seen(on_card)
    on_card.decodes_beside = True
    for _ in range(5):
        chunks, places = seen(on_card)
        assert [chunk for chunk, _ in places] == [1, 2, 2]
        assert all(same(a, b) for a, b in zip(chunks, in_turn, strict=True))
        assert all(chunk.frames.is_pinned() and chunk.latents.is_cuda for chunk in chunks)


@pytest.mark.gpu
@needs_card
def test_frames_that_are_decoded_in_turn_come_through_pinned_memory(on_card):
    on_card.decodes_beside = False
    chunks, _ = seen(on_card)
    on_card.decodes_beside = None
    assert all(chunk.frames.is_pinned() and chunk.seconds["decode"] > 0 for chunk in chunks)


@pytest.mark.gpu
@needs_card
@pytest.mark.parametrize(
    ("name", "execution"),
    [("random-distilled", Execution()), ("random-distilled", Execution(cuda_graphs=True)), ("random-mid", Execution())],
    ids=["distilled", "graphs", "guided"],
)
def test_the_host_stops_at_no_step(presets, name, execution):
    """Two whole chunks after the first, all their steps and stages, their decoding, and their way to the host."""
    pipeline = Pipeline.from_pretrained(str(presets[name]), dtype=torch.float32, device="cuda", execution=execution)
    request = replace(REQUEST, pyramid_num_inference_steps_list=(3, 1, 1))
    list(pipeline.stream(request))  # fills tables and pinned memory, captures graphs
    chunks = pipeline.stream(request)
    next(chunks)
    to_host = HostCopies(pipeline.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones(1, device="cuda").item()
        rest = [to_host(chunk) for chunk in chunks]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(rest) == 2 and all(chunk.latents.is_pinned() and min(chunk.seconds.values()) > 0 for chunk in rest)


@pytest.mark.gpu
@needs_card
def test_memory_on_the_card_does_not_grow(on_card):
    """The peaks of 3 and of 12 chunks; 2 % for when exactly a chunk's memory is given back."""
    peaks = []
    on_card.decodes_beside = True
    for chunks in (3, 12):
        reset_peak_memory(on_card.device)
        for _ in on_card.stream(replace(REQUEST, num_frames=33 * chunks)):
            pass
        peaks.append(peak_memory(on_card.device))
    assert peaks[1] <= 1.02 * peaks[0]
    assert allocated_memory(on_card.device) < peaks[0]


@pytest.mark.gpu
@needs_card
def test_both_take_what_was_measured(presets):
    """The first chunk tells what denoising and decoding need; together they take no more than that."""
    pipeline = Pipeline.from_pretrained(str(presets["random-distilled"]), dtype=torch.float32, device="cuda")
    list(pipeline.stream(REQUEST))
    ((size, needed),) = pipeline.room._needed.items()
    assert min(needed.values()) > 0 and pipeline.room.has_both(size)
    held = allocated_memory(pipeline.device)
    reset_peak_memory(pipeline.device)
    _, places = seen(pipeline)
    assert [chunk for chunk, _ in places] == [1, 2, 2]
    assert peak_memory(pipeline.device) - held <= MARGIN * sum(needed.values())
    assert pipeline.peak_bytes >= peak_memory(pipeline.device)
