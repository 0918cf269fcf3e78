"""Multi-rank gloo and GPU: torchrun and its agent, their faults, several machines, refused layouts.

`torchrun` is the command that users type, `Job` its agent alone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import av
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from helios_cp.config.ranks import Ranks
from helios_cp.generate.__main__ import main
from helios_cp.pipeline import world
from tests.generate import faulty
from tests.generate.agent import Job

ROOT = Path(__file__).parents[2]
REQUEST = [
    "--prompt",
    "a fox",
    "--height",
    "64",
    "--width",
    "64",
    "--num-frames",
    "99",
    "--pyramid-steps",
    "1",
    "1",
    "1",
]
TIMEOUT = 60
"""Seconds that a rank waits for another that hangs, or is late at the start, in place of the usual ten minutes."""
PATIENCE = 400
"""Seconds after which a job is given up."""


@pytest.fixture
def settings(cache):
    return {"HELIOS_CP_CACHE": str(cache)}


@pytest.fixture
def environment(settings):
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **settings, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def start(arguments: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def torchrun(ranks: int, arguments: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    process = start(["--nproc_per_node", str(ranks), *arguments], folder, environment)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    return process.returncode, stdout, stderr


def frames_in(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def free_port() -> int:
    """One that no other program is given by chance, as those that ask for any get a higher one."""
    for port in range(20000 + os.getpid() % 10000, 32768):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


@pytest.fixture(scope="module")
def alone(presets, cache, tmp_path_factory):
    """The latents of one process without torchrun."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HELIOS_CP_CACHE", str(cache))
        patch.chdir(folder)
        assert main([*REQUEST, "--save-latents", "out.safetensors"]) == 0
    return load_file(folder / "out.safetensors")["latents"]


def test_three_ranks_make_the_video_of_one_and_go_on(alone, tmp_path, settings):
    """An uneven layout. An error ends it after a chunk; then a rank is killed, and the agent starts all again."""
    arguments = ["--ulysses", "3", "--ffn-tp", "3", "--save-latents", "out.safetensors"]
    run = ["raise", "1", *REQUEST, *arguments, "--checkpoint-dir", "run"]
    has_failed, _, stderr = Job(3, tmp_path, settings, faulty.generate, *run).wait(PATIENCE)
    assert has_failed
    assert stderr.count("ArithmeticError: broken on purpose") == 1, stderr
    assert "rank 1 failed:" in stderr and "tests/generate/faulty.py" in stderr
    assert frames_in(tmp_path / "out.mp4") == 33, "the finished chunk is playable"

    resume = ["kill-once", "1", "--resume", "run", *arguments]
    has_failed, stdout, stderr = Job(3, tmp_path, settings, faulty.generate, *resume, restarts=1).wait(PATIENCE)
    assert not has_failed, stderr
    assert stdout.count("fault at") == 2 and "out.mp4: 66 frames" in stdout and frames_in(tmp_path / "out.mp4") == 99
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "run" / "lock").exists()
    latents = load_file(tmp_path / "out.safetensors")["latents"]
    assert (latents - alone).abs().max() <= 1e-4 * (alone.max() - alone.min())


def test_a_lost_rank_ends_the_job(tmp_path, settings):
    """Killed or hanging, the first rank or the second: four jobs side by side, as most of the time is spent waiting."""
    jobs = {}
    for fault, rank in itertools.product(("kill", "hang"), range(2)):
        folder = tmp_path / f"{fault}-{rank}"
        folder.mkdir()
        timeout = ["--timeout", str(TIMEOUT)] if fault == "hang" else []
        arguments = [fault, str(rank), *REQUEST, *timeout]
        jobs[rank, fault] = Job(2, folder, settings, faulty.generate, *arguments)
    for (rank, fault), job in jobs.items():
        has_failed, stdout, stderr = job.wait(PATIENCE)
        assert has_failed and "fault at" in stdout, (fault, stderr)
        assert stderr.count("another rank does not answer") == 1, (fault, stderr)
        assert f"rank {1 - rank}: another rank does not answer" in stderr, fault


def wait_and_leave() -> int:
    """A rank that takes part in a decision, and leaves with the others."""

    def decide() -> dict[str, int]:
        time.sleep(12)  # longer than anybody waits for one who gives no sign of life
        return {"rank": 0}

    def wait_at_most(seconds: float) -> None:
        found.timeout = timedelta(seconds=seconds)
        found._store.set_timeout(found.timeout)

    world.BEAT, ranks, leave = 0.1, Ranks.of(os.environ), dist.destroy_process_group
    found = world.World(ranks, 60)
    wait_at_most(10)
    print(ranks.rank, found.share(decide), flush=True)
    wait_at_most(60)
    dist.destroy_process_group = lambda: (print("a rank leaves", flush=True), leave())
    with found.connected("gloo", torch.device("cpu")):
        if ranks.is_first:
            time.sleep(1)
            print("rank 0 is done", flush=True)
    return 0


def test_ranks_wait_for_a_long_decision_and_leave_together(tmp_path):
    """A decision is long when rank 0 looks through a clip. A rank that left early would close connections in use."""
    has_failed, stdout, stderr = Job(2, tmp_path, {}, wait_and_leave).wait(PATIENCE)
    assert not has_failed, stderr
    lines = stdout.splitlines()
    assert sorted(lines[:2]) == ["0 {'rank': 0}", "1 {'rank': 0}"]
    assert lines[2:] == ["rank 0 is done", "a rank leaves", "a rank leaves"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_ranks_with_graphs_of_messages_end(tmp_path, environment):
    """NCCL lets nobody leave while such a graph is there."""
    graphs = ["-m", "helios_cp.generate", *REQUEST, "--ulysses", "2", "--cuda-graphs"]
    code, _, stderr = torchrun(2, graphs, tmp_path, environment)
    assert code == 0, stderr
    assert frames_in(tmp_path / "out.mp4") == 99


def test_two_machines(alone, tmp_path, environment):
    """Two agents on loopback stand for two machines of one rank each; files are written on the first."""
    port = free_port()
    agents = []
    for node in range(2):
        folder = tmp_path / f"node-{node}"
        folder.mkdir()
        machine = ["--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "1"]
        machine += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        run = ["-m", "helios_cp.generate", *REQUEST, "--ring", "2", "--save-latents", "out.safetensors"]
        agents.append(start([*machine, *run], folder, environment))
    for agent in agents:
        _, stderr = agent.communicate(timeout=PATIENCE)
        assert agent.returncode == 0, stderr
    latents = load_file(tmp_path / "node-0" / "out.safetensors")["latents"]
    assert (latents - alone).abs().max() <= 1e-4 * (alone.max() - alone.min())
    assert not list((tmp_path / "node-1").iterdir())


def test_bad_input_is_said_once(tmp_path, settings):
    arguments = [*REQUEST, "--ulysses", "3"]
    has_failed, _, stderr = Job(2, tmp_path, settings, generate, *arguments).wait(PATIENCE)
    assert has_failed
    lines = [line for line in stderr.splitlines() if "helios_cp.generate: error" in line]
    assert len(lines) == 1 and "--ulysses 3" in lines[0] and "ring 1 ulysses 2" in lines[0]
    assert not list(tmp_path.iterdir())


def generate(*arguments: str) -> int:
    return main(list(arguments))
