"""On the tiny model, in this process: calls that share files, calls that are made again, and runs that fail midway."""

from __future__ import annotations

import json
import os
import signal
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import load_file

from helios_cp.config.errors import RequestError
from helios_cp.config.layout import AskedLayout, Layout
from helios_cp.config.request import Request
from helios_cp.files.chunk_files import ChunkFiles
from helios_cp.generate import run as runner
from helios_cp.generate.__main__ import main
from helios_cp.generate.check import with_saved_layout
from helios_cp.generate.claims import InUseError, claimed, turns
from helios_cp.generate.progress import ProgressReporter
from helios_cp.generate.prompt_files import Job
from helios_cp.generate.run_folder import MadeWith, Run, RunFolder
from helios_cp.generate.stopping import SIGNALS
from helios_cp.pipeline.pipeline import Pipeline
from parallel.mesh import Degrees

QUICK = ["--height", "64", "--width", "64", "--pyramid-steps", "1", "1", "1", "--dtype", "float32", "--device", "cpu"]
QUICK += ["--num-latent-frames-per-chunk", "3"]
FRAMES = 9
"""Of a chunk."""


@pytest.fixture(autouse=True)
def folder(tmp_path, cache, presets, monkeypatch) -> Path:
    monkeypatch.setenv("HELIOS_CP_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generate(*arguments: str) -> int:
    return main([*QUICK, *arguments])


def refusal(capfd, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        generate(*arguments)
    assert ended.value.code == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    return err


def frames_in(path: Path | str) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Calls that share files


def test_the_second_call_is_refused_before_it_loads_or_writes_anything(folder, no_weights, capfd):
    """Of one output, also by another name; of one run folder; and of a batch that has one output of the two."""
    (folder / "link.mp4").symlink_to("out.mp4")
    job = Job(Request(prompt=("a",)), (Path("out.mp4"),), Path("run"))
    with claimed(job):
        before = names(folder)
        for output in ("out.mp4", "link.mp4", str(folder / "out.mp4")):
            line = refusal(capfd, "--prompt", "a", "--output", output)
            assert f"--output {output}: another call is writing there (process {os.getpid()} on " in line
        line = refusal(capfd, "--prompt", "a", "--output", "b.mp4", "--checkpoint-dir", "run")
        assert "run folder run: another call is writing there" in line
        assert names(folder) == before
    assert names(folder) == ["link.mp4"]
    with claimed(Job(Request(), (Path("out-1.mp4"),))):
        assert "out-1.mp4" in refusal(capfd, "--prompt", "a", "--prompt", "b")


def jobs(count: int) -> list[Job]:
    return [Job(Request(prompt=("a",)), (Path("videos", f"{number}.mp4"),)) for number in range(count)]


def test_calls_take_the_videos_of_a_prompt_file_in_turns(folder, capfd):
    """Two calls on three videos: each takes what the other has not in hand, and each video is made once."""
    three, made = jobs(3), []
    finished = lambda job: job.output[0].exists()  # noqa: E731
    calls = [turns(three, finished) for _ in range(2)]
    for call in (0, 1):
        made.append((call, *next(calls[call])))  # videos 0 and 1, both in hand now
    third = next(calls[0])
    made.append((0, *third))
    assert [number for _, number, _ in made] == [0, 1, 2]
    for _, number, claim in made:
        three[number].output[0].touch()
        claim.close()
    assert list(calls[0]) == list(calls[1]) == []
    assert names(folder) == ["videos", "videos/0.mp4", "videos/1.mp4", "videos/2.mp4"]
    assert capfd.readouterr().err.count("exists, skipped") == 3


def test_what_another_call_gave_up_is_made_in_the_end(capfd):
    with ExitStack() as other:
        other.enter_context(claimed(jobs(2)[0]))
        own = turns(jobs(2), lambda job: False)
        number, claim = next(own)
        assert number == 1
        claim.close()
        other.close()
        number, claim = next(own)
        assert number == 0
        claim.close()
    with claimed(jobs(1)[0]):
        assert list(turns(jobs(1), lambda job: False)) == []
    assert "videos/0.mp4: another call is making it, skipped" in capfd.readouterr().err


def test_a_claim_is_on_all_files_of_a_job_or_on_none():
    batch = Job(Request(), (Path("a.mp4"), Path("b.mp4")))
    with (
        claimed(Job(Request(), (Path("b.mp4"),))),
        pytest.raises(InUseError, match=r"b\.mp4"),
        claimed(batch),
    ):
        pytest.fail("two hold b.mp4")
    with claimed(replace(batch, folder=Path("run"))):
        pass


# The same call again


def stop_in(monkeypatch, chunk: int, number: int) -> None:
    """Send this process a signal in a chunk, once."""
    step, sent = ProgressReporter.step, []

    def stopping(self, now):
        step(self, now)
        if now.chunk == chunk and not sent:
            sent.append(number)
            signal.raise_signal(number)

    monkeypatch.setattr(ProgressReporter, "step", stopping)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_each_signal_leaves_what_is_finished_and_the_same_call_goes_on(folder, monkeypatch, capfd, number):
    call = ["--prompt", "a", "--num-frames", "27", "--save-latents", "l.safetensors", "--checkpoint-dir", "run"]
    handlers = [signal.getsignal(each) for each in SIGNALS]
    with monkeypatch.context() as patch:
        stop_in(patch, 1, number)
        assert generate(*call) == 128 + number
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    assert frames_in("out.mp4") == FRAMES and load_file("l.safetensors")["latents"].shape[2] == 3
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == (
        "stopped; out.mp4: 1 of 3 chunks are finished and can be played, 9 frames; go on with --resume run, "
        "or with the same call"
    )
    assert generate(*call) == 0
    assert "out.mp4: 18 frames" in capfd.readouterr().out and frames_in("out.mp4") == 3 * FRAMES
    assert not list(folder.glob(".*")) and not Path("run/lock").exists()
    if number == signal.SIGINT:
        whole, latents = Path("out.mp4").read_bytes(), Path("l.safetensors").read_bytes()
        assert generate(*call) == 0, "a finished run is finished"
        assert generate(*call[:-2]) == 0
        assert Path("out.mp4").read_bytes() == whole and Path("l.safetensors").read_bytes() == latents


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_while_loading_is_told(folder, monkeypatch, capfd, number):
    monkeypatch.setattr(runner, "load_pipeline", lambda *_: signal.raise_signal(number))
    assert generate("--prompt", "a") == 128 + number
    assert capfd.readouterr().err.splitlines()[-1] == "stopped before the first chunk; nothing was written"
    assert names(folder) == []


def test_a_run_keeps_what_it_was_made_with_and_says_what_differs(capfd):
    """Attention is taken over from it: an engine that this device lacks is refused. What differs is a remark."""
    assert generate("--prompt", "a", "--num-frames", "9", "--checkpoint-dir", "run") == 0
    made_with = RunFolder.open(Path("run")).run.made_with
    assert made_with.layout == Layout() and made_with.versions["torch"] == torch.__version__
    values = json.loads(Path("run/run.json").read_text())
    values["made_with"]["versions"]["torch"] = "1.0"
    values["made_with"]["layout"] = asdict(Layout(Degrees(ulysses=2), attention="flash"))
    Path("run/run.json").write_text(json.dumps(values))
    with pytest.raises(SystemExit):
        main(["--resume", "run"])
    assert "--attention flash: " in capfd.readouterr().err
    assert main(["--resume", "run", "--attention", "native"]) == 0
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "it was begun with" in line]
    assert line.startswith("run folder run: it was begun with cfg 1 ring 1 ulysses 2")
    assert f"torch 1.0, now {torch.__version__}" in line and "diffusers" not in line


@pytest.mark.parametrize(
    ("ranks", "asked", "expected"),
    [
        (2, {}, {"ulysses": 2, "ring": 1, "attention": "cudnn", "shard_weights": True}),
        (4, {}, {"ulysses": None, "attention": "cudnn", "shard_weights": None}),
        (2, {"ring": 2}, {"ulysses": None, "ring": 2, "attention": "cudnn"}),
        (2, {"attention": "native"}, {"ulysses": 2, "attention": "native"}),
        (2, {"layout": "auto"}, {"ulysses": None, "attention": "cudnn"}),
    ],
)
def test_resuming_takes_over_the_layout_of_as_many_ranks(ranks, asked, expected):
    made_with = MadeWith(Layout(Degrees(ulysses=2), "cudnn", True))
    saved = Run(Request(prompt=("a",)), "random-base", "float32", ("a.mp4",), made_with=made_with)
    kept = vars(with_saved_layout(AskedLayout(**asked), saved, ranks))
    assert expected.items() <= kept.items()


# Failures


@pytest.fixture
def loads(monkeypatch):
    """Counts how often the model is loaded."""
    load, count = runner.load_pipeline, []
    monkeypatch.setattr(runner, "load_pipeline", lambda *arguments: (count.append(1), load(*arguments))[1])
    return count


def fail(monkeypatch, error: Exception) -> None:
    """A prompt that says so fails in its first chunk."""
    stream = Pipeline.stream

    def broken(self, request, *arguments, **options):
        for chunk in stream(self, request, *arguments, **options):
            if "fail" in request.prompt[0]:
                raise error
            yield chunk

    monkeypatch.setattr(Pipeline, "stream", broken)


@pytest.mark.parametrize(
    ("error", "times"),
    [(RuntimeError("the card broke"), 2), (RequestError("--image a: it is gone"), 1)],
    ids=["card", "input"],
)
def test_a_model_that_an_error_may_have_broken_is_loaded_again(folder, loads, monkeypatch, capfd, error, times):
    Path("p.txt").write_text("a fox\nfail here\nan owl\n")
    fail(monkeypatch, error)
    assert generate("--prompt-file", "p.txt", "--num-frames", "9") == 1
    assert len(loads) == times
    assert names(folder / "outputs") == ["0.mp4", "2.mp4"]
    err = capfd.readouterr().err
    assert f"outputs/1.mp4: {type(error).__name__}: {error}" in err and ("Traceback" in err) == (times == 2)


def test_later_videos_are_not_tried_on_a_device_that_stays_broken(folder, loads, monkeypatch, capfd):
    Path("p.txt").write_text("fail here\nan owl\na fox\n")
    fail(monkeypatch, RuntimeError("the card broke"))
    load = runner.load_pipeline

    def sticky(*arguments):
        if loads:
            raise RuntimeError("the card is still broken")
        return load(*arguments)

    monkeypatch.setattr(runner, "load_pipeline", sticky)
    with pytest.raises(RuntimeError, match="still broken"):
        generate("--prompt-file", "p.txt", "--num-frames", "9", "--report", "r.json")
    assert names(folder) == ["p.txt", "r.json"]
    assert [report["error"] for report in json.loads(Path("r.json").read_text())] == ["RuntimeError: the card broke"]


def full(*_, **__):
    raise OSError(28, "No space left on device", "the/file")


@pytest.mark.parametrize("saving", [False, True])
def test_a_full_disk_is_one_line_and_loses_nothing(folder, monkeypatch, capfd, saving):
    """It fills up with the second chunk, and there is no room for the MP4 either."""
    call = ["--prompt", "a", "--num-frames", "27", *(["--checkpoint-dir", "run"] if saving else [])]
    save = ChunkFiles.save
    with monkeypatch.context() as patch:
        patch.setattr(ChunkFiles, "save", lambda self, chunk, *rest: (full if chunk else save)(self, chunk, *rest))
        patch.setattr(ChunkFiles, "join", full)
        assert generate(*call) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    place = "run" if saving else str(folder / ".out.mp4.chunks")
    start = "helios_cp.generate: error: No space left on device: 'the/file'; make room there; out.mp4: 1 of 3 chunks "
    assert last.startswith(f"{start}are finished and can be played in {place}/chunk-*.mp4, 9 frames; ")
    assert frames_in(Path(place, "chunk-00000-0.mp4")) == FRAMES
    if saving:
        assert "--resume run" in last
        assert main(["--resume", "run"]) == 0
        assert frames_in("out.mp4") == 27 and "out.mp4: 18 frames" in capfd.readouterr().out


def test_a_report_that_cannot_be_written_hides_no_error(folder, monkeypatch, capfd):
    from helios_cp.generate import report

    monkeypatch.setattr(report, "write_json", full)
    call = ["--prompt", "a", "--num-frames", "9", "--report", "r.json"]
    assert generate(*call) == 1
    assert "--report: it could not be written: No space left on device: 'the/file'" in capfd.readouterr().err
    assert frames_in("out.mp4") == FRAMES
    monkeypatch.setattr(runner, "encode_segment", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(*call)
