"""Ray, by the commands that README, docs and the Slurm script tell users to type, in homes of their own.

Two machines are two Ray nodes of this one. What is changed in the commands: names of machines, ports, the size of
videos and of nodes. `ray stop` is left out: it would end every Ray cluster of whoever runs the tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launchers.conftest import PATIENCE, QUICK, UNHURRIED, frames_in
from tests.launchers.test_job import free_ports

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
BINARIES = Path(sys.executable).parent
NODE = "--num-cpus 4 --object-store-memory 200000000 --disable-usage-stats"
WORKERS = "--groups 1 --ulysses 1 --decoders 0 --num-frames 33 --device cpu --wait 120 " + " ".join(QUICK)


@pytest.fixture
def place(tmp_path, cache) -> Iterator[dict[str, str]]:
    """An environment with a home and a folder of Ray's of its own; what was started in it is ended."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: Ray's sockets lie in it
    environment = {**UNHURRIED, "PATH": f"{BINARIES}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= {"HOME": str(tmp_path / "home"), "HELIOS_CP_CACHE": str(cache)}
    environment |= {"RAY_TMPDIR": folder, "OMP_NUM_THREADS": "1"}
    Path(environment["HOME"]).mkdir()
    yield environment
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if folder.encode() in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:  # it ended, or is another user's
            continue
    shutil.rmtree(folder, ignore_errors=True)


def run(script: str, place: dict[str, str], folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run lines of bash; output to files, since Ray's nodes keep what they inherit open."""
    with (folder / "out.txt").open("w") as out, (folder / "err.txt").open("w") as err:
        command = ["bash", "-euo", "pipefail", "-c", script]
        done = subprocess.run(command, env=place | changes, cwd=folder, stdout=out, stderr=err, timeout=2 * PATIENCE)
    return subprocess.CompletedProcess(
        command, done.returncode, (folder / "out.txt").read_text(), (folder / "err.txt").read_text()
    )


def recipe(page: str, port: int) -> str:
    """The lines of the block that starts a cluster by hand, made small."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    (block,) = [block for block in re.findall(r"^```\n(.*?)^```$", text, re.M | re.S) if "ray start --head" in block]
    lines = []
    for line in block[block.index("ray get-auth-token") :].splitlines():
        line = line.split("  #")[0].rstrip()
        if line.startswith(("ray stop", "python -m launchers.status", "#")):
            continue
        line = re.sub(
            r"\b(FIRST|HEAD):6379|(?<=--port )6379", lambda found: f"127.0.0.1:{port}" if found[1] else str(port), line
        )
        line += f" {NODE}" if line.startswith("ray start") else ""
        line += " --include-dashboard=false" if "--head" in line else ""
        line += f" {WORKERS} --model random-distilled" if "launchers.generate" in line else ""
        lines.append(line)
    assert sum("ray start" in line for line in lines) == 2 and "launchers.generate" in lines[-1]
    return "\n".join(lines)


def test_two_machines_by_hand(place, tmp_path):
    """As written, in a home without a token; then who gets in, and what the others are told."""
    (port,) = free_ports(1)
    (tmp_path / "prompts.txt").write_text("a red fox\n")
    script = recipe("docs/cluster.md", port)
    starts = [
        [line for line in each.splitlines() if "ray" in line.lower()] for each in (script, recipe("README.md", port))
    ]
    assert set(starts[0]) == set(starts[1]), "the README has the same commands"
    done = run(script, place, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert frames_in(next((tmp_path / "videos").glob("*.mp4"))) == 33
    look = f"python -m launchers.status --address 127.0.0.1:{port}"
    assert "no pipeline runs on this cluster" in run(f"{look} || true", place, tmp_path).stderr
    other = tmp_path / "other"
    other.write_text("0" * 64)
    refusals = [
        ({"HOME": str(tmp_path)}, "demands a token, and there is none here; take the file ~/.ray/auth_token"),
        ({"RAY_AUTH_TOKEN_PATH": str(other)}, "has another than the one here"),
        ({"RAY_AUTH_TOKEN_PATH": "/none"}, "RAY_AUTH_TOKEN_PATH /none cannot be read, or is empty"),
        ({"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE is disabled; unset RAY_AUTH_MODE"),
    ]
    for changes, said in refusals:
        refused = run(look, place, tmp_path, **changes)
        assert refused.returncode == 1 and said in refused.stderr.splitlines()[-1], refused.stderr


PRIVATE = """
import os, subprocess, sys
import ray
from launchers.cluster.cluster import connected

with connected("local", cpus=1):
    address = ray.get_runtime_context().gcs_address
    stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    look = "from launchers.cluster.cluster import connected\\nwith connected(sys.argv[1]): print('in')"
    for where, ends in (("auto", 0), (address, 1)):
        environment = stranger | {"RAY_ADDRESS": address}
        done = subprocess.run([sys.executable, "-c", "import sys\\n" + look, where], env=environment)
        assert done.returncode == ends, where
assert not [name for name in os.environ if name.startswith("RAY_AUTH")]
"""


def test_an_instance_of_its_own_is_locked(place, tmp_path):
    """For all but this user's own programs that look for it on this machine. Its token is in no home, and then gone."""
    done = run(f'"{sys.executable}" - <<"END"\n{PRIVATE}\nEND', place, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "in" and "demands a token, and there is none here" in done.stderr
    assert not list(Path(place["HOME"]).iterdir())


SLURM = {
    "scontrol": "echo machine1; echo machine2",
    "hostname": "echo 127.0.0.1",
    # Its own flags end where the command begins; each machine has a folder of its own.
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "python": f'exec "{sys.executable}" - "$@" <<"END"\n{{driver}}\nEND',
}

DRIVER = """
import json, sys, time
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from launchers.cluster.cluster import connected
from launchers.generate.__main__ import build_parser
from launchers.generate.flags import ClusterCall

assert sys.argv[1:3] == ["-m", "launchers.generate"]
call = ClusterCall.of(build_parser().parse_args(sys.argv[3:]))

@ray.remote(num_cpus=0)
def place():
    import launchers
    return ray.get_runtime_context().get_node_id()

with connected(call.address, wait=call.wait):
    while len(ray.nodes()) < 2:
        time.sleep(0.1)
    nodes = [node["NodeID"] for node in ray.nodes()]
    on = [place.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)) for node in nodes]
    assert ray.get([each.remote() for each in on]) == nodes
    told = {"resources": ray.cluster_resources(), "groups": call.groups, "ranks": call.ranks_of_group,
            "decoders": call.decoders, "folder": str(call.checkpoint_dir), "prompt": list(call.request["prompt"])}
    print(json.dumps(told))
"""


def test_the_slurm_script(place, tmp_path):
    """The script as it is, with `ray` real and stand-ins for Slurm's own commands. That of the driver reads its flags,
    joins the cluster and runs something on both machines; videos are made on such a cluster above."""
    (port,) = free_ports(1)
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "activate").write_text(f"PATH={binaries}:$PATH\n")
    for name, body in SLURM.items():
        (binaries / name).write_text(f"#!/bin/bash\n{body.replace('{driver}', DRIVER)}\n")
        (binaries / name).chmod(0o755)
    script = (ROOT / "docs" / "helios.sbatch").read_text().replace("port=6379\n", f"port={port}\n")
    script = script.replace('RAY_TMPDIR="/tmp/ray-$SLURM_JOB_ID"', f'RAY_TMPDIR="{place["RAY_TMPDIR"]}"')
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "machine[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    slurm |= {"SLURM_CPUS_PER_TASK": "4", "SLURM_SUBMIT_DIR": str(tmp_path)}
    (tmp_path / "helios.sbatch").write_text(script)
    done = run("bash helios.sbatch --prompt 'a red fox' --output fox.mp4", place, tmp_path, **slurm)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    has = {"groups": 3, "ranks": 4, "decoders": 4, "folder": "runs/7", "prompt": ["a red fox"]}
    assert told == {"resources": told["resources"], **has}
    assert (told["resources"]["GPU"], told["resources"]["CPU"]) == (16, 8)
    assert not list(Path(place["HOME"]).iterdir()), "the token of the job is kept nowhere"
