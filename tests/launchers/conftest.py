"""A Ray cluster of two nodes on this machine that the tests of this folder share, and requests small enough for it."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import save_file

from helios_cp.config.request import Request
from helios_cp.pipeline.pipeline import Pipeline
from launchers.cluster.cluster import STARTS

SMALL = Request(
    prompt=("a fox",), height=64, width=64, num_frames=99, pyramid_num_inference_steps_list=(1, 1, 1), seed=(7,)
)
STORE_BYTES = 200 * 2**20
PATIENCE = 300
"""Seconds for what takes a few on a quiet machine."""

UNHURRIED = {
    "RAY_worker_register_timeout_seconds": str(PATIENCE),
    "RAY_agent_register_timeout_ms": str(1000 * PATIENCE),
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(PATIENCE),
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_niceness": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""For Ray's environment: a busy machine may take its time to start a process, and Ray ends none for the memory that all
programs on it take together. Its workers, which are of low priority as it comes, get as much of the cores as the other
tests, because else they would wait for all of these. It starts no process for each logical CPU in advance, because here
there are more of these than cores, and gathers no figures."""

QUICK = ["--height", "64", "--width", "64", "--pyramid-steps", "1", "1", "1"]


@pytest.fixture(scope="session")
def cluster(cache):
    """Nodes of 8 and 4 logical CPUs, whatever the machine has. "head" is a resource of the first alone."""
    patch = pytest.MonkeyPatch()
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setenv("HELIOS_CP_CACHE", str(cache))
    for name, value in UNHURRIED.items():
        patch.setenv(name, value)
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: Ray's sockets lie in it
    patch.setenv("RAY_TMPDIR", folder)
    logging.getLogger("ray").setLevel(logging.ERROR)
    store = {"object_store_memory": STORE_BYTES}
    head = {"num_cpus": 8, "resources": {"head": 8}, **store}
    head |= {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
    # A busy machine must not look like a dead one, and a dead one should not take the default 15 s to notice.
    system = {"health_check_period_ms": 1000, "health_check_failure_threshold": 8, "health_check_timeout_ms": 5000}
    cluster = start(head, system, {"num_cpus": 4, **store})
    ray.init(cluster.address, log_to_driver=False, logging_level="error")
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
    patch.undo()


def start(head: dict, system: dict, other: dict) -> Cluster:
    """Two nodes. Ray gives each 30 s to start, which a busy machine may need more than once."""
    for attempt in range(STARTS):
        cluster = Cluster()
        try:
            cluster.add_node(**head, _system_config=system)
            cluster.add_node(**other)
            return cluster
        except Exception:  # a bare one
            cluster.shutdown()
            if attempt + 1 == STARTS:
                raise


@pytest.fixture(scope="session")
def model(presets) -> str:
    return str(presets["random-distilled"])


@pytest.fixture(scope="session")
def alone(model):
    """Runs a request in one process, without Ray; latents `[B, C, T, h, w]`, computed once a request."""
    pipeline = Pipeline.from_pretrained(model, dtype=torch.float32)
    kept = {}

    def latents(request: Request):
        if request not in kept:
            with torch.no_grad():
                chunks = [chunk.latents for chunk in pipeline.stream(request, output_type="latent")]
            kept[request] = torch.cat(chunks, dim=2).numpy()
        return kept[request]

    latents.pipeline = pipeline
    return latents


def small(**changes) -> Request:
    return replace(SMALL, **changes)


def write_adapter(file: Path, width: int = 96, seed: int = 0) -> Path:
    """A LoRA of one layer; the random checkpoints are 96 wide."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"A": (2, width), "B": (width, 2)}
    name = "transformer.blocks.0.attn1.to_q.lora_{}.weight"
    save_file({name.format(side): torch.randn(shape, generator=generator) for side, shape in shapes.items()}, file)
    return file


def inside(worker, name: str) -> list:
    """What an attribute of each of a worker's actors is, after all calls that were sent before."""
    calls = [actor.__ray_call__.remote(lambda actor, name=name: getattr(actor, name)) for actor in worker._actors]
    return ray.get(calls, timeout=PATIENCE)


def wait_until(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happens():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.1)


def runs_actor(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return "ray::" in file.read()
    except (FileNotFoundError, ProcessLookupError):
        return False


def frames_in(path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))
