"""Ray by `ray start` and `ray job submit`, on private ports, as on a real cluster."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from tests.launchers.conftest import QUICK, frames_in

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
PATIENCE = 300


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def head(cache):
    """A head node with a job server; its address and environment."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    gcs, dashboard, agent, agent_rpc, client = free_ports(5)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": folder,
        "OMP_NUM_THREADS": "1",
        "HELIOS_CP_CACHE": str(cache),
    }
    environment.pop("RAY_ADDRESS", None)
    ports = [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    ports += [f"--dashboard-agent-grpc-port={agent_rpc}", f"--ray-client-server-port={client}"]
    size = ["--num-cpus=4", "--object-store-memory=200000000"]
    process = subprocess.Popen(
        [RAY, "start", "--head", "--block", "--include-dashboard=true", f"--temp-dir={folder}", *ports, *size],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + PATIENCE
        while not answers(f"{address}/api/jobs/"):
            assert process.poll() is None and time.monotonic() < deadline, "the job server does not answer"
            time.sleep(0.5)
        yield address, environment
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def test_a_submitted_job_makes_a_video(head, tmp_path):
    address, environment = head
    work = tmp_path / "work"
    for package in ("helios_cp", "parallel", "launchers"):
        shutil.copytree(ROOT / package, work / package, ignore=shutil.ignore_patterns("__pycache__"))
    output = tmp_path / "fox.mp4"
    program = ["python", "-m", "launchers.generate", "--address", "auto", *QUICK]
    flags = ["--prompt", "'a fox'", "--num-frames", "66", "--output", str(output)]
    program[0] = sys.executable
    submitted = subprocess.run(
        [RAY, "job", "submit", "--address", address, "--working-dir", str(work), "--", *program, *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "succeeded" in submitted.stdout and frames_in(output) == 66
