"""Ray by its command lines: generate, resume, status, a submitted job, missing resources; in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from safetensors.torch import load_file

from helios_cp.generate import main as generate_alone
from launchers.automatic import most_ranks
from launchers.generate import build_parser, main
from launchers.recipes import Resources
from tests.launchers.conftest import QUICK, frames_in

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
PATIENCE = 300
"""Seconds for what takes some on a quiet machine."""


@pytest.fixture
def folder(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "launchers.generate", *QUICK, "--prompt", "a fox", *arguments]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def run(*arguments: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments), env=environment(**more), capture_output=True, text=True, timeout=PATIENCE
    )


def test_local_makes_what_torchrun_makes_and_joins_no_cluster(folder, cluster):
    """Two ranks in the same layout: latents, frames and files bit for bit. One rank is in `test_a_killed_driver`."""
    request = ["--num-frames", "66", "--ulysses", "2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "helios_cp.generate"]
    files = ["--output", "a.mp4", "--save-latents", "a.safetensors"]
    alone = [*torchrun, *QUICK, "--prompt", "a fox", *request, "--vae-parallel", "1", *files]
    subprocess.run(alone, env=environment(), capture_output=True, check=True, timeout=PATIENCE)
    files = ["--output", "b.mp4", "--save-latents", "b.safetensors", "--report", "b.json", "--timeline", "b.png"]
    done = run("--address", "local", *request, *files, RAY_ADDRESS=cluster.address)
    assert done.returncode == 0, done.stderr
    latents, others = (load_file(f"{name}.safetensors")["latents"] for name in "ab")
    assert latents.shape == others.shape == (1, 16, 18, 8, 8) and latents.equal(others)
    assert frames_in(Path("b.mp4")) == 66 and Path("b.mp4").read_bytes() == Path("a.mp4").read_bytes()
    report = json.loads(Path("b.json").read_text())
    assert (
        report["complete"] and report["frames"] == 66 and {"denoise", "decode", "write"} <= set(report["stage_seconds"])
    )
    assert Path("b.png").read_bytes().startswith(b"\x89PNG")
    jobs = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    assert not jobs, "nothing ran on the cluster that RAY_ADDRESS names"


def test_a_killed_driver_is_resumed(folder, cluster):
    """SIGKILL in the middle. The driver is halted before, so that the status can be read at leisure."""
    arguments = ["--address", cluster.address, "--num-frames", "660", "--save-latents", "a.safetensors"]
    with subprocess.Popen(
        command(*arguments, "--checkpoint-dir", "run"), env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            next(line for line in process.stderr if "chunk 2 of 20" in line)
            process.send_signal(signal.SIGSTOP)
            shown = subprocess.run(
                [sys.executable, "-m", "launchers.status", "--address", cluster.address],
                env=environment(),
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
        finally:
            process.send_signal(signal.SIGKILL)
    assert shown.returncode == 0, shown.stderr
    for part in ("text ", "group-0", "decoder-0", "writer", " on node ", "of 20 chunks, running", "chunks a second"):
        assert part in shown.stdout, shown.stdout
    finished = json.loads(Path("run/state.json").read_text())["chunks"]
    assert 2 <= finished < 20 and not Path("a.safetensors").exists()

    resume = [sys.executable, "-m", "launchers.generate", "--address", cluster.address, "--resume", "run"]
    done = subprocess.run(
        [*resume, "--save-latents", "b.safetensors", "--report", "b.json"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("b.json").read_text())["resumed_from_chunk"] == finished
    assert frames_in(Path("out.mp4")) == 660
    alone = [*QUICK, "--prompt", "a fox", "--num-frames", "660", "--save-latents", "c.safetensors", "--output", "c.mp4"]
    assert generate_alone(alone) == 0
    assert load_file("b.safetensors")["latents"].equal(load_file("c.safetensors")["latents"])
    assert Path("out.mp4").read_bytes() == Path("c.mp4").read_bytes()


def test_missing_resources_are_told_within_thirty_seconds(folder, cluster):
    """From when it looks for workers, with no `--wait` given; what is missing, and what each node has."""
    arguments = ["--address", cluster.address, "--ulysses", "4", "--ring", "3", "--height", "128", "--width", "128"]
    with subprocess.Popen(command(*arguments), env=environment(), stderr=subprocess.PIPE, text=True) as process:
        lines = [(time.monotonic(), line) for line in process.stderr]
    assert process.returncode == 1
    loading = next(when for when, line in lines if line.startswith("loading"))
    told, last = lines[-1]
    assert "group-0 needs 12 CPU on one node" in last and "no node has 12 CPU at all" in last, lines
    assert " of 8 CPU free" in last and " of 4 CPU free" in last and "fewer --groups" in last
    assert told - loading < 30


def test_layout_auto_sees_what_the_cluster_has_free(cluster):
    arguments = build_parser().parse_args(["--layout", "auto", "--address", cluster.address, "--decoders", "3"])
    assert most_ranks(arguments, "cpu", Resources()) == 8, "the other node has room for decoders and text encoder"
    arguments.decoders = 4
    assert most_ranks(arguments, "cpu", Resources()) == 7


def test_no_cluster_is_told(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = run("--address", f"127.0.0.1:{port}", "--num-frames", "33")
    assert done.returncode == 1
    assert any("error: --address" in line and "no Ray cluster answers" in line for line in done.stderr.splitlines())


REFUSED = {
    "no group": ["--groups", "0"],
    "no rank": ["--ranks", "0"],
    "ranks that are not those of the layout": ["--ulysses", "2", "--ranks", "3"],
    "a layout for an unknown number of ranks": ["--layout", "auto", "--spread"],
    "less than no decoder": ["--decoders", "-1"],
    "a split VAE": ["--vae-parallel", "2"],
    "more ranks than heads": ["--ulysses", "5"],
    "no chunk under way": ["--undelivered", "0"],
    "a timeline of another kind": ["--timeline", "a.gif"],
    "an unknown flag": ["--group", "2"],
    "a bad size": ["--height", "65"],
}


@pytest.mark.parametrize("flags", REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line_before_anything_starts(flags, folder, capsys, monkeypatch):
    monkeypatch.setattr("launchers.runner.connected", None)  # no instance is started
    with pytest.raises(SystemExit) as refusal:
        main([*QUICK, "--prompt", "a fox", *flags])
    assert refusal.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and flags[0] in stderr and "launchers.generate: error" in stderr


def test_flags_are_those_of_the_single_program():
    from helios_cp.generate import build_parser as single

    flags = {flag for action in build_parser()._actions for flag in action.option_strings}
    assert {flag for action in single()._actions for flag in action.option_strings} < flags
