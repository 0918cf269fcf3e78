"""Unit, without a cluster: chunks of a run that were denoised and not written when its driver was killed."""

from __future__ import annotations

import pytest
import torch

from helios_cp.config.errors import RequestError
from helios_cp.config.request import Request, ScheduledPrompt
from helios_cp.generate.run_folder import Run, RunFolder
from helios_cp.pipeline.decoding import Chunk
from helios_cp.sampling.state import ChunkState
from helios_cp.weights.load import resolve
from launchers.driver.submission import Submission
from launchers.messages.arrays import Array, StateArrays
from launchers.messages.messages import NextStart, Span
from launchers.workers import denoised_chunks
from launchers.workers.writer import VideoWriter

CHUNKS = 5


@pytest.fixture
def checkpoint(presets, cache):
    return resolve(str(presets["random-distilled"]), cache, weights=())


@pytest.fixture
def request_of_run(checkpoint):
    return Request(prompt=("a fox",), height=64, width=64, num_frames=CHUNKS * 33, seed=(0,)).resolve(checkpoint)


@pytest.fixture
def folder(request_of_run, tmp_path):
    return RunFolder.create(tmp_path / "run", Run(request_of_run, "random-distilled", "float32", ("a.mp4",)))


def latents(chunk: int) -> torch.Tensor:
    return torch.full((1, 16, 9, 8, 8), float(chunk))


def state(chunk: int) -> ChunkState:
    """After `chunk`."""
    return ChunkState(
        chunk + 1, torch.full((1, 16, 19, 8, 8), float(chunk)), None, torch.zeros(1, 4, dtype=torch.uint8)
    )


def keep(folder: RunFolder, *chunks: int, schedule: tuple[ScheduledPrompt, ...] = ()) -> None:
    """As the worker does, with what travels to it."""
    for chunk in chunks:
        after = NextStart(StateArrays.of(state(chunk)), Span(0, 0, {}))
        VideoWriter().keep(folder, chunk, Array.of(latents(chunk)), after, schedule)


def finish(folder: RunFolder, chunk: int) -> None:
    folder.commit(Chunk(chunk, latents(chunk), None, state(chunk), {}), [b"segment"])
    denoised_chunks.forget(folder, chunk + 1)


def submitted(folder: RunFolder, request: Request, checkpoint) -> Submission:
    """The video that would run."""
    return Submission.of(request, checkpoint, ["a.mp4"], folder)


def test_kept_chunks_are_gone_on_with(folder, request_of_run, checkpoint):
    finish(folder, 0)
    keep(folder, 1, 2)
    found = submitted(folder, request_of_run, checkpoint)
    assert (found.first, found.chunks, len(found.denoised)) == (1, CHUNKS, 2)
    for chunk, kept in enumerate(found.denoised, 1):
        assert kept.latents.equal(latents(chunk))
        assert kept.after.index == chunk + 1 and kept.after.history.equal(state(chunk).history)


def test_without_any_finished_chunk(folder, request_of_run, checkpoint):
    keep(folder, 0)
    found = submitted(folder, request_of_run, checkpoint)
    assert found.first == 0 and [kept.after.index for kept in found.denoised] == [1]


def test_a_changed_prompt_is_gone_on_with(folder, request_of_run, checkpoint):
    """Kept with the chunk that it came with, and then committed with it; a chunk made again takes it back."""
    owl = request_of_run.with_change(2, "an owl", 3)
    finish(folder, 0)
    keep(folder, 1)
    keep(folder, 2, schedule=owl.prompt_schedule)
    found = submitted(folder, request_of_run, checkpoint)
    assert found.request == owl
    assert [kept.schedule for kept in found.denoised] == [(), owl.prompt_schedule]
    keep(folder, 2)
    assert submitted(folder, request_of_run, checkpoint).request == request_of_run
    cat = request_of_run.with_change(1, "a cat")
    folder.commit(Chunk(1, latents(1), None, state(1), {}), [b"segment"], cat.prompt_schedule)
    assert submitted(folder, request_of_run, checkpoint).request == cat
    finish(folder, 2)
    assert folder.current(request_of_run) == cat, "the next chunk shows it too"


def test_finished_chunks_need_not_be_kept(folder):
    keep(folder, 0, 1, 2)
    finish(folder, 0)
    finish(folder, 1)
    assert sorted(path.name for path in folder.path.glob("ahead-*")) == ["ahead-00003.json", "ahead-00003.safetensors"]
    assert len(denoised_chunks.load(folder, 2)) == 1
    finish(folder, 2)
    assert not list(folder.path.glob("ahead-*"))


def test_a_gap_ends_what_is_kept(folder):
    """A writer that was lost keeps nothing of what it had in hand."""
    keep(folder, 0, 2)
    assert [kept.after.index for kept in denoised_chunks.load(folder, 0)] == [1]


@pytest.mark.parametrize("name", ["ahead-00002.json", "ahead-00002.safetensors", "chunk-00001.safetensors"])
def test_torn_files_are_made_again(folder, name):
    keep(folder, 0, 1, 2)
    path = folder.path / name
    path.write_bytes(path.read_bytes()[:1])
    assert len(denoised_chunks.load(folder, 0)) == 1


def test_one_process_goes_on_with_the_folder_too(folder):
    """It knows nothing of what is kept, and is not led astray by it."""
    finish(folder, 0)
    keep(folder, 1, 2)
    opened = RunFolder.open(folder.path)
    assert opened.count() == 1 and opened.state(torch.device("cpu")).index == 1
    opened.commit(Chunk(1, latents(1), None, state(1), {}), [b"segment"])
    assert [kept.after.index for kept in denoised_chunks.load(opened, 2)] == [3]


def test_all_finished_is_refused(folder, request_of_run, checkpoint):
    for chunk in range(CHUNKS):
        finish(folder, chunk)
    with pytest.raises(RequestError, match="all 5 chunks are finished"):
        submitted(folder, request_of_run, checkpoint)
