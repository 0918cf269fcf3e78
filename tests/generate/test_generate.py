"""End to end on the tiny models: the command line from flags to files, in this process and in a few of its own.

Nothing here has a tolerance: an MP4 is compared with what encoding the pipeline's own frames gives, bit for bit. That
encoding keeps the picture is tested in `test_video.py`.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import helios_cp
from helios_cp.config.json_types import from_json
from helios_cp.config.request import Request, ScheduledPrompt
from helios_cp.files.chunk_files import ChunkFiles
from helios_cp.files.mp4 import encode_segment
from helios_cp.generate import run as runner
from helios_cp.generate.__main__ import build_parser, main
from helios_cp.generate.progress import ProgressReporter
from helios_cp.generate.stopping import Stopped
from helios_cp.pipeline.decoding import Chunk
from helios_cp.pipeline.pipeline import Pipeline

MODEL = ["--model", "random-distilled"]
QUICK = [
    *MODEL,
    "--height",
    "64",
    "--width",
    "64",
    "--pyramid-steps",
    "1",
    "1",
    "1",
    "--dtype",
    "float32",
    "--device",
    "cpu",
]
FIELDS = {"height": 64, "width": 64, "pyramid_num_inference_steps_list": (1, 1, 1)}


@pytest.fixture(autouse=True)
def folder(tmp_path, cache, presets, monkeypatch) -> Path:
    """An empty folder to run in."""
    monkeypatch.setenv("HELIOS_CP_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def distilled(presets) -> Pipeline:
    return Pipeline.from_pretrained(str(presets["random-distilled"]), dtype=torch.float32)


def generate(*arguments: str) -> int:
    return main([*QUICK, *arguments])


def whole(path: Path | str, frames: int) -> bool:
    """Whether the MP4 plays to its end and has so many frames."""
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0)) == frames


def encoded(chunks: list[Chunk], video: int = 0, fps: int = 24) -> bytes:
    """The MP4 of one video of the batch."""
    files = ChunkFiles(Path("expected"))
    for index, chunk in enumerate(chunks):
        files.save(index, [encode_segment(chunk.frames[video], fps)])
    files.join([Path("expected.mp4")])
    files.remove()
    content = Path("expected.mp4").read_bytes()
    Path("expected.mp4").unlink()
    return content


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# One video


def test_mp4_latents_and_report(folder, distilled, capfd):
    """Two chunks: everything that one call writes, against what the pipeline yields."""
    arguments = ["--prompt", "a fox", "--num-frames", "34", "--fps", "30", "--seed", "7", "--output", "new/fox.mp4"]
    arguments += ["--guidance-scale", "7", "--negative-prompt", "blurry"]  # Distilled reads neither
    assert generate(*arguments, "--save-latents", "new/l/fox.safetensors", "--report", "new/r/fox.json") == 0
    assert names(folder) == ["new", "new/fox.mp4", "new/l", "new/l/fox.safetensors", "new/r", "new/r/fox.json"]
    chunks = list(distilled.stream(Request(prompt=("a fox",), num_frames=34, seed=(7,), **FIELDS)))

    with av.open("new/fox.mp4") as container:
        (stream,) = container.streams
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, stream.average_rate, stream.frames) == (64, 64, 30, 66)
    assert whole("new/fox.mp4", 66)
    assert Path("new/fox.mp4").read_bytes() == encoded(chunks, fps=30)
    assert Path("new/fox.mp4").read_bytes() != encoded(chunks[::-1], fps=30)

    latents = load_file("new/l/fox.safetensors")
    assert list(latents) == ["latents"] and latents["latents"].dtype == torch.float32
    assert latents["latents"].shape == (1, 16, 18, 8, 8)
    assert torch.equal(latents["latents"], torch.cat([chunk.latents for chunk in chunks], dim=2))

    _check_report(json.loads(Path("new/r/fox.json").read_text()))
    out, err = capfd.readouterr()
    assert re.match(r"new/fox\.mp4: 66 frames at [0-9.]+ FPS \([0-9.]+ without the first chunk\)\n", out)
    assert "denoise_3" in out and "decode" in out
    assert err.count("the weights are random, so the video is noise; --model BestWishYsh/Helios-Distilled") == 1
    assert "--guidance-scale 7.0: Helios-Distilled has its guidance built in and does not read it\n" in err
    assert "--negative-prompt 'blurry': Helios-Distilled has" in err
    assert "\033" not in out + err and "\r" not in out + err
    lines = [line for line in err.splitlines() if line.startswith("fox.mp4: chunk ")]
    assert [line.split(":")[1] for line in lines] == [" chunk 1 of 2", " chunk 2 of 2"]


def _check_report(report: dict) -> None:
    assert report["version"] == helios_cp.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["layout"]["ranks"] == 1
    assert report["layout"]["degrees"] == {"cfg": 1, "ring": 1, "ulysses": 1, "ffn_tp": 1, "vae": 1}
    assert (report["variant"], report["random_weights"], report["dtype"]) == ("distilled", True, "float32")
    assert report["seed"] == [7] and report["output"] == ["new/fox.mp4"]
    assert (report["frames"], report["complete"], report["error"]) == (66, True, None)
    assert (report["finished_chunks"], report["resumed_from_chunk"]) == (2, 0)
    assert from_json(Request, report["request"]).num_frames == 34
    assert report["peak_memory_bytes"] > 50e6  # torch alone is more
    first, second = report["chunks"]
    assert [first["index"], second["index"]] == [0, 1]
    stages = {"conditions", "denoise_1", "denoise_2", "denoise_3", "decode", "write"}
    assert set(first["stages"]) == stages | {"text", "media"} and set(second["stages"]) == stages
    for chunk in report["chunks"]:
        assert min(chunk["stages"].values()) >= 0 < chunk["seconds"]
    in_turn = sum(seconds for name, seconds in report["stage_seconds"].items() if name != "write")
    assert 0 < in_turn + second["stages"]["write"] <= first["seconds"] + second["seconds"]
    assert report["vae"] == {"dtype": "float32", "convolutions": "float32", "latent_frames_together": 9}
    for stage, seconds in report["stage_seconds"].items():
        assert seconds == pytest.approx(sum(chunk["stages"].get(stage, 0) for chunk in report["chunks"]))
    assert report["fps"] == pytest.approx(66 / (first["seconds"] + second["seconds"]))
    assert report["fps_without_first_chunk"] == pytest.approx(33 / second["seconds"])


def test_from_a_picture(folder, distilled, astronaut):
    astronaut.save("astronaut.png")
    assert (
        generate("--prompt", "a", "--num-frames", "33", "--image", "astronaut.png", "--save-latents", "l.safetensors")
        == 0
    )
    (chunk,) = distilled.stream(Request(prompt=("a",), num_frames=33, image="astronaut.png", **FIELDS))
    assert torch.equal(load_file("l.safetensors")["latents"], chunk.latents)
    assert whole("out.mp4", 33)


def test_from_a_clip(folder, distilled, clip):
    frames = torch.stack([torch.from_numpy(np.array(picture)) for picture in clip])
    Path("clip.mp4").write_bytes(encode_segment(frames, 24))
    arguments = ["--prompt", "a", "--num-frames", "33", "--video", "clip.mp4", "--no-add-noise-to-video-latents"]
    assert generate(*arguments, "--save-latents", "l.safetensors") == 0
    request = Request(prompt=("a",), num_frames=33, video="clip.mp4", add_noise_to_video_latents=False, **FIELDS)
    (chunk,) = distilled.stream(request)
    assert torch.equal(load_file("l.safetensors")["latents"], chunk.latents)
    assert whole("out.mp4", 33)


def test_a_prompt_schedule(folder, distilled):
    arguments = ["--prompt-schedule", "1", "a fox", "--prompt-schedule", "2", "an owl", "--interpolation-steps", "2"]
    assert generate(*arguments, "--num-frames", "33", "--save-latents", "l.safetensors") == 0
    schedule = (ScheduledPrompt("a fox", 1), ScheduledPrompt("an owl", 2))
    request = Request(prompt_schedule=schedule, interpolation_steps=2, num_frames=33, **FIELDS)
    chunks = list(distilled.stream(request, output_type="latent"))
    assert torch.equal(load_file("l.safetensors")["latents"], torch.cat([chunk.latents for chunk in chunks], dim=2))
    assert whole("out.mp4", 99)


def test_a_schedule_file_makes_a_live_video_again(folder, distilled):
    """What changes left of a request, with transitions; a flag that is given wins."""
    request = Request(prompt=("a fox",), num_frames=99, fps=12, **FIELDS)
    changed = request.with_change(1, "an owl", 2).with_change(2, "a cat", 3)
    Path("live.json").write_text(json.dumps(asdict(changed)))
    arguments = ["--prompt-schedule-file", "live.json", "--save-latents", "l.safetensors"]
    assert main([*MODEL, *arguments]) == 0
    latents = torch.cat([chunk.latents for chunk in distilled.stream(changed, output_type="latent")], dim=2)
    assert torch.equal(load_file("l.safetensors")["latents"], latents)
    Path("list.json").write_text(json.dumps(asdict(changed)["prompt_schedule"]))
    assert (
        generate("--prompt-schedule-file", "list.json", "--num-frames", "99", "--save-latents", "again.safetensors")
        == 0
    )
    assert torch.equal(load_file("again.safetensors")["latents"], latents)
    assert main([*MODEL, *arguments, "--seed", "5", "--num-frames", "33"]) == 0
    assert not torch.equal(load_file("l.safetensors")["latents"], latents)


def test_a_batch_has_an_mp4_each(folder, distilled):
    """Each of its own prompt and seed; that a batch equals its videos one by one is tested in `test_pipeline.py`."""
    arguments = ["--num-frames", "33", "--report", "r.json", "--save-latents", "l.safetensors"]
    assert generate("--prompt", "a fox", "--prompt", "an owl", "--seed", "3", "9", *arguments) == 0
    assert names(folder) == ["l.safetensors", "out-0.mp4", "out-1.mp4", "r.json"]
    request = Request(prompt=("a fox", "an owl"), seed=(3, 9), num_frames=33, **FIELDS)
    chunks = list(distilled.stream(request))
    assert torch.equal(load_file("l.safetensors")["latents"], chunks[0].latents)
    for video in range(2):
        assert Path(f"out-{video}.mp4").read_bytes() == encoded(chunks, video)
    report = json.loads(Path("r.json").read_text())
    assert (report["frames"], report["seed"], report["output"]) == (66, [3, 9], ["out-0.mp4", "out-1.mp4"])


# Going on


def test_resuming_a_finished_run_writes_the_same_mp4_without_loading_weights(folder, monkeypatch, capfd, request):
    arguments = ["--prompt", "a", "--num-frames", "66", "--checkpoint-dir", "run"]
    assert generate(*arguments, "--save-latents", "l.safetensors") == 0
    before = {name: Path(name).read_bytes() for name in ("out.mp4", "l.safetensors")}
    for name in before:
        Path(name).unlink()
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    request.getfixturevalue("no_weights")
    capfd.readouterr()
    assert main(["--resume", "../run", "--save-latents", "l.safetensors", "--report", "r.json"]) == 0
    assert (folder / "out.mp4").read_bytes() == before["out.mp4"]
    assert Path("l.safetensors").read_bytes() == before["l.safetensors"]
    assert "finished before" in capfd.readouterr().out
    report = json.loads(Path("r.json").read_text())
    assert report["complete"] and report["fps"] is None and report["resumed_from_chunk"] == 2
    assert main(["--resume", "../run", "--output", "other.mp4"]) == 0
    assert Path("other.mp4").read_bytes() == before["out.mp4"]


def raise_in_step(monkeypatch, chunk: int, number: int) -> None:
    """Send this process a signal in the second step of a chunk, as a user's Ctrl-C would."""
    original, sent = ProgressReporter.step, []

    def step(self, now):
        original(self, now)
        if (now.chunk, now.index) == (chunk, 2) and not sent:
            sent.append(number)
            signal.raise_signal(number)

    monkeypatch.setattr(ProgressReporter, "step", step)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_the_finished_chunks_and_a_way_on(folder, monkeypatch, capfd, number, code):
    arguments = ["--prompt", "a", "--num-frames", "99"]
    assert generate(*arguments, "--output", "whole.mp4", "--save-latents", "whole.safetensors") == 0
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    capfd.readouterr()
    with monkeypatch.context() as patch:
        raise_in_step(patch, 1, number)
        assert (
            generate(*arguments, "--checkpoint-dir", "run", "--report", "r.json", "--save-latents", "l.safetensors")
            == code
        )
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert whole("out.mp4", 33) and load_file("l.safetensors")["latents"].shape[2] == 9
    err = capfd.readouterr().err
    # Perhaps within a line about chunk 0, which the writer may be printing at that moment.
    assert "stopping after this step; Ctrl-C again stops at once\n" in err
    assert err.splitlines()[-1] == (
        "stopped; out.mp4: 1 of 3 chunks are finished and can be played, 33 frames; go on with --resume run, "
        "or with the same call"
    )
    report = json.loads(Path("r.json").read_text())
    assert (report["complete"], report["finished_chunks"]) == (False, 1)
    assert main(["--resume", "run", "--save-latents", "l.safetensors"]) == 0
    assert Path("out.mp4").read_bytes() == Path("whole.mp4").read_bytes()
    assert Path("l.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()


@pytest.mark.parametrize("times", [1, 2])
def test_a_chunk_that_is_being_written_is_finished(folder, monkeypatch, capfd, times):
    """Ctrl-C in chunk 2 while chunk 1 is encoded, which waits for it here. More of them do not disturb the closing."""
    encoded_chunks, pressed = [], threading.Event()
    step, join = ProgressReporter.step, ChunkFiles.join

    def encode(frames, fps):
        encoded_chunks.append(fps)
        assert len(encoded_chunks) < 2 or pressed.wait(60), "chunk 2 is not made while chunk 1 is encoded"
        return encode_segment(frames, fps)

    def interrupted(self, now):
        step(self, now)
        if (now.chunk, now.index) == (2, 1):
            try:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            finally:
                pressed.set()

    monkeypatch.setattr(runner, "encode_segment", encode)
    monkeypatch.setattr(ProgressReporter, "step", interrupted)
    interrupted_join = lambda *arguments: (signal.raise_signal(signal.SIGINT), join(*arguments))[1]  # noqa: E731
    monkeypatch.setattr(ChunkFiles, "join", interrupted_join)
    assert generate("--prompt", "a", "--num-frames", "132") == 130
    assert names(folder) == ["out.mp4"] and whole("out.mp4", 66)
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("stopped; out.mp4: 2 of 4 chunks are finished and can be played, 66 frames; ")
    assert "--checkpoint-dir DIR" in last


def test_a_signal_before_the_first_chunk_is_finished(folder, monkeypatch, capfd):
    Path("out.mp4").write_bytes(b"an earlier file")
    raise_in_step(monkeypatch, 0, signal.SIGINT)
    assert generate("--prompt", "a", "--num-frames", "33") == 130
    assert Path("out.mp4").read_bytes() == b"an earlier file"
    assert "out.mp4: 0 of 1 chunks are finished; " in capfd.readouterr().err


@pytest.mark.parametrize("videos", [1, 2])
def test_a_signal_in_the_last_chunks_encoding(folder, monkeypatch, videos):
    """Too late to stop this video; there may be a next one."""

    def encode(frames, fps):
        os.kill(os.getpid(), signal.SIGINT)
        return encode_segment(frames, fps)

    monkeypatch.setattr(runner, "encode_segment", encode)
    Path("p.txt").write_text("a fox\n" * videos)
    assert generate("--prompt-file", "p.txt", "--num-frames", "33") == (0 if videos == 1 else 130)
    assert names(folder / "outputs") == ["0.mp4"] and whole("outputs/0.mp4", 33)


def test_ctrl_c_while_loading(folder, monkeypatch, capfd):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "load_pipeline", interrupted)
    assert generate("--prompt", "a") == 130
    assert capfd.readouterr().err.splitlines()[-1] == "stopped before the first chunk; nothing was written"
    assert names(folder) == []


def test_stopped_passes_through_handlers_of_errors():
    assert not issubclass(Stopped, Exception)


# Many videos


@pytest.fixture
def failing(monkeypatch):
    """Makes the pipeline fail in the second chunk of a prompt that says so."""
    stream = Pipeline.stream

    def broken(self, request, *arguments, **options):
        for chunk in stream(self, request, *arguments, **options):
            if "fail" in request.prompt[0] and chunk.index == 1:
                raise RuntimeError("the lens\nbroke")
            yield chunk

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "stream", broken)
        yield patch


@pytest.mark.parametrize("saving", [False, True])
def test_prompt_file_goes_on_after_a_failure(folder, failing, capfd, saving):
    """Three prompts; the first call makes two, the second only the one that failed."""
    Path("p.csv").write_text("id,prompt\nfox,a fox\nbad,fail here\nowl,an owl\n")
    arguments = ["--prompt-file", "p.csv", "--output", "videos", "--num-frames", "66", "--report", "r.json"]
    assert generate(*arguments, *(["--checkpoint-dir", "runs"] if saving else [])) == 1
    err = capfd.readouterr().err
    assert err.splitlines()[-2:] == ["1 of 3 videos failed:", "  videos/bad.mp4: RuntimeError: the lens broke"]
    assert "Traceback" in err  # where it happened, above the list
    assert [whole(f"videos/{name}.mp4", 66) for name in ("fox", "bad", "owl")] == [True, False, True]
    reports = json.loads(Path("r.json").read_text())
    assert [report["complete"] for report in reports] == [True, False, True]
    assert [report["error"] is None for report in reports] == [True, False, True]

    failing.undo()
    times = [Path(f"videos/{name}.mp4").stat().st_mtime_ns for name in ("fox", "owl")]
    assert generate(*arguments, *(["--resume", "runs"] if saving else [])) == 0
    out, err = capfd.readouterr()
    assert "videos/fox.mp4 exists, skipped" in err and "videos/owl.mp4 exists, skipped" in err
    assert re.findall(r"videos/(\w+)\.mp4: \d+ frames", out) == ["bad"]
    assert ("33 frames at" in out) == saving
    assert whole("videos/bad.mp4", 66)
    assert times == [Path(f"videos/{name}.mp4").stat().st_mtime_ns for name in ("fox", "owl")]
    assert [report["output"] for report in json.loads(Path("r.json").read_text())] == [["videos/bad.mp4"]]


def test_prompt_file_with_nothing_left_to_do(folder, no_weights, capfd):
    """A file that is there is not made again, whatever it holds; the request is checked all the same."""
    Path("p.txt").write_text("a fox\n")
    Path("outputs").mkdir()
    Path("outputs/0.mp4").write_bytes(b"somebody's own")
    assert generate("--prompt-file", "p.txt") == 0
    assert "outputs/0.mp4 exists, skipped" in capfd.readouterr().err
    assert Path("outputs/0.mp4").read_bytes() == b"somebody's own"
    with pytest.raises(SystemExit, match="2"):
        generate("--prompt-file", "p.txt", "--height", "65")


def test_stopping_a_prompt_file(folder, monkeypatch, capfd):
    """The video in hand stays playable, and the next call makes it whole, though a file of its name is there."""
    Path("p.txt").write_text("a fox\nan owl\n")
    arguments = ["--prompt-file", "p.txt", "--num-frames", "66"]
    with monkeypatch.context() as patch:
        raise_in_step(patch, 1, signal.SIGINT)
        assert generate(*arguments, "--checkpoint-dir", "runs") == 130
    assert names(folder / "outputs") == ["0.mp4"] and whole("outputs/0.mp4", 33)
    assert capfd.readouterr().err.endswith("the same call goes on\n")
    assert generate(*arguments, "--resume", "runs") == 0
    assert whole("outputs/0.mp4", 66) and whole("outputs/1.mp4", 66)
    assert "outputs/0.mp4: 33 frames at" in capfd.readouterr().out


# Failures that are not of the input


@pytest.mark.parametrize("damage", ["weights", "disk"])
def test_other_errors_are_one_line_and_exit_code_1(folder, presets, monkeypatch, capfd, damage):
    if damage == "weights":
        shutil.copytree(presets["random-distilled"], "model")
        shard = next(Path("model/transformer").glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-10])
        expected = shard.name
    else:

        def full(*_):
            raise OSError(28, "No space left on device", "out.mp4")

        monkeypatch.setattr(ChunkFiles, "save", full)
        expected = "No space left on device: 'out.mp4'"
    model = ["--model", "model"] if damage == "weights" else []
    assert generate("--prompt", "a", "--num-frames", "33", *model) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("helios_cp.generate: error: ") and expected in last
    assert "out.mp4" not in names(folder)


def test_a_bar_on_a_terminal(folder, monkeypatch, capfd):
    """On a pseudo-terminal; the odd name would be markup to the library that draws the bar."""
    terminal, side = pty.openpty()
    drawn: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # how Linux says that the other side is closed
            while part := os.read(terminal, 4096):
                drawn.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with open(side, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "100")
        assert generate("--prompt", "a", "--num-frames", "66", "--output", "[bold]fox[red].mp4") == 0
    reader.join()
    os.close(terminal)
    bar, out = b"".join(drawn).decode(), capfd.readouterr().out
    text = re.sub(r"\033\[[0-9;?]*[A-Za-z]", "", bar)
    assert "\033[" in bar and "━" in text
    assert "[bold]fox[red].mp4: chunks" in text and "2/2" in text and "stage 3 of 3" in text
    assert "[bold]fox[red].mp4: 66 frames" in out and "\033" not in out
    assert whole("[bold]fox[red].mp4", 66)


def test_torchrun_with_one_rank(folder, monkeypatch, capfd):
    """In the environment that torchrun sets; `test_torchrun.py` starts it, with more ranks."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    for name, value in {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert generate("--prompt", "a", "--num-frames", "33") == 0
    assert "out.mp4: 33 frames" in capfd.readouterr().out and whole("out.mp4", 33)


# Processes of their own

COMMAND = [sys.executable, "-m", "helios_cp.generate"]


def test_help_and_typing_errors_do_not_wait_for_torch(folder):
    for arguments, code in ((["--help"], 0), (["--no-such-flag"], 2)):
        run = subprocess.run(
            [sys.executable, "-X", "importtime", *COMMAND[1:], *arguments], capture_output=True, text=True
        )
        assert run.returncode == code
        imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
        assert "argparse" in imported and not imported & {"torch", "av", "diffusers", "transformers", "numpy"}
        if arguments == ["--help"]:
            flags = {flag for action in build_parser()._actions for flag in action.option_strings}
            assert not {flag for flag in flags if not re.search(rf"{flag}\b", run.stdout)}


def test_sigint_in_a_process(folder):
    command = [*COMMAND, *QUICK, "--prompt", "a", "--num-frames", "33000", "--checkpoint-dir", "run"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, bufsize=1) as process:
        try:
            lines = [next(line for line in process.stderr if "chunk 1 of 1000" in line)]
            process.send_signal(signal.SIGINT)
            lines += process.stderr.readlines()
            assert process.wait(timeout=60) == 130
        finally:
            process.kill()
    chunks = json.loads(Path("run/state.json").read_text())["chunks"]
    assert 1 <= chunks < 1000 and whole("out.mp4", 33 * chunks)
    assert f"{chunks} of 1000 chunks are finished" in lines[-1] and "--resume run" in lines[-1]
    assert "Traceback" not in "".join(lines)
