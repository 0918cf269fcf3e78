"""Ray by its command lines: generate, resume, status, missing resources; in processes of their own."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from safetensors.torch import load_file

from helios_cp.generate.__main__ import main as generate_alone
from launchers.driver.recipes import Resources
from launchers.generate.__main__ import build_parser, main
from launchers.generate.automatic_layout import most_ranks
from launchers.generate.flags import ClusterCall
from tests.hub_server import HubServer
from tests.launchers.conftest import PATIENCE, QUICK, frames_in, runs_actor, wait_until

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
PATIENT = ["--wait", str(PATIENCE)]
"""For calls that need what the cluster has, if not at once."""

# A driver that says so once two chunks are in the file and its board shows that, and then waits to be killed: in the
# thread that makes videos, so nothing more is handed out.
HELD = """
import sys, threading
import ray
from launchers.driver import conductor
from launchers.driver.pipeline import ChunkPipeline
from launchers.generate.__main__ import main

def show(pipeline, picture):
    ray.get(pipeline._board.show.remote(picture))
    if int(picture["videos"].get(0, "0 of").split()[0]) >= 2:
        print("held", flush=True)
        threading.Event().wait()

ChunkPipeline._show_on_board, conductor.REFRESH = show, 0.01
sys.exit(main(sys.argv[1:]))
"""

# A driver that waits as it is told for its group alone: a busy cluster may take longer to place the other workers.
HURRIED = f"""
import sys
from launchers.driver import pipeline
from launchers.generate.__main__ import main

class Worker(pipeline.Worker):
    def __init__(self, recipe, tell, patience):
        super().__init__(recipe, tell, patience if recipe.name == "group-0" else {PATIENCE})

pipeline.Worker = Worker
sys.exit(main(sys.argv[1:]))
"""


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


def jobs() -> set[str]:
    """Every driver that the cluster has ever had."""
    return {job["JobID"] for job in ray._private.state.jobs()}


def test_an_instance_of_its_own_makes_what_torchrun_makes(folder, cluster, model):
    """Two ranks in the same layout: latents, frames and files bit for bit. One rank is in `test_a_killed_driver`.

    The instance joins no cluster. The model is one of the hub, and each file of it comes once for all workers. The home
    cannot be written, so Ray could keep no token there.
    """
    request = ["--num-frames", "66", "--ulysses", "2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "helios_cp.generate"]
    files = ["--output", "a.mp4", "--save-latents", "a.safetensors"]
    alone = [*torchrun, *QUICK, "--prompt", "a fox", *request, "--model", model, "--vae-parallel", "1", *files]
    subprocess.run(alone, env=environment(), capture_output=True, check=True, timeout=PATIENCE)
    before = jobs()
    assert before, "this process is a driver of the cluster itself"
    files = ["--output", "b.mp4", "--save-latents", "b.safetensors", "--report", "b.json", "--timeline", "b.png"]
    with HubServer() as hub:
        hub.add("owner/helios", Path(model))
        place = {"HOME": "/proc/none", "HF_HOME": str(folder / "hub"), "HF_ENDPOINT": hub.endpoint}
        call = [*PATIENT, *request, "--decoders", "0", "--model", "owner/helios", *files]
        done = run(*call, RAY_ADDRESS=cluster.address, **place)
        downloads = hub.downloads("safetensors")
    assert done.returncode == 0, done.stderr
    assert "owner/helios: downloading " in done.stderr
    assert sorted(downloads) == sorted(str(path.relative_to(model)) for path in Path(model).rglob("*.safetensors"))
    latents, others = (load_file(f"{name}.safetensors")["latents"] for name in "ab")
    assert latents.shape == others.shape == (1, 16, 18, 8, 8) and latents.equal(others)
    assert frames_in(Path("b.mp4")) == 66 and Path("b.mp4").read_bytes() == Path("a.mp4").read_bytes()
    report = json.loads(Path("b.json").read_text())
    assert (
        report["complete"] and report["frames"] == 66 and {"denoise", "decode", "write"} <= set(report["stage_seconds"])
    )
    assert Path("b.png").read_bytes().startswith(b"\x89PNG")
    assert jobs() == before, "it was no driver of the cluster that RAY_ADDRESS names"


def test_a_killed_driver_is_resumed(folder, cluster):
    """SIGKILL in the middle. The driver is held before, so that the status can be read at leisure.

    The home has a token, and the cluster takes none: by Ray's own rule it would be sent, and the actors would die.
    """
    token = folder / "home" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("0" * 64)
    own = environment(HOME=str(folder / "home"))
    to_cluster = ["--address", cluster.address, *PATIENT]
    arguments = [*to_cluster, "--num-frames", "396", "--save-latents", "a.safetensors", "--checkpoint-dir", "run"]
    python, _, _, *flags = command(*arguments)
    said = Path("said.txt")
    with said.open("w") as stderr:
        process = subprocess.Popen(
            [python, "-c", HELD, *flags], env=own, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    with process:
        try:
            assert process.stdout.readline() == "held\n", said.read_text()
            look = [sys.executable, "-m", "launchers.status", "--address", cluster.address]
            shown, refused = (
                subprocess.run(look, env=each, capture_output=True, text=True, timeout=PATIENCE)
                for each in (own, {**own, "RAY_AUTH_MODE": "token"})
            )
        finally:
            process.kill()
    assert refused.returncode == 1 and "it takes no tokens, and RAY_AUTH_MODE is token" in refused.stderr
    assert shown.returncode == 0, shown.stderr
    for part in ("text ", "group-0", "decoder-0", "writer", " on node ", "of 12 chunks, running", "chunks a second"):
        assert part in shown.stdout, shown.stdout
    pids = [int(pid) for pid in re.findall(r":(\d+) on node ", shown.stdout)]
    assert len(pids) == 4, shown.stdout
    wait_until(lambda: not any(runs_actor(pid) for pid in pids))  # the writer had a chunk in hand
    finished = json.loads(Path("run/state.json").read_text())["chunks"]
    assert 2 <= finished < 12 and not Path("a.safetensors").exists()

    resume = [sys.executable, "-m", "launchers.generate", *to_cluster, "--decoders", "0", "--resume", "run"]
    done = subprocess.run(
        [*resume, "--save-latents", "b.safetensors", "--report", "b.json"],
        env=own,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("b.json").read_text())["resumed_from_chunk"] == finished
    assert frames_in(Path("out.mp4")) == 396
    alone = [*QUICK, "--prompt", "a fox", "--num-frames", "396", "--save-latents", "c.safetensors", "--output", "c.mp4"]
    assert generate_alone(alone) == 0
    assert load_file("b.safetensors")["latents"].equal(load_file("c.safetensors")["latents"])
    assert Path("out.mp4").read_bytes() == Path("c.mp4").read_bytes()


def test_missing_resources_are_told(folder, cluster):
    """After `--wait`, whose default leaves half a minute; what is missing, and what each node has."""
    assert ClusterCall.of(build_parser().parse_args([])).wait <= 20
    arguments = ["--ulysses", "4", "--ring", "3", "--height", "128", "--width", "128", "--decoders", "0", "--wait", "1"]
    before = jobs()
    python, _, _, *flags = command("--address", cluster.address, *arguments)
    done = subprocess.run(
        [python, "-c", HURRIED, *flags], env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1, done.stderr
    lines = done.stderr.splitlines()
    last = lines[-1]
    assert any(line.startswith("loading") for line in lines), done.stderr
    assert "group-0 needs 12 CPU on one node" in last and "no node has 12 CPU at all" in last, done.stderr
    assert " of 8 CPU free" in last and " of 4 CPU free" in last and "fewer --groups" in last
    assert jobs() > before, "a driver that joins is seen"


def test_layout_auto_sees_what_the_cluster_has_free(cluster):
    """Once all that earlier drivers had is given back, which takes a moment after their end."""
    wait_until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])
    flags = ["--layout", "auto", "--address", cluster.address, "--prompt", "a fox", "--decoders"]
    three, four = (ClusterCall.of(build_parser().parse_args([*flags, decoders])) for decoders in "34")
    assert most_ranks(three, "cpu", Resources()) == 8, "the other node has room for decoders and text encoder"
    assert most_ranks(four, "cpu", Resources()) == 7


def test_no_cluster_is_told(folder, capsys):
    with socket.socket() as silent:  # held, and nobody listens
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        assert main([*QUICK, "--prompt", "a fox", "--address", f"127.0.0.1:{port}", "--wait", "1"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert any("error: --address" in line and "no Ray cluster answers" in line for line in said)
