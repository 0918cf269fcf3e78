"""Unit, and processes that are killed: a stopped video goes on and ends with the same bits.

Nothing here has a tolerance: resumed latents and MP4s are compared bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helios_cp.config.errors import RequestError
from helios_cp.config.request import Request
from helios_cp.generate.__main__ import main
from helios_cp.generate.run_folder import Run, RunFolder
from helios_cp.pipeline.pipeline import Pipeline
from helios_cp.pipeline.start import Inputs
from helios_cp.sampling.state import ChunkState

STEPS = {
    "random-base": {"num_inference_steps": 3},
    "random-mid": {"pyramid_num_inference_steps_list": (3, 1, 1)},
    "random-distilled": {"pyramid_num_inference_steps_list": (1, 1, 1)},
}


@pytest.fixture(scope="module")
def pipelines(presets):
    return {name: Pipeline.from_pretrained(str(presets[name]), dtype=torch.float32) for name in STEPS}


@pytest.mark.parametrize("task", ["t2v", "i2v", "v2v"])
@pytest.mark.parametrize("name", STEPS)
def test_state_on_disk_is_all_that_the_next_chunk_needs(pipelines, astronaut, clip, tmp_path, name, task):
    """Two videos at once; the anchor moves at chunk 1, and the state is read back before and after that."""
    inputs = Inputs(**{"t2v": {}, "i2v": {"image": astronaut}, "v2v": {"video": clip}}[task])
    request = Request(
        prompt=("a fox", "an owl"), height=64, width=64, num_frames=33 * 3, is_skip_first_chunk=True, **STEPS[name]
    )
    pipeline = pipelines[name]
    unbroken = list(pipeline.stream(request, inputs, output_type="latent"))
    run = Run(request.resolve(pipeline.checkpoint), name, "float32", ("a.mp4", "b.mp4"))
    folder = RunFolder.create(tmp_path / "run", run)
    assert folder.state(pipeline.device) is None
    for chunk in unbroken[:2]:
        folder.commit(chunk, [b"0", b"1"])
        opened = RunFolder.open(tmp_path / "run")
        assert opened.run == run and opened.count() == chunk.index + 1
        state = opened.state(pipeline.device)
        rest = list(pipeline.stream(opened.run.request, inputs, state=state, output_type="latent"))
        for resumed, expected in zip(rest, unbroken[chunk.index + 1 :], strict=True):
            assert torch.equal(resumed.latents, expected.latents)
        assert torch.equal(opened.latents(chunk.index), chunk.latents)
    assert [path.read_bytes() for path in sorted((tmp_path / "run").glob("chunk-00001-*.mp4"))] == [b"0", b"1"]
    assert [path.name for path in (tmp_path / "run").glob("state-*")] == ["state-00002.safetensors"]


def test_every_part_of_the_state_matters(pipelines):
    """Were one of them left out of the file, the next chunk would differ; so the test above can fail."""
    pipeline = pipelines["random-distilled"]
    request = Request(prompt=("a fox",), height=64, width=64, num_frames=99, **STEPS["random-distilled"])
    first, second, _ = pipeline.stream(request, output_type="latent")
    state = first.state
    blank = Request(prompt=("a fox",), seed=(1,)).seeds
    other = torch.stack([torch.Generator().manual_seed(seed).get_state() for seed in blank])
    for broken in (
        ChunkState(state.index, torch.zeros_like(state.history), state.anchor, state.generators),
        ChunkState(state.index, state.history, torch.zeros_like(state.anchor), state.generators),
        ChunkState(state.index, state.history, state.anchor, other),
    ):
        chunk = next(pipeline.stream(request, state=broken, output_type="latent"))
        assert (chunk.latents - second.latents).abs().max() > 1e-3


def test_a_changed_prompt_is_resumed(pipelines, presets, tmp_path, monkeypatch):
    """A live run changed its prompt at chunk 1 of 4 and was killed after it, in the middle of the transition; the
    command makes the same two chunks after it."""
    monkeypatch.chdir(tmp_path)
    pipeline, model = pipelines["random-distilled"], str(presets["random-distilled"])
    size = ["--height", "64", "--width", "64", "--num-frames", "132", "--pyramid-steps", "1", "1", "1"]
    assert main(["--model", model, "--prompt", "a fox", *size, "--checkpoint-dir", "run", "--output", "fox.mp4"]) == 0
    run = RunFolder.open(Path("run")).run
    owl = run.request.with_change(1, "an owl", 3)
    changed = list(pipeline.stream(owl))
    live = RunFolder.create(tmp_path / "live", run)
    segment = (tmp_path / "run" / "chunk-00000-0.mp4").read_bytes()
    live.commit(changed[0], [segment])
    assert live.current(run.request) == run.request
    live.commit(changed[1], [segment], owl.prompt_schedule)
    assert RunFolder.open(live.path).current(run.request) == owl

    assert main(["--resume", "live", "--output", "live.mp4", "--save-latents", "live.safetensors"]) == 0
    assert load_file("live.safetensors")["latents"].equal(torch.cat([chunk.latents for chunk in changed], dim=2))
    assert not changed[3].latents.equal(RunFolder.open(Path("run")).latents(3)), "the prompt matters"
    assert RunFolder.open(live.path).current(run.request) == owl, "and it is still kept"


def test_a_run_goes_on_to_another_end(presets, tmp_path, monkeypatch, capsys):
    """Longer than it was begun, to the frames that it would have had at once; and no shorter than what is finished."""
    monkeypatch.chdir(tmp_path)
    size = ["--height", "64", "--width", "64", "--pyramid-steps", "1", "1", "1"]
    fox = ["--model", str(presets["random-distilled"]), "--prompt", "a fox", *size]
    assert main([*fox, "--num-frames", "99", "--output", "whole.mp4"]) == 0
    assert main([*fox, "--num-frames", "33", "--output", "a.mp4", "--checkpoint-dir", "run"]) == 0
    assert main(["--resume", "run", "--num-frames", "66", "--output", "b.mp4"]) == 0
    assert main([*fox, "--num-frames", "99", "--output", "c.mp4", "--checkpoint-dir", "run"]) == 0
    whole = Path("whole.mp4").read_bytes()
    assert Path("c.mp4").read_bytes() == whole and Path("b.mp4").read_bytes() != whole
    assert RunFolder.open(Path("run")).run.request.num_frames == 99
    capsys.readouterr()
    assert main(["--resume", "run", "--num-frames", "33", "--output", "d.mp4"]) == 0
    told = "run folder run: 3 chunks are finished, more than --num-frames 33 asks for; the video has them all"
    assert told in capsys.readouterr().err and Path("d.mp4").read_bytes() == whole


def test_a_folder_of_an_older_version(tmp_path):
    """Its commit knows no schedule; one that was changed while it was made cannot be gone on with to the same bits."""
    run = Run(Request(prompt=("a fox",), num_frames=99), "random-distilled", "float32", ("a.mp4",))
    folder = RunFolder.create(tmp_path / "run", run)
    for prompts, is_refused in (([], False), ([[1, "an owl"]], True)):
        commit = {"chunks": 0, "state": "state-00000.safetensors", "prompts": prompts}
        (folder.path / "state.json").write_text(json.dumps(commit))
        with pytest.raises(RequestError, match="older version") if is_refused else contextlib.nullcontext():
            assert folder.current(run.request) == run.request


@pytest.mark.parametrize("name", ["run.json", "state.json", "state-00001.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 40])
def test_damaged_folders_are_refused(pipelines, tmp_path, name, content):
    pipeline = pipelines["random-distilled"]
    request = Request(prompt=("a fox",), height=64, width=64, num_frames=33, **STEPS["random-distilled"])
    folder = RunFolder.create(tmp_path / "run", Run(request, "random-distilled", "float32", ("a.mp4",)))
    for chunk in pipeline.stream(request, output_type="latent"):
        folder.commit(chunk, [b"0"])
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(RequestError, match=r"run folder .*run: "):
        RunFolder.open(tmp_path / "run").state(pipeline.device)


def _generate(arguments: list[str], folder: str) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    raise SystemExit(main(arguments))


def finished_chunks(folder: Path) -> int:
    """Of a run that may not have begun."""
    commit = folder / "run" / "state.json"
    return json.loads(commit.read_text())["chunks"] if commit.exists() else 0


def test_killed_twenty_times(presets, tmp_path):
    """`kill -9` at random places, from start-up to the last chunk, until it has hit twenty unfinished runs.

    Each process is killed once a number of chunks is finished that is drawn for it, a little later, or at its start.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["helios_cp.generate.run", "helios_cp.model.vae.autoencoder", "transformers.UMT5EncoderModel"]
    )
    request = ["--model", str(presets["random-distilled"]), "--prompt", "a fox", "--pyramid-steps", "1", "1", "1"]
    request += ["--height", "64", "--width", "64", "--num-latent-frames-per-chunk", "3", "--num-frames", str(9 * 8)]
    request += ["--save-latents", "out.safetensors"]

    def start(folder: Path, arguments: list[str]) -> multiprocessing.Process:
        process = context.Process(target=_generate, args=(arguments, str(folder)))
        process.start()
        return process

    unbroken = tmp_path / "unbroken"
    unbroken.mkdir()
    process = start(unbroken, request)
    process.join()
    assert process.exitcode == 0

    drawn, kills, videos, redone = random.Random(0), 0, 0, []
    while kills < 20:
        folder = tmp_path / f"video-{videos}"
        folder.mkdir()
        while True:
            resume = (folder / "run" / "run.json").exists()
            arguments = ["--resume", "run", "--save-latents", "out.safetensors"]
            process = start(folder, arguments if resume else [*request, "--checkpoint-dir", "run"])
            if kills == 20:
                process.join()
            else:
                place = min(finished_chunks(folder) + drawn.randint(0, 3), 7)
                while process.exitcode is None and finished_chunks(folder) < place:
                    process.join(0.001)
                process.join(drawn.uniform(0, 0.02))
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            if process.exitcode != -signal.SIGKILL:  # it came to its end a moment before
                break
            kills += 1
            redone.append(finished_chunks(folder))
        assert process.exitcode == 0
        videos += 1
        assert (folder / "out.mp4").read_bytes() == (unbroken / "out.mp4").read_bytes()
        latents = load_file(folder / "out.safetensors")["latents"]
        assert torch.equal(latents, load_file(unbroken / "out.safetensors")["latents"])
        leftovers = [path.name for path in folder.rglob("*") if "partial" in path.name and path.parent == folder]
        assert not leftovers
    assert len(set(redone)) >= 3, f"the kills must fall into different chunks, not {redone}"
