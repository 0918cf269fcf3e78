"""Ray, the shared cluster: whole videos against one process without Ray.

Equality is exact wherever one rank denoises: the same code computes the same numbers, in other processes. Several ranks
are held to what `helios_cp` promises of them, which its own tests derive: 1e-4 of the output's range.
"""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import shutil
import signal
import sys
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file

from benchmarks.live import measures
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Adapter
from helios_cp.config.layout import Layout
from helios_cp.config.request import ScheduledPrompt
from helios_cp.generate.__main__ import main as generate
from helios_cp.generate.run_folder import Run, RunFolder
from launchers import status
from launchers.cluster.worker import Payload, Worker
from launchers.driver.pipeline import ChunkPipeline
from launchers.driver.status import NAMESPACE
from launchers.messages.arrays import Array
from launchers.schedule.terms import Limits
from launchers.workers import denoised_chunks
from parallel.mesh import Degrees
from tests.launchers.conftest import PATIENCE, frames_in, inside, runs_actor, small, wait_until, write_adapter

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def pipeline(cluster, model):
    limits = Limits(undelivered=2, active=3)
    with ChunkPipeline(model, groups=2, decoders=2, limits=limits, patience=PATIENCE) as pipeline:
        pipeline.wait_until_ready(PATIENCE)
        yield pipeline


def holds_nothing(pipeline: ChunkPipeline) -> bool:
    """Whether no actor keeps anything of a video any more. Actors take calls in turn, so all before have had effect."""
    groups = [worker for name, worker in pipeline.workers.items() if name.startswith("group")]
    kept = [found for group in groups for found in inside(group, "_kept")]
    return kept == [None] * len(kept)


def test_several_videos_are_those_of_one_process(pipeline, alone, tmp_path):
    requests = [small(seed=(seed,)) for seed in range(4)]
    handles = [
        pipeline.submit(request, output=[tmp_path / f"{index}.mp4"], keep_latents=True)
        for index, request in enumerate(requests)
    ]
    for index, (handle, request) in enumerate(zip(handles, requests, strict=True)):
        result = handle.result(timeout=PATIENCE)
        assert result.chunks == 3 and np.array_equal(result.latents, alone(request))
        assert frames_in(tmp_path / f"{index}.mp4") == 99
    assert {event.stage for event in list(pipeline.events)} == {"text", "denoise", "decode", "write"}


@pytest.mark.parametrize(("name", "unused"), [("group-0", {"torch._dynamo", "sympy"}), ("text", {"scipy", "torchao"})])
def test_a_worker_starts_without_what_it_does_not_use(pipeline, name, unused):
    """It would take as long to import as the rest."""
    (actor,) = pipeline.workers[name]._actors
    assert not unused & set(ray.get(actor.__ray_call__.remote(lambda _: list(sys.modules)), timeout=PATIENCE))


def test_chunks_of_a_stream(pipeline, alone):
    """A batch with a prompt each: latents and frames come in order, and the pipeline does not run far ahead.

    Frames of a chunk are matched to those before, wherever these were decoded.
    """
    request = small(prompt=("a fox", "an owl"), num_frames=5 * 33, match_seams=True)
    expected = list(alone.pipeline.stream(request))
    handle = pipeline.submit(request)
    for chunk, other in zip(handle, expected, strict=True):
        assert chunk.index == other.index
        assert np.array_equal(chunk.latents, other.latents.numpy())
        assert np.array_equal(chunk.frames, other.frames.numpy())
        made = sum(event.video == handle.key and event.stage == "denoise" for event in list(pipeline.events))
        assert made <= chunk.index + 2, "undelivered=2 holds the denoiser back"
    assert handle.result(PATIENCE).chunks == 5


def test_start_from_a_picture(pipeline, alone, astronaut, tmp_path):
    astronaut.save(tmp_path / "a.png")
    request = small(image=str(tmp_path / "a.png"), num_frames=66)
    result = pipeline.submit(request, decode=False, keep_latents=True).result(PATIENCE)
    assert np.array_equal(result.latents, alone(request))


def test_a_prompt_schedule(pipeline, alone):
    schedule = (ScheduledPrompt("a fox", 2), ScheduledPrompt("an owl", 2))
    request = small(prompt=(), prompt_schedule=schedule, interpolation_steps=2)
    result = pipeline.submit(request, decode=False, keep_latents=True).result(PATIENCE)
    assert np.array_equal(result.latents, alone(request))


def test_a_changed_prompt(pipeline, alone):
    """Against one process that is given the schedule that the change made."""
    request = small(num_frames=6 * 33)
    handle = pipeline.submit(request, decode=False)
    found = []
    for chunk in handle:
        found.append(chunk.latents.copy())
        if chunk.index == 0:
            changed = handle.change_prompt("an owl", transition=2).result(PATIENCE)
    assert 1 <= changed <= 3, "the first chunk was there already; two more may have been under way"
    found, expected = np.concatenate(found, axis=2), alone(request.with_change(changed, "an owl", 2))
    assert np.array_equal(found, expected)
    assert not np.array_equal(found[:, :, 9 * changed :], alone(request)[:, :, 9 * changed :]), "the prompt matters"
    with pytest.raises(RequestError, match="has ended"):
        handle.change_prompt("an owl").result(PATIENCE)


def test_cancel(pipeline, alone, tmp_path):
    """The finished chunks can be played, the video after it is not disturbed, and no process keeps anything of it."""
    request = small(num_frames=1000 * 33)
    handle = pipeline.submit(request, output=[tmp_path / "long.mp4"], stream=True)
    for chunk in handle:
        if chunk.index == 1:
            handle.cancel()
            break
    with pytest.raises(CancelledError):
        handle.result(timeout=PATIENCE)
    assert 2 * 33 <= frames_in(tmp_path / "long.mp4") <= 5 * 33
    assert not list(tmp_path.glob(".*")), "no partial file is left"
    assert holds_nothing(pipeline)
    result = pipeline.submit(small(), decode=False, keep_latents=True).result(PATIENCE)
    assert np.array_equal(result.latents, alone(small()))
    assert pipeline.status()["videos"] == {} and pipeline.status()["queue"]["in hand"] == 0


def test_videos_that_fail_end_alone(pipeline, alone, tmp_path):
    """One before any worker has it, as its picture is gone when its turn comes; one inside a worker, as its picture is
    none; one in the middle, as nobody wants its chunks. No process keeps anything of them."""
    (tmp_path / "bad.png").write_bytes(b"not a picture")

    def unwanted(chunk) -> None:
        raise BrokenPipeError(f"nobody takes chunk {chunk.index}")

    gone = pipeline.submit(small(image=str(tmp_path / "no.png")), decode=False)
    bad = pipeline.submit(small(image=str(tmp_path / "bad.png")), decode=False)
    stopped = pipeline.submit(small(num_frames=1000 * 33), output=[tmp_path / "a.mp4"], on_chunk=unwanted)
    good = pipeline.submit(small(), decode=False, keep_latents=True)
    with pytest.raises(FileNotFoundError):
        gone.result(PATIENCE)
    with pytest.raises(Exception, match=r"bad\.png"):
        bad.result(PATIENCE)
    with pytest.raises(BrokenPipeError, match="nobody takes chunk 0"):
        stopped.result(PATIENCE)
    assert np.array_equal(good.result(PATIENCE).latents, alone(small()))
    assert 33 <= frames_in(tmp_path / "a.mp4") <= 4 * 33 and not list(tmp_path.glob(".*"))
    assert holds_nothing(pipeline)


class WithoutTorch(pickle.Pickler):
    """Refuses whatever is of torch. Arrays may stay where they are, and references are names of what was looked at."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), protocol=5, buffer_callback=lambda buffer: None)
        self.dispatch_table = {**copyreg.dispatch_table, ray.ObjectRef: lambda reference: (str, (reference.hex(),))}

    def reducer_override(self, thing):
        assert not type(thing).__module__.startswith("torch"), thing
        return NotImplemented


def test_payloads_hold_no_torch_objects(pipeline, astronaut, model, tmp_path, monkeypatch):
    """Whatever goes to a worker and comes from it, over all stages and with a run folder."""
    seen, call = {}, Worker.call

    def looking(worker, method, arguments, **options):
        sent = [argument.value if isinstance(argument, Payload) else argument for argument in arguments]

        async def look():
            found = await answer
            seen[method] = sent, [payload.value for payload in found]
            return found

        answer = call(worker, method, arguments, **options)
        return look()

    monkeypatch.setattr(Worker, "call", looking)
    astronaut.save(tmp_path / "a.png")
    request = small(image=str(tmp_path / "a.png"), num_frames=33).resolve(pipeline.checkpoint)
    run = Run(request, model, "float32", (str(tmp_path / "a.mp4"),))
    folder = RunFolder.create(tmp_path / "run", run)
    handle = pipeline.submit(request, output=[tmp_path / "a.mp4"], folder=folder, stream=True)
    (chunk,) = handle
    wait_until(
        lambda: seen.keys() >= {"encode", "start", "denoise", "decode", "keep", "write"}
    )  # no video waits for "keep"
    for sent, values in list(seen.values()):
        WithoutTorch().dump((sent, values))
    with pytest.raises(AssertionError):
        WithoutTorch().dump([torch.zeros(1)])
    assert not chunk.latents.flags.writeable and not chunk.latents.flags.owndata, "a view of shared memory"
    assert not chunk.frames.flags.writeable and not chunk.frames.flags.owndata
    handle.result(PATIENCE)


def test_a_run_goes_on_with_what_was_denoised(pipeline, alone, model, tmp_path):
    """Of four chunks one is written and one more denoised: two are denoised, and the MP4 has all of them."""
    request = small(num_frames=4 * 33, match_seams=True).resolve(pipeline.checkpoint)
    with torch.no_grad():
        made = list(alone.pipeline.stream(request))
    folder = RunFolder.create(tmp_path / "run", Run(request, model, "float32", (str(tmp_path / "a.mp4"),)))
    whole = pipeline.submit(request, output=[tmp_path / "whole.mp4"], folder=folder, keep_latents=True)
    assert np.array_equal(whole.result(PATIENCE).latents, alone(request))
    assert not list(folder.path.glob("ahead-*"))
    part = RunFolder.create(tmp_path / "part", folder.run)
    part.commit(made[0], [(folder.path / "chunk-00000-0.mp4").read_bytes()])
    denoised_chunks.keep(part, 1, denoised_chunks.DenoisedChunk(made[1].latents, made[1].state))
    handle = pipeline.submit(request, output=[tmp_path / "a.mp4"], folder=part, keep_latents=True)
    assert np.array_equal(handle.result(PATIENCE).latents, alone(request)[:, :, 9:])
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    denoised = [event.chunk for event in list(pipeline.events) if (event.video, event.stage) == (handle.key, "denoise")]
    assert denoised == [2, 3]
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert part.count() == 4 and not list(part.path.glob("ahead-*"))


def test_a_changed_prompt_is_saved_with_its_chunk(pipeline, alone, model, tmp_path):
    """The video is stopped once a chunk of the transition is finished; the pipeline makes the rest of it from the
    folder, with the transition where it was. So does `helios_cp.generate`, without Ray, to the bytes of a video that
    was never stopped."""
    request = small(num_frames=6 * 33).resolve(pipeline.checkpoint)
    folder = RunFolder.create(tmp_path / "run", Run(request, model, "float32", (str(tmp_path / "a.mp4"),)))
    handle = pipeline.submit(request, output=[tmp_path / "a.mp4"], folder=folder, stream=True, allowed=1)
    stream = iter(handle)
    assert next(stream).index == 0
    assert handle.change_prompt("an owl", transition=3).result(PATIENCE) == 1
    handle.allow(2)
    assert next(stream).index == 1
    stream.close()
    handle.stop()
    assert handle.result(PATIENCE).chunks == folder.count() == 2
    assert frames_in(tmp_path / "a.mp4") == 2 * 33
    owl = request.with_change(1, "an owl", 3)
    assert folder.current(request) == owl
    shutil.copytree(folder.path, tmp_path / "taken")
    result = pipeline.submit(request, output=[tmp_path / "a.mp4"], folder=folder, keep_latents=True).result(PATIENCE)
    assert np.array_equal(result.latents, alone(owl)[:, :, 2 * 9 :])
    whole = pipeline.submit(owl, output=[tmp_path / "whole.mp4"], keep_latents=True).result(PATIENCE)
    files = ["--output", str(tmp_path / "b.mp4"), "--save-latents", str(tmp_path / "b.safetensors")]
    assert generate(["--resume", str(tmp_path / "taken"), "--device", "cpu", *files]) == 0
    assert np.array_equal(load_file(tmp_path / "b.safetensors")["latents"], whole.latents)
    assert {(tmp_path / name).read_bytes() for name in ("a.mp4", "b.mp4")} == {(tmp_path / "whole.mp4").read_bytes()}


def test_the_pipeline_alone_of_the_live_benchmark(pipeline):
    """As `benchmarks.live` runs it beside a server."""
    assert measures.alone(pipeline, small(num_frames=6 * 33)) > 0


def board_of(pipeline) -> ray.actor.ActorHandle:
    return ray.get_actor(f"status-{ray.get_runtime_context().get_job_id()}-{id(pipeline)}", NAMESPACE)


def place_of(board) -> tuple[str, int]:
    """Node and process."""
    look = lambda _: (ray.get_runtime_context().get_node_id(), os.getpid())  # noqa: E731
    return ray.get(board.__ray_call__.remote(look), timeout=PATIENCE)


def test_a_status_board_that_does_not_answer_is_told(pipeline, monkeypatch, capsys):
    _, pid = place_of(board_of(pipeline))
    monkeypatch.setattr(status, "PATIENCE", 1.0)
    os.kill(pid, signal.SIGSTOP)
    try:
        status.read_boards()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert "a pipeline is left out: it does not answer within 1 s" in capsys.readouterr().err


def test_the_status_board_is_on_the_drivers_node_and_comes_back(pipeline):
    board = board_of(pipeline)
    node, pid = place_of(board)
    assert node == ray.get_runtime_context().get_node_id()
    os.kill(pid, signal.SIGKILL)
    deadline, shown = time.monotonic() + PATIENCE, {}
    while not shown and time.monotonic() < deadline:
        try:
            shown = ray.get(board.read.remote(), timeout=PATIENCE) if place_of(board)[1] != pid else {}
        except ray.exceptions.RayActorError:  # not back yet
            shown = {}
        time.sleep(0.1)
    assert shown["workers"]


def test_refusals(pipeline, tmp_path):
    with pytest.raises(RequestError, match="--height 65"):
        pipeline.submit(small(height=65))
    with pytest.raises(RequestError, match="2 outputs for 1 video"):
        pipeline.submit(small(), output=[tmp_path / "a.mp4", tmp_path / "b.mp4"])
    with pytest.raises(ValueError, match="stream=True"):
        handle = pipeline.submit(small(num_frames=33), output=[tmp_path / "a.mp4"])
        next(iter(handle))
    handle.result(timeout=PATIENCE)


def test_adapters_of_a_request(pipeline, alone, tmp_path):
    """Videos with and without one in turns on the same groups; one that is missing or does not fit is refused."""
    write_adapter(tmp_path / "a.safetensors")
    write_adapter(tmp_path / "b.safetensors", width=3)
    adapted = small(lora=(Adapter(str(tmp_path / "a.safetensors"), 0.5),))
    requests = [small(), adapted, small(seed=(8,)), adapted]
    handles = [pipeline.submit(request, decode=False, keep_latents=True) for request in requests]
    for handle, request in zip(handles, requests, strict=True):
        assert np.array_equal(handle.result(PATIENCE).latents, alone(request))
    assert not np.array_equal(alone(adapted), alone(small()))
    for bad, named in (("b.safetensors", "to_q"), ("c.safetensors", "there is no such file")):
        with pytest.raises(RequestError, match=named):
            pipeline.submit(small(lora=(Adapter(str(tmp_path / bad)),)))


@pytest.fixture(scope="module")
def pair(cluster, model):
    """A group of two ranks, on a node each, that decodes its own chunks."""
    with ChunkPipeline(model, decoders=0, layout=Layout(Degrees(ring=2)), spread=True, patience=PATIENCE) as pair:
        yield pair


def test_two_ranks_make_a_live_video_again_to_the_same_bits(pair):
    request = small(num_frames=4 * 33)
    handle = pair.submit(request, decode=False, stream=True, keep_latents=True, allowed=1)
    next(stream := iter(handle))
    changes = [handle.change_prompt("an owl", transition=3).result(PATIENCE)]
    handle.allow(2)
    next(stream)
    changes.append(handle.change_prompt("a cat", transition=2).result(PATIENCE))
    handle.allow(4)
    stream.close()
    live = handle.result(PATIENCE).latents
    again = request.with_change(1, "an owl", 3).with_change(2, "a cat", 2)
    assert changes == [1, 2]
    replayed = pair.submit(again, decode=False, keep_latents=True).result(PATIENCE).latents
    assert np.array_equal(live, replayed)


def test_a_group_spread_over_nodes_that_decodes_its_own(pair, alone, tmp_path):
    """In the end closing the pipeline ends all its processes."""
    request, expected = small(), alone(small())
    result = pair.submit(request, output=[tmp_path / "a.mp4"], keep_latents=True).result(PATIENCE)
    assert np.abs(result.latents - expected).max() <= 1e-4 * (expected.max() - expected.min())
    assert frames_in(tmp_path / "a.mp4") == 99
    assert {event.worker for event in list(pair.events) if event.stage == "decode"} == {"group-0"}
    assert len({place.node for place in pair.workers["group-0"].places}) == 2

    pids = [place.pid for worker in pair.workers.values() for place in worker.places]
    handle = pair.submit(small(num_frames=1000 * 33))
    next(iter(handle))
    pair.close()
    with pytest.raises(CancelledError):
        handle.result(PATIENCE)
    assert len(pids) == 4 and os.getpid() not in pids
    wait_until(lambda: not any(runs_actor(pid) for pid in pids))
    assert ray.is_initialized()


def test_bf16_travels_unchanged():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.uint8):
        tensor = torch.randn(3, 5).mul(100).to(dtype)
        back = Array.of(tensor).tensor()
        assert back.dtype == dtype and torch.equal(back, tensor)
