"""Unit and processes of its own: the GPU suite with tiny sizes on the CPU.

What it measures is compared with nothing here but its own arithmetic and the exact counts of a rank's share; that its
phases run, survive each other and leave whole files is the point.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import full_size, gpu_suite
from benchmarks.gpu_suite_phases import PHASES, gpu_test_files
from benchmarks.gpu_suite_runner import Phase, Record, run_phases
from benchmarks.gpu_suite_share import lone_rank
from benchmarks.machine import CHECKOUT
from parallel.mesh import Degrees

NAMES = [phase.name for phase in PHASES]
NOT_THERE = ("rich", "hypothesis", "skimage", "matplotlib", "ray", "yunchang", "xfuser")
"""Packages that a machine for measuring may lack, and the suite must do without."""


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())["results"]


# The runner


def quick(scope, record: Record) -> None:
    record.update(figure=scope)


def failing(scope, record: Record) -> None:
    record.update(figure=1)
    raise ValueError("what a phase\nmay raise")


def crashing(scope, record: Record) -> None:
    os._exit(7)


def hanging(scope, record: Record) -> None:
    record.update(figure=2, child=subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid)
    time.sleep(600)


def is_running(pid: int) -> bool:
    """Whether the process exists and has not ended; one that nobody has waited for yet has ended too."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_phases_neither_stop_nor_outlive_each_other(tmp_path):
    phases = [
        Phase("failing", 60, failing),
        Phase("crashing", 60, crashing),
        Phase("hanging", 5, hanging),
        Phase("quick", None, quick),
    ]
    (tmp_path / "quick.json").write_text("of an earlier run")
    statuses = run_phases(phases, 5, tmp_path, seconds=120)
    assert statuses == {"failing": "failed", "crashing": "failed", "hanging": "cut", "quick": "finished"}
    failed = read(tmp_path, "failing")
    assert failed["error"] == "ValueError: what a phase may raise" and failed["figure"] == 1
    assert "exit code 7" in read(tmp_path, "crashing")["error"]
    cut = read(tmp_path, "hanging")
    assert cut["figure"] == 2 and "5 s, its budget" in cut["error"]
    wait_until(lambda: not is_running(cut["child"]), 10)
    assert read(tmp_path, "quick")["figure"] == 5


def test_without_time_a_phase_is_skipped_and_says_so(tmp_path):
    assert run_phases([Phase("quick", None, quick)], 5, tmp_path, seconds=1) == {"quick": "skipped"}
    assert "s were left" in read(tmp_path, "quick")["error"]


def test_a_killed_suite_leaves_what_was_measured(tmp_path):
    """Killed in its second phase: the first one's file is whole, and no process goes on."""
    for name in NOT_THERE:
        (tmp_path / "lacking").mkdir(exist_ok=True)
        (tmp_path / "lacking" / f"{name}.py").write_text("raise ImportError('not on this machine')")
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--dry-run", "--chunks", "2", "--output", str(tmp_path)]
    command += ["--phases", "gpu_rates", "gpu_fps"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path / "lacking")}
    suite = subprocess.Popen(
        command, cwd=CHECKOUT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_until((tmp_path / "gpu_fps.json").exists, 120)
    suite.send_signal(signal.SIGKILL)
    suite.wait()
    rates, about = read(tmp_path, "gpu_rates"), json.loads((tmp_path / "gpu_rates.json").read_text())
    assert rates["status"] == "finished" and rates["copy_bytes_per_second"] > 0
    assert about.keys() >= {"machine", "versions", "commit", "command", "date"}
    assert "status" in read(tmp_path, "gpu_fps")
    written = (tmp_path / "gpu_fps.json").read_text()
    time.sleep(1.5)  # a phase that lived on would write its next turn
    assert (tmp_path / "gpu_fps.json").read_text() == written


# The phases


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    """One dry run of everything."""
    folder = tmp_path_factory.mktemp("suite")
    assert gpu_suite.main(["--dry-run", "--chunks", "2", "--output", str(folder), "--seconds", "400"]) in (0, 1)
    return folder


def test_every_phase_finishes_and_has_a_file(suite):
    assert NAMES == ["gpu_rates", "gpu_fps_eager", "gpu_fps", "gpu_vae", "gpu_share", "gpu_memory", "gpu_tests"]
    assert {name: read(suite, name)["status"] for name in NAMES} == dict.fromkeys(NAMES, "finished")


def test_budgets_leave_time_for_the_end():
    assert sum(phase.seconds or 0 for phase in PHASES) <= gpu_suite.SECONDS + 75
    assert gpu_suite.SECONDS <= 530 and PHASES[-1].seconds is None


def test_rates(suite):
    rates = read(suite, "gpu_rates")
    assert rates["matmul_flops_per_second"].keys() >= {"float32", "TF32"}
    assert len(rates["attention_flops_per_second_by_tokens"]) == 3


def test_fps_of_all_programs(suite):
    eager = read(suite, "gpu_fps_eager")
    for setting, steps in (("distilled-111", [1, 1, 1]), ("distilled-222", [2, 2, 2])):
        found = eager["settings"][setting]
        assert found["steps"] == steps and found["programs"].keys() == {"diffusers", "ours, eager"}
        assert all(program["fps"] > 0 for program in found["programs"].values())
        assert found["differences from diffusers"]["ours, eager"] < 1e-4
    full = read(suite, "gpu_fps")
    programs = full["settings"]["distilled-111"]["programs"]
    wanted = {"diffusers", "ours, eager", "ours, compiled", "ours, fp8", "ours, fp8, VAE bf16", "ours, graphs"}
    assert programs.keys() | full["errors"].keys() == wanted, "each is measured, or says why not"
    assert programs["ours, eager"]["fps"] > 0 and programs["ours, compiled"]["fps"] > 0


def test_vae_in_every_dtype(suite):
    found = read(suite, "gpu_vae")
    decodes = found["decodes"]
    assert decodes.keys() | found["errors"].keys() >= {"float32", "TF32", "bfloat16", "bfloat16, channels last"}
    assert decodes["float32"]["grey_levels_from_float32"] == {"mean": 0.0, "most": 0.0}
    assert 0 < decodes["bfloat16"]["grey_levels_from_float32"]["mean"] < 5
    assert decodes["float32"]["flops_per_second"] == found["flops"] / decodes["float32"]["median"]


def test_shares_of_ranks(suite):
    shares = read(suite, "gpu_share")["shares"]
    assert list(shares) == ["1", "2", "4", "8"]
    for ranks, values in shares.items():
        degrees = values["degrees"]
        assert (degrees["ulysses"] * degrees["ring"] == int(ranks) and degrees["vae"] > 1) or ranks == "1"
        denoise = sum(stage["seconds"] for stage in values["stages"])
        assert values["fps_without_messages"]["[1, 1, 1]"] == 33 / (denoise + values["decode_seconds"])
    flops = {ranks: sum(stage["flops"] for stage in values["stages"]) for ranks, values in shares.items()}
    assert flops["1"] > flops["2"] > flops["4"] > flops["8"] > flops["1"] / 8


def test_memory_with_offload(suite):
    found = read(suite, "gpu_memory")
    assert found["peaks"].keys() | found["errors"].keys() == {"resident", "offload group", "offload model"}
    assert found["peaks"]["resident"]["peak_bytes"] > 0


def test_gpu_tests_are_run_and_counted(suite):
    found = read(suite, "gpu_tests")
    assert found["exit_code"] == 0 and found["tests"] >= 1 and found["failures"] == found["errors"] == 0
    assert (suite / found["log"]).exists()
    assert "tests/parallel/test_collectives.py" in gpu_test_files()


def test_what_a_lone_rank_receives_is_random_and_of_the_right_shape():
    """Zeros would be computed faster, and are not what arrives."""
    checkpoint = full_size.named_checkpoint("tiny")
    with lone_rank(Degrees(ulysses=2)) as mesh:
        sent = torch.zeros(6)
        received = mesh.ulysses.all_to_all(sent, [3, 3], [3, 5])
        assert received.shape == (8,) and received.unique().numel() == 8
        pipeline = full_size.build_random(checkpoint, mesh, dtype=torch.float32, device=torch.device("cpu"))
        assert pipeline.transformer.sequence.group.size == 2


# Command line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--phases", "gpu_fsp"], "--phases gpu_fsp: allowed are gpu_rates, gpu_fps_eager"),
        (["--dry-run", "--chunks", "1"], "--chunks 1: must be 2 or more"),
        (["--dry-run", "--seconds", "-1"], "--seconds -1: a number above 0"),
        (["--device", "cpu"], "--device cpu: this is a CPU, and full size takes a GPU; use --dry-run"),
        (["--output", "/dev/null"], "--output /dev/null"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_arguments_are_one_line(flags, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_suite.main(flags)
    error = capsys.readouterr().err
    assert error.startswith("benchmarks.gpu_suite: error: ") and said in error and error.count("\n") == 1


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite, "NEEDED", ("torch", "no_such_wheel"))
    with pytest.raises(SystemExit, match="2"):
        gpu_suite.main(["--dry-run"])
    assert "no_such_wheel: not installed; put wheels on PYTHONPATH" in capsys.readouterr().err
