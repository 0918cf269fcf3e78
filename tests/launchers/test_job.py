"""Ray by `ray start` and `ray job submit` from the checkout, on private ports, as on a real cluster."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launchers.conftest import PATIENCE, QUICK, UNHURRIED, frames_in

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
PORTS = range(21_000, 32_000)
"""Below those that Linux gives to whoever asks for any, above those of Ray's own workers."""


def is_free(port: int) -> bool:
    with socket.socket() as trial:
        try:
            trial.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_ports(count: int) -> list[int]:
    """Nothing holds them until Ray does, so another program may come before it."""
    shuffled = (port for port in random.sample(PORTS, len(PORTS)) if is_free(port))
    return [next(shuffled) for _ in range(count)]


@pytest.fixture
def head(cache):
    """A head node with a job server; its address and environment. Started twice where a port was lost to another."""
    with contextlib.ExitStack() as stack:
        try:
            started = stack.enter_context(head_node(cache))
        except StartError:
            started = stack.enter_context(head_node(cache))
        yield started


class StartError(Exception):
    """With all that Ray has said."""


@contextlib.contextmanager
def head_node(cache: Path) -> Iterator[tuple[str, dict[str, str]]]:
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    gcs, dashboard, agent, agent_rpc, client = free_ports(5)
    environment = {
        **os.environ,
        **UNHURRIED,
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": folder,
        "OMP_NUM_THREADS": "1",
        "HELIOS_CP_CACHE": str(cache),
        "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}",  # a job's `python` is looked up here
    }
    environment.pop("RAY_ADDRESS", None)
    ports = [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    ports += [f"--dashboard-agent-grpc-port={agent_rpc}", f"--ray-client-server-port={client}"]
    ports += ["--min-worker-port=0", "--max-worker-port=0"]  # whatever is free
    size = ["--num-cpus=4", "--object-store-memory=200000000"]
    said = Path(folder, "said.txt")
    with said.open("w") as output:
        process = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--include-dashboard=true", f"--temp-dir={folder}", *ports, *size],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{dashboard}"
    # The job server waits ten seconds for the agent that is to run a job, and no longer.
    awaited = [f"{address}/api/jobs/", f"http://127.0.0.1:{agent}/api/local_raylet_healthz"]
    try:
        deadline = time.monotonic() + PATIENCE
        while not all(asked(url) for url in awaited):
            if process.poll() is not None or time.monotonic() > deadline:
                raise StartError(said.read_text())
            time.sleep(0.5)
        yield address, environment
    finally:
        process.terminate()
        try:
            process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def asked(url: str) -> bytes | None:
    """What an address answers, `None` if it does not."""
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            return reply.read()
    except OSError:
        return None


def job_of(address: str, name: str) -> str | None:
    """Its status; `None` if the server does not answer."""
    answer = asked(f"{address}/api/jobs/{name}")
    return answer and json.loads(answer)["status"]


def test_a_submitted_job_makes_a_video(head, tmp_path):
    """The command of docs/cluster.md, from the checkout. The job's status is asked for: `ray job submit` may cease to
    follow a job that goes on, https://github.com/ray-project/ray/issues/51601."""
    address, environment = head
    output = tmp_path / "fox.mp4"
    program = ["python", "-m", "launchers.generate", "--address", "auto", *QUICK]
    flags = [
        "--wait",
        str(PATIENCE),
        "--prompt",
        "'a fox'",
        "--num-frames",
        "33",
        "--decoders",
        "0",
        "--output",
        str(output),
    ]
    job = ["--submission-id", "fox", "--no-wait", "--working-dir", "."]
    submitted = subprocess.run(
        [RAY, "job", "submit", "--address", address, *job, "--", *program, *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    deadline = time.monotonic() + PATIENCE
    while (status := job_of(address, "fox")) in (None, "PENDING", "RUNNING") and time.monotonic() < deadline:
        time.sleep(0.5)
    assert status == "SUCCEEDED", asked(f"{address}/api/jobs/fox/logs")
    assert frames_in(output) == 33
