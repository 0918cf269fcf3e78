"""Unit: when chunks are decoded, on streams that are simulated; and GPU: on real ones. Nothing here has a tolerance.

The simulated streams run as late as they can and the side stream goes first wherever it may, so that work which does
not wait for what it needs reads `NaN`. `test_without_waiting_for_the_latents` shows that.
"""

from __future__ import annotations

import math
from collections import deque
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from helios_cp.config.execution import Execution
from helios_cp.config.request import Request
from helios_cp.device.memory import allocated_memory, peak_memory, reset_peak_memory
from helios_cp.device.streams import Pace, SideStream
from helios_cp.device.timing import Span, Times
from helios_cp.generate.background import HostCopies
from helios_cp.pipeline import pipeline as pipeline_module
from helios_cp.pipeline.chunk import Chunk
from helios_cp.pipeline.decoding import MARGIN, AtOnce, Beside, Denoised, with_frames
from helios_cp.pipeline.parallelize import SplitCodec
from helios_cp.pipeline.pipeline import Pipeline
from helios_cp.plan.card_memory import expected_bytes
from helios_cp.sampling.denoise import Step
from helios_cp.sampling.state import ChunkState

CPU = torch.device("cpu")
STEPS = 3


class Streams:
    """A main and a side stream: work is queued, and run when somebody waits for a mark, the side first."""

    def __init__(self) -> None:
        self.queues = {"main": deque(), "side": deque()}
        self.current = "main"
        self.log: list[str] = []

    def put(self, work) -> None:
        self.queues[self.current].append(work)

    def run(self, name: str) -> bool:
        """The next piece of work of a stream, if there is one that waits for nothing."""
        queue = self.queues[name]
        if not queue or (isinstance(queue[0], FakeMark) and not queue[0].is_reached):
            return False
        work = queue.popleft()
        if not isinstance(work, FakeMark):
            work()
        return True

    def run_all(self, name: str) -> None:
        while self.run(name):
            pass


class FakeMark:
    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self.is_reached = False
        streams.put(self.reach)

    def reach(self) -> None:
        self.is_reached = True

    def query(self) -> bool:
        self.streams.log.append("ask")
        return self.is_reached

    def synchronize(self) -> None:
        self.streams.log.append("wait")
        while not self.is_reached:
            assert self.streams.run("side") or self.streams.run("main"), "waits for ever"

    def elapsed_time(self, end: FakeMark) -> float:
        assert self.is_reached and end.is_reached
        return 250.0


class FakeSide:
    """In place of `SideStream`; `waits` off leaves out the wait for the mark."""

    def __init__(self, streams: Streams, waits: bool = True) -> None:
        self.streams = streams
        self.waits = waits

    def mark(self) -> FakeMark:
        return FakeMark(self.streams)

    @contextmanager
    def after(self, mark, *_):
        if self.waits and mark is not None:
            self.streams.queues["side"].append(mark)
        self.streams.current = "side"
        try:
            yield
        finally:
            self.streams.current = "main"

    def to_host(self, tensor):
        host = torch.full_like(tensor, math.nan)
        self.streams.put(lambda: host.copy_(tensor))
        return host


def make_chunk(index: int, latents: torch.Tensor) -> Chunk:
    empty = torch.empty(0)
    return Chunk(index, latents, None, ChunkState(index + 1, empty, None, empty), {})


def make_events(streams: Streams, chunks: int, fail_at: tuple[int, int] | None = None):
    """Steps and chunks whose latents become their number + 1 when the main stream gets there."""
    for index in range(chunks):
        latents, begin = torch.full((2,), math.nan), FakeMark(streams)
        for step in range(STEPS):
            if (index, step) == fail_at:
                raise RuntimeError("the lens broke")
            streams.put(lambda latents=latents, index=index, step=step: latents.fill_(index + (step + 1) / STEPS))
            streams.log.append(f"step {index}.{step}")
            yield Step(index, 0, 1, step + 1, STEPS)
        yield Denoised(make_chunk(index, latents), Times((Span("denoise_1", begin, FakeMark(streams), ()),)))


def make_decode(streams: Streams, fail: int | None = None):
    """Ten times the latents, put into the current stream."""
    count = -1

    def decode(latents):
        nonlocal count
        count += 1
        streams.log.append(f"decode {count} on {streams.current}")
        if count == fail:
            raise RuntimeError("out of memory")
        frames = torch.full_like(latents, math.nan)
        streams.put(lambda: torch.mul(latents, 10, out=frames))
        return frames

    return decode


def make_beside(streams: Streams, **options) -> Beside:
    return Beside(make_decode(streams, **options), FakeSide(streams))


def drain(streams: Streams, chunks, found: list | None = None) -> list[float]:
    """The frames' values as chunks come; logs when."""
    found = [] if found is None else found
    for chunk in chunks:
        streams.log.append(f"chunk {chunk.index}")
        found.append(chunk.frames[0].item())
    return found


def test_a_chunk_is_decoded_behind_the_first_step_of_the_next():
    """And comes between two later steps, once it is there; the last one is waited for."""
    streams = Streams()
    beside = make_beside(streams)
    on_step = lambda step: (streams.run_all("main"), streams.run_all("side"))  # noqa: E731 - the device works
    assert drain(streams, with_frames(make_events(streams, 3), beside, on_step)) == [10, 20, 30]
    assert streams.log == [
        *("step 0.0", "step 0.1", "step 0.2"),
        *("step 1.0", "decode 0 on side", "step 1.1", "ask", "chunk 0", "step 1.2"),
        *("step 2.0", "decode 1 on side", "step 2.1", "ask", "chunk 1", "step 2.2"),
        *("decode 2 on side", "wait", "chunk 2"),
    ]


def test_a_slow_decoder_is_waited_for_with_one_chunk_on_its_way():
    """Nothing runs until it is waited for: a chunk then comes when the next is denoised, not earlier, not later."""
    streams = Streams()
    assert drain(streams, with_frames(make_events(streams, 3), make_beside(streams))) == [10, 20, 30]
    assert streams.log[3:] == [
        *("step 1.0", "decode 0 on side", "step 1.1", "ask", "step 1.2", "ask", "wait", "chunk 0"),
        *("step 2.0", "decode 1 on side", "step 2.1", "ask", "step 2.2", "ask", "wait", "chunk 1"),
        *("decode 2 on side", "wait", "chunk 2"),
    ]
    assert not any(streams.queues.values())


def test_without_waiting_for_the_latents():
    """Were the side stream not to wait for the mark, it would decode what is not there yet; so the tests can fail."""
    streams = Streams()
    beside = Beside(make_decode(streams), FakeSide(streams, waits=False))
    events = make_events(streams, 3)
    untimed = (replace(event, times=Times(())) if isinstance(event, Denoised) else event for event in events)
    assert any(math.isnan(value) for value in drain(streams, with_frames(untimed, beside)))
    streams = Streams()
    beside = Beside(make_decode(streams), FakeSide(streams, waits=False))
    with pytest.raises(AssertionError):  # a time is read before the device is there
        drain(streams, with_frames(make_events(streams, 3), beside))


def test_seconds_are_those_of_the_chunks_own_decoding():
    streams = Streams()
    chunks = list(with_frames(make_events(streams, 2), make_beside(streams)))
    assert [chunk.seconds for chunk in chunks] == [{"denoise_1": 0.25, "decode": 0.25}] * 2


def test_a_chunk_comes_before_the_error_of_the_next():
    streams, found = Streams(), []
    with pytest.raises(RuntimeError, match="lens"):
        drain(streams, with_frames(make_events(streams, 3, fail_at=(2, 1)), make_beside(streams)), found)
    assert found == [10, 20]
    assert streams.log[-3:] == ["decode 1 on side", "wait", "chunk 1"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_chunk_comes_before_a_stop_in_a_step(error):
    def on_step(step):
        if step.chunk == 1:
            raise error

    streams, found = Streams(), []
    with pytest.raises(error):
        drain(streams, with_frames(make_events(streams, 3), make_beside(streams), on_step), found)
    assert found == [10]


def test_a_failing_decoder_is_told_once():
    """Chunk 1 fails while chunk 2 is denoised: chunk 0 has come, nothing is decoded again, nothing comes after."""
    streams, found = Streams(), []
    with pytest.raises(RuntimeError, match="out of memory"):
        drain(streams, with_frames(make_events(streams, 4), make_beside(streams, fail=1)), found)
    assert found == [10] and streams.log[-1] == "decode 1 on side"


def test_the_first_error_is_told_where_decoding_fails_too():
    streams = Streams()
    with pytest.raises(RuntimeError, match="lens"):
        drain(streams, with_frames(make_events(streams, 2, fail_at=(1, 0)), make_beside(streams, fail=0)))


def test_closing_early_decodes_nothing_more():
    streams = Streams()
    chunks = with_frames(make_events(streams, 3), make_beside(streams))
    assert next(chunks).index == 0
    chunks.close()
    assert [line for line in streams.log if line.startswith("decode")] == ["decode 0 on side"]


def test_at_once_decodes_in_turn():
    streams = Streams()
    at_once = AtOnce(lambda latents: streams.log.append("decode") or latents * 10, CPU)
    events = (Denoised(make_chunk(index, torch.ones(2)), Times(())) for index in range(2))
    assert drain(streams, with_frames(events, at_once)) == [10, 10]
    assert streams.log == ["decode", "chunk 0", "decode", "chunk 1"]


@pytest.mark.parametrize("keep_on_device", [False, True])
def test_in_turn_frames_are_copied_without_a_stop_and_waited_for_once(monkeypatch, keep_on_device):
    """Through `to_host`, which takes pinned memory; unless they stay. All of the chunk is there when it comes."""
    log = []
    monkeypatch.setattr("helios_cp.pipeline.decoding.to_host", lambda frames: log.append("copy") or frames + 1)
    monkeypatch.setattr("helios_cp.pipeline.decoding.wait_for", lambda device: log.append("wait"))
    at_once = AtOnce(lambda latents: log.append("decode") or latents * 10, CPU, keep_on_device=keep_on_device)
    chunk = at_once.hand_in(Denoised(make_chunk(0, torch.ones(2)), Times(())))
    assert log == (["decode", "wait"] if keep_on_device else ["decode", "copy", "wait"])
    assert chunk.frames[0] == (10 if keep_on_device else 11) and chunk.seconds.keys() == {"decode"}
    assert AtOnce(None, CPU).hand_in(Denoised(make_chunk(0, torch.ones(2)), Times(()))).seconds == {}


def test_a_rank_without_frames_waits_for_none():
    """It goes on with its steps while other ranks decode, and its chunks come when the device is past them."""
    streams = Streams()
    beside = Beside(lambda latents: None, FakeSide(streams))
    chunks = list(with_frames(make_events(streams, 2), beside))
    assert [(chunk.index, chunk.frames) for chunk in chunks] == [(0, None), (1, None)]
    assert streams.log.count("wait") == 2 and "wait" not in streams.log[: streams.log.index("step 1.2")]


def test_a_chunk_is_copied_to_the_host_beside_the_steps_of_the_next():
    """No work of the main stream is waited for: there the next chunk's steps are queued by then."""
    streams = Streams()
    history, anchor, generators = torch.ones(1), torch.full((1,), 2.0), torch.zeros(1)
    chunk = Chunk(0, torch.full((1,), 3.0), torch.full((1,), 4.0), ChunkState(1, history, anchor, generators), {})
    streams.put(lambda: pytest.fail("a step of the next chunk was waited for"))
    copy = HostCopies(CPU, FakeSide(streams))(chunk)
    assert (copy.state.history, copy.state.anchor, copy.latents, copy.frames) == (1, 2, 3, 4)
    assert copy.latents is not chunk.latents and copy.state.generators is generators
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


class HostSide:
    """A side stream of a CPU: everything is done at once."""

    def mark(self):
        return SimpleNamespace(query=lambda: True, synchronize=lambda: None, elapsed_time=lambda _: 1.0)

    def after(self, *_):
        return nullcontext()

    def to_host(self, tensor):
        return tensor.clone()


@pytest.fixture(scope="module")
def distilled(presets) -> Pipeline:
    return Pipeline.from_pretrained(str(presets["tiny-distilled"]), dtype=torch.float32)


REQUEST = Request(
    prompt=("a fox",), height=64, width=64, num_frames=99, pyramid_num_inference_steps_list=(1, 1, 1), seed=(3,)
)


@pytest.fixture
def beside(distilled, monkeypatch) -> Pipeline:
    """The pipeline as on a device with streams."""
    monkeypatch.setattr(pipeline_module, "has_streams", lambda device: True)  # but not in `Pace`, which has no marks
    monkeypatch.setitem(vars(distilled), "_side", HostSide())
    return distilled


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
def test_the_same_video_either_way(distilled, beside, output_type):
    beside.decodes_beside = False
    in_turn, places = seen(distilled, output_type=output_type)
    assert places == [(0, 6), (1, 3), (2, 3)]  # the first chunk of a distilled model has twice the steps
    beside.decodes_beside = True
    chunks, places = seen(beside, output_type=output_type)
    assert places == [(1, 2), (2, 2), (2, 3)]
    assert len(chunks) == 3 and all(same(a, b) for a, b in zip(chunks, in_turn, strict=True))
    assert not torch.equal(chunks[0].frames, chunks[1].frames)
    rest = list(beside.stream(REQUEST, state=chunks[0].state, output_type=output_type))
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(rest, chunks[1:], strict=True))


def test_what_is_decoded_in_turn(beside, monkeypatch):
    """Latents alone, frames that stay on the device, and a VAE that is shared with other ranks; not one elsewhere."""
    assert isinstance(beside._decoding(REQUEST, "uint8", False), Beside)
    for arguments in (("latent", False), ("uint8", True)):
        assert isinstance(beside._decoding(REQUEST, *arguments), AtOnce)
    monkeypatch.setattr(beside, "codec", SplitCodec(beside.codec.vae, SimpleNamespace(size=2)))
    assert isinstance(beside._decoding(REQUEST, "uint8", False), AtOnce)
    for vae in (None, object()):
        monkeypatch.setattr(beside, "codec", SplitCodec(vae, SimpleNamespace(size=1)))
        assert isinstance(beside._decoding(REQUEST, "uint8", False), Beside)


def test_a_card_without_room_for_both_decodes_in_turn(beside, monkeypatch):
    """What is free once the weights are there is compared with what denoising and decoding need at a time."""
    request = REQUEST.resolve(beside.checkpoint)
    needed = expected_bytes(beside.checkpoint, request, beside.transformer, beside.codec.vae, beside.degrees)
    both = MARGIN * (needed["transformer"] + needed["decoder"])
    monkeypatch.setattr(beside, "decodes_beside", None)
    monkeypatch.setattr(beside, "device", torch.device("cuda"))
    for free, kind in ((both - 1, AtOnce), (both, Beside)):
        monkeypatch.setattr(pipeline_module, "free_memory", lambda device, free=free: free)
        assert isinstance(beside._decoding(request, "uint8", False), kind)
    larger = replace(REQUEST, height=128, width=128).resolve(beside.checkpoint)
    assert isinstance(beside._decoding(larger, "uint8", False), AtOnce)
    for told, kind in ((True, Beside), (False, AtOnce)):
        monkeypatch.setattr(beside, "decodes_beside", told)
        assert isinstance(beside._decoding(larger, "uint8", False), kind)


# On a card

needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def on_card(presets) -> Pipeline:
    return Pipeline.from_pretrained(str(presets["tiny-distilled"]), dtype=torch.float32, device="cuda")


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
    [("tiny-distilled", Execution()), ("tiny-distilled", Execution(cuda_graphs=True)), ("tiny-mid", Execution())],
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
def test_a_side_stream_waits_for_its_mark_and_not_for_more():
    device = torch.device("cuda")
    side = SideStream(device)
    latents = torch.zeros(1 << 20, device=device)
    with side.after(None, latents):  # loading kernels and allocating memory may wait for the whole card
        side.to_host(latents * 2)
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)
    latents += 1
    ready = side.mark()
    torch.cuda._sleep(2_000_000_000)  # a second or more
    with side.after(ready, latents):
        host = side.to_host(latents * 2)
        end = side.mark()
    end.synchronize()
    assert not torch.cuda.current_stream().query(), "the side stream waited for all of the current stream"
    assert (host == 2).all()


@pytest.mark.gpu
@needs_card
def test_memory_on_the_card_does_not_grow(on_card):
    """The peaks of 3 and of 12 chunks; 2 % for when exactly a chunk's memory is given back."""
    peaks = []
    for chunks in (3, 12):
        reset_peak_memory(on_card.device)
        for _ in on_card.stream(replace(REQUEST, num_frames=33 * chunks)):
            pass
        peaks.append(peak_memory(on_card.device))
    assert peaks[1] <= 1.02 * peaks[0]
    assert allocated_memory(on_card.device) < peaks[0]
