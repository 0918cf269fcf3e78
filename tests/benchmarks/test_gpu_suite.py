"""Unit and processes of its own: the GPU suite with tiny sizes on the CPU.

What it measures is compared with nothing here but its own arithmetic and the exact counts of a rank's share; that its
phases run, survive each other and leave whole files is the point.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu_suite import __main__ as gpu_suite
from benchmarks.gpu_suite import phases as gpu_suite_phases
from benchmarks.gpu_suite.fps import measure_fps
from benchmarks.gpu_suite.one_rank_share import lone_rank
from benchmarks.gpu_suite.phases import PHASES, PYTEST, end_pytest, gpu_test_files, run_tests
from benchmarks.gpu_suite.profile import PROFILE, Factors, Share, predict_share, share_workload
from benchmarks.gpu_suite.runner import Record
from benchmarks.gpu_suite.scope import Scope
from benchmarks.measuring.machine import CHECKOUT
from benchmarks.models import full_size
from helios_cp.config.execution import Execution
from helios_cp.plan.hardware import read_profile
from parallel.mesh import Degrees
from tests.benchmarks.test_gpu_suite_runner import is_running, read, wait_until

NAMES = [phase.name for phase in PHASES]
NOT_THERE = ("rich", "hypothesis", "skimage", "imageio", "scipy", "matplotlib", "peft", "torchao", "ray", "yunchang")
"""Packages that a machine for measuring may lack, and the suite and the GPU tests must do without."""


@pytest.fixture
def lacking(tmp_path) -> dict[str, str]:
    """The environment of processes that cannot import these, and for which `importlib.util.find_spec` finds none."""
    folder = tmp_path / "lacking"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({NOT_THERE}))\n")
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Without the plugins of pytest that come with such packages.
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def test_a_killed_suite_leaves_what_was_measured(tmp_path, lacking):
    """Killed in its second phase, which has chunks for an hour: the first one's file is whole, and nothing goes on."""
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--dry-run", "--chunks", "9999", "--output", str(tmp_path)]
    command += ["--phases", "gpu_rates", "gpu_fps"]
    with (tmp_path / "said").open("w") as said:
        suite = subprocess.Popen(command, cwd=CHECKOUT, env=lacking, stdout=said, stderr=said)
    try:
        wait_until(lambda: (tmp_path / "gpu_fps.json").exists() or suite.poll() is not None)
        assert suite.poll() is None, (tmp_path / "said").read_text()
        process = read(tmp_path, "gpu_fps")["process"]
    finally:
        suite.kill()
        suite.wait()
    wait_until(lambda: not is_running(process))
    rates, about = read(tmp_path, "gpu_rates"), json.loads((tmp_path / "gpu_rates.json").read_text())
    assert rates["status"] == "finished" and rates["copy_bytes_per_second"] > 0
    assert about.keys() >= {"machine", "versions", "commit", "command", "date"}
    assert "status" in read(tmp_path, "gpu_fps")


# The phases


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    """One dry run of everything."""
    folder = tmp_path_factory.mktemp("suite")
    assert gpu_suite.main(["--dry-run", "--chunks", "2", "--output", str(folder)]) in (0, 1)
    return folder


def test_every_phase_finishes_and_has_a_file(suite):
    assert [
        *("gpu_rates", "gpu_fps_eager", "gpu_fps", "gpu_fps_fp8", "gpu_vae", "gpu_memory", "gpu_share"),
        *("gpu_fps_graphs", "gpu_tests"),
    ] == NAMES
    assert {name: read(suite, name)["status"] for name in NAMES} == dict.fromkeys(NAMES, "finished")


def test_budgets_are_of_what_there_is():
    """All phases fit even if each takes all of its time, and the command into 9 minutes, with 15 s to end."""
    assert gpu_suite.STARTING + sum(phase.seconds for phase in PHASES) <= gpu_suite.SECONDS <= 9 * 60 - 15


def test_the_time_of_the_suite_begins_with_the_command(tmp_path, monkeypatch):
    """Imports and a first touch of the device take their time too."""
    deadlines = []
    monkeypatch.setattr("benchmarks.gpu_suite.runner.run_phases", lambda *given: deadlines.append(given[3]) or {})
    ticks = itertools.count(1000.0, 50.0)
    monkeypatch.setattr(gpu_suite, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    gpu_suite.main(["--dry-run", "--output", str(tmp_path), "--seconds", "300"])
    gpu_suite.main(["--dry-run", "--output", str(tmp_path)])
    assert deadlines == [1300.0, math.inf]


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
    full = read(suite, "gpu_fps")["settings"]["distilled-222"]
    assert full["programs"].keys() == {"diffusers", "ours, eager", "ours, compiled"}
    assert all(program["fps"] > 0 for program in full["programs"].values())
    assert "ours, compiled over diffusers" in full["speedups"]


@pytest.mark.parametrize(
    ("name", "wanted"), [("gpu_fps_fp8", {"ours, fp8", "ours, fp8, VAE bf16"}), ("gpu_fps_graphs", {"ours, graphs"})]
)
def test_what_compiles_longest_is_beside_eager_alone(suite, name, wanted):
    found = read(suite, name)
    programs = found["settings"]["distilled-111"]["programs"]
    assert programs["ours, eager"]["fps"] > 0
    assert programs.keys() | found["errors"].keys() == {"ours, eager", *wanted}, "each is measured, or says why not"


def test_what_would_be_compiled_too_late_is_left_out(tmp_path, monkeypatch):
    """The others go on; a phase without a deadline leaves nothing out."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    scope = Scope("tiny", "cpu", "float32", 2, False, ())
    variants = {"ours, compiled": Execution(compile=True)}
    programs = {}
    for name, deadline in (("late", time.monotonic()), ("in time", math.inf)):
        record = Record(tmp_path, name, deadline)
        measure_fps(scope, record, variants, with_peer=False, warmup=0)
        programs[name] = record.values["settings"]["distilled-222"]["programs"].keys()
        assert ("distilled-111 ours, compiled" in record.values["errors"]) == (name == "late")
    assert programs == {"late": {"ours, eager"}, "in time": {"ours, eager", "ours, compiled"}}


def test_vae_in_every_dtype(suite):
    found = read(suite, "gpu_vae")
    decodes = found["decodes"]
    assert decodes.keys() | found["errors"].keys() >= {"float32", "TF32", "bfloat16", "bfloat16, compiled"}
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


def test_shares_make_a_profile_that_the_planner_reads(suite, capsys):
    """On the fitted profile the median forward, and the decode by one rank, take what was measured."""
    plan = pytest.importorskip("helios_cp.plan.__main__")  # which prints with rich
    found = read(suite, "gpu_share")
    profile = suite / PROFILE
    assert plan.main(["--hardware", str(profile), "--gpus", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hardware"]["name"].startswith("calibrated")
    hardware = read_profile(profile)
    assert "fitted to one rank's measured parts" in dict(hardware.sources)["matmul_flops"]
    workload = share_workload(Scope("tiny", "cpu", "float32", 2, False, ()))
    measured = {
        Degrees(**each["degrees"]): Share(tuple(s["seconds"] for s in each["stages"]), each["decode_seconds"])
        for each in found["shares"].values()
    }
    again = Factors.fit(measured, {degrees: predict_share(workload, degrees, hardware) for degrees in measured})
    assert (again.forwards, again.decode) == pytest.approx((1, 1))
    assert len(found["comparisons"]) == 4 and found["median_error"] >= 0


# GPU tests


def test_gpu_tests_are_run_and_counted(suite):
    found = read(suite, "gpu_tests")
    assert found["exit_code"] == 0 and found["tests"] >= 1 and found["failures"] == found["errors"] == 0
    assert (suite / found["log"]).exists()
    assert "tests/parallel/test_collectives.py" in gpu_test_files()


ONE_FAILS = """
import pytest, time
pytestmark = [getattr(pytest.mark, "gpu")]
def test_fails(): assert False
def test_passes(): pass
def test_takes_long():
    print("takes long", flush=True)
    time.sleep({sleep})
"""
SKIPPED = """
import pytest
pytestmark = [getattr(pytest.mark, "gpu")]
def test_skipped(): pytest.skip("no reason")
"""


@pytest.mark.parametrize(
    ("files", "device", "said", "counts"),
    [
        (["import no_such_module", ONE_FAILS.format(sleep=0)], "cpu", "exit code 1, see", (4, 1, 1, 0)),
        ([SKIPPED], "cuda", "no test was run: 1 were skipped", (1, 0, 0, 1)),
    ],
    ids=["a file that cannot be imported", "all skipped"],
)
def test_gpu_tests_that_did_not_run_are_no_success(tmp_path, files, device, said, counts):
    for index, text in enumerate(files):
        (tmp_path / f"test_{index}.py").write_text(text)
    paths = tuple(str(path) for path in sorted(tmp_path.glob("test_*.py")))
    record = Record(tmp_path, "gpu_tests", math.inf)
    with pytest.raises(RuntimeError, match=said):
        run_tests(Scope("tiny", device, "float32", 2, False, paths), record)
    assert tuple(record.values[name] for name in ("tests", "failures", "errors", "skipped")) == counts


def test_gpu_tests_have_no_more_than_their_time(tmp_path):
    (tmp_path / "test_long.py").write_text(ONE_FAILS.format(sleep=600))
    record = Record(tmp_path, "gpu_tests", time.monotonic())
    with pytest.raises(RuntimeError, match="pytest ended with exit code"):
        run_tests(Scope("tiny", "cpu", "float32", 2, False, (str(tmp_path / "test_long.py"),)), record)


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN], ids=["in front", "in the background"])
def test_tests_that_are_cut_leave_their_counts(tmp_path, monkeypatch, handler):
    """A shell without job control has what it starts in the background ignore SIGINT."""
    monkeypatch.setattr(gpu_suite_phases, "SECONDS_TO_END", 600)  # on a machine that may be busy
    (tmp_path / "test_long.py").write_text(ONE_FAILS.format(sleep=600))
    report = tmp_path / "report.xml"
    command = [sys.executable, "-c", PYTEST, "-s", "--junitxml", str(report), str(tmp_path / "test_long.py")]
    before = signal.signal(signal.SIGINT, handler)
    try:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert any("takes long" in line for line in process.stdout)
        assert end_pytest(process) == pytest.ExitCode.INTERRUPTED
    assert '<testsuite name="pytest" errors="0" failures="1" skipped="0" tests="2"' in report.read_text()


def test_gpu_tests_are_found_without_the_packages_that_may_be_missing(lacking):
    """Every file is imported; those whose GPU tests need such a package say so."""
    flags = ["-m", "gpu", "--collect-only", "-q", "-rs", "-p", "no:cacheprovider", *gpu_test_files()]
    command = [sys.executable, "-m", "pytest", *flags]
    found = subprocess.run(command, cwd=CHECKOUT, env=lacking, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    skipped = {line.split()[2].partition(":")[0] for line in found.stdout.splitlines() if line.startswith("SKIPPED")}
    assert skipped == {
        f"tests/{name}.py" for name in ("benchmarks/test_attention", "benchmarks/test_decode", "weights/test_quantize")
    }
    listed = {line.partition(":")[0] for line in found.stdout.splitlines() if line.startswith("tests/")}
    assert listed == {*gpu_test_files()} - skipped


# Shares


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
