"""Unit: the Slurm script runs beside stand-ins for Slurm and Ray, the Kubernetes manifest is valid, flags exist."""

from __future__ import annotations

import configparser
import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import ray
import yaml
from packaging.requirements import Requirement

from launchers import status
from launchers.generate.__main__ import build_parser
from launchers.generate.flags import ClusterCall

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def flags_of(command: str) -> set[str]:
    return {word.partition("=")[0] for word in shlex.split(command, comments=True) if re.match(r"--[a-z]", word)}


def known_flags() -> set[str]:
    return {flag for action in build_parser()._actions for flag in action.option_strings}


def ray_start_flags() -> set[str]:
    ray_program = Path(sys.executable).with_name("ray")
    shown = subprocess.run([ray_program, "start", "--help"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"--[a-z][a-z-]+", shown))


def test_the_slurm_script_asks_before_its_first_command():
    text = (DOCS / "helios.sbatch").read_text()
    directives = re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.MULTILINE)
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "time"} <= {name for name, _ in directives}
    assert text.rindex("#SBATCH") < text.index("set -euo"), "Slurm reads directives before the first command only"


STAND_INS = {
    "scontrol": """
        [[ "$*" == "show hostnames machine[1-2]" ]] && printf 'machine1\nmachine2\n'""",
    "hostname": "echo 127.0.0.1 10.0.0.1",
    # Its own flags end where the command begins; what is left runs here.
    "srun": """
        echo "srun $SRUN_CPUS_PER_TASK $*" >> "$RECORD"
        echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN" >> "$RECORD.tokens"
        while [[ "$1" == --* ]]; do shift; done
        exec "$@\"""",
    # Between two knocks.
    "sleep": """
        echo "knocked in vain" >> "$RECORD"
        command -p sleep 0.1""",
    # A head node answers only after somebody has knocked in vain, and a node that joins before finds nobody.
    "ray": """
        if [[ " $* " == *" --head "* ]]; then
            [[ -n "$HEAD_FAILS" ]] && exit 1
            until grep --quiet --extended-regexp 'knocked in vain|found nobody' "$RECORD"; do command -p sleep 0.1; done
            exec "$PYTHON" -c 'import os, socket, time
        socket.socket(fileno=int(os.environ["DOOR"])).listen()
        time.sleep(600)'
        fi
        (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null && state=joined || state="found nobody"
        echo "$state: ray $*" >> "$RECORD\"""",
    # A driver waits for what it needs.
    "python": """
        until (( SLURM_JOB_NUM_NODES == 1 )) || grep --quiet ': ray start --address' "$RECORD"; do
            command -p sleep 0.1
        done
        echo "driver: $(printf '%q ' "$@")" >> "$RECORD\"""",
}


@pytest.fixture
def batch(tmp_path):
    """Runs the script as Slurm would on the first of two machines; returns the exit code and what was called."""
    door = socket.socket()  # held from here on, and nobody listens before the head node does
    door.bind(("127.0.0.1", 0))
    port = door.getsockname()[1]
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "activate").write_text(f"PATH={binaries}:$PATH\n")
    for name, body in STAND_INS.items():
        (binaries / name).write_text("#!/bin/bash\n" + textwrap.dedent(body))
        (binaries / name).chmod(0o755)
    script = tmp_path / "helios.sbatch"

    def run(*flags: str, nodes: int = 2, head_fails: bool = False, changes: dict[str, str] | None = None):
        text = (DOCS / "helios.sbatch").read_text()
        for before, after in {"port=6379\n": f"port={port}\n", **(changes or {})}.items():
            assert text.count(before) == 1, before
            text = text.replace(before, after)
        script.write_text(text)
        record = tmp_path / "record.txt"
        record.write_text("")
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHON": sys.executable,
            "RECORD": str(record),
            "PORT": str(port),
            "DOOR": str(door.fileno()),
            "HEAD_FAILS": "1" if head_fails else "",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "machine[1-2]",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_CPUS_PER_TASK": "32",
        }
        # Slurm ends what the script leaves behind; here it is the process group.
        process = subprocess.Popen(
            ["bash", script, *flags],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            pass_fds=[door.fileno()],
        )
        try:
            process.wait(timeout=300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, record.read_text().splitlines(), process.stderr.read(), port

    with door:
        yield run


def test_the_slurm_script(batch, tmp_path):
    """Head, then the other machine once that answers, then the driver with the user's own flags."""
    code, record, stderr, port = batch("--prompt", "a red fox", "--output", "fox.mp4")
    assert code == 0, stderr
    address = f"127.0.0.1:{port}"
    starts = [line for line in record if "ray start" in line]
    head, other = (shlex.split(line) for line in starts if line.startswith("srun"))
    assert "--head" in head and "--nodelist=machine1" in head and head[1] == "32", "a task has the CPUs of the job"
    assert "--exclude=machine1" in other and f"--address={address}" in other
    for line in (head, other):
        assert flags_of(shlex.join(line[line.index("ray") :])) <= ray_start_flags()
    assert next(line for line in record if ": ray start" in line).startswith("joined: ")
    driver = next(line for line in record if line.startswith("driver: "))
    words = shlex.split(driver)[1:]
    assert words[:2] == ["-m", "launchers.generate"] and words[-4:] == ["--prompt", "a red fox", "--output", "fox.mp4"]
    arguments = ClusterCall.of(build_parser().parse_args(words[2:]))
    assert arguments.address == address and arguments.device == "cuda"
    assert arguments.groups * arguments.layout.ulysses + 0.5 * arguments.decoders + 0.5 <= 16, (
        "two machines of eight cards"
    )
    (token,) = set((tmp_path / "record.txt.tokens").read_text().splitlines())
    assert re.fullmatch("token [0-9a-f]{64}", token), "one for all machines, and not easily guessed"


def test_the_slurm_script_waits_for_its_head_node(batch):
    """Without the loop that knocks, the other machine comes too early."""
    loop = {'until (exec 3<>"/dev/tcp/$address/$port") 2>/dev/null; do': "until true; do"}
    code, record, _, _ = batch("--prompt", "a fox", changes=loop)
    assert code == 0 and next(line for line in record if ": ray start" in line).startswith("found nobody: ")


def test_the_slurm_script_on_one_machine(batch):
    code, record, _, _ = batch("--prompt", "a fox", nodes=1)
    assert code == 0 and not any("ray start --address" in line for line in record)
    assert "--groups 1 --ulysses 4" in next(line for line in record if line.startswith("driver"))


def test_the_slurm_script_ends_with_its_head_node(batch):
    code, record, stderr, port = batch("--prompt", "a fox", head_fails=True)
    assert code == 1 and stderr.endswith(f"no Ray head node answers at 127.0.0.1:{port}\n")
    assert not any(line.startswith("driver") for line in record)


@pytest.fixture
def manifest() -> dict:
    return yaml.safe_load((DOCS / "rayjob.yaml").read_text())


def check_manifest(manifest: dict) -> None:
    """What KubeRay requires of a RayJob, and what this program needs."""
    assert manifest["apiVersion"] == "ray.io/v1" and manifest["kind"] == "RayJob" and manifest["metadata"]["name"]
    spec = manifest["spec"]
    assert flags_of(spec["entrypoint"]) <= known_flags()
    cluster = spec["rayClusterSpec"]
    assert cluster.get("authOptions") == {"mode": "token"}, "or whoever reaches the head runs programs"
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["name"] and container["image"]
            variables = {variable["name"]: variable["value"] for variable in container["env"]}
            kept = Path(variables["HF_HOME"])
            assert any(kept.is_relative_to(mount["mountPath"]) for mount in container["volumeMounts"]), (
                "or each pod loads"
            )
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            limits, requests = container["resources"]["limits"], container["resources"]["requests"]
            assert limits.get("nvidia.com/gpu") == requests.get("nvidia.com/gpu"), "Kubernetes demands them equal"
    for group in cluster["workerGroupSpecs"]:
        assert group["groupName"] and group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_kubernetes_manifest(manifest):
    check_manifest(manifest)
    assert manifest["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__


def test_the_manifest_has_room_for_what_it_asks(manifest):
    arguments = ClusterCall.of(build_parser().parse_args(shlex.split(manifest["spec"]["entrypoint"])[3:]))
    assert arguments.device == "cuda", "the head has no card, and the workers may come after the driver"
    cluster = manifest["spec"]["rayClusterSpec"]
    cards = sum(
        group["replicas"] * int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
        for group in cluster["workerGroupSpecs"]
    )
    assert arguments.groups * arguments.layout.ulysses + 0.5 * arguments.decoders + 0.5 <= cards


@pytest.mark.parametrize("damage", ["kind", "flag", "volume", "replicas", "home", "token"])
def test_the_check_sees_a_broken_manifest(manifest, damage):
    worker = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    if damage == "kind":
        manifest["kind"] = "Job"
    elif damage == "flag":
        manifest["spec"]["entrypoint"] += " --no-such-flag"
    elif damage == "volume":
        worker["template"]["spec"]["volumes"].pop()
    elif damage == "token":
        del manifest["spec"]["rayClusterSpec"]["authOptions"]
    elif damage == "home":
        worker["template"]["spec"]["containers"][0]["env"][0]["value"] = "/root/.cache/huggingface"
    else:
        worker["replicas"] = 5
    with pytest.raises(AssertionError):
        check_manifest(manifest)


@pytest.mark.parametrize("page", ["README.md", "docs/cluster.md"])
def test_commands_of_the_pages(page):
    """Each call of a program of this package in a block or between backticks is one that it would take."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    calls = re.findall(r"python -m launchers\.(generate|status)([^`\n#]*)", text)
    assert calls
    for program, flags in calls:
        words = shlex.split(flags.replace("…", ""))
        if program == "status":
            status.build_parser().parse_args(words)
        else:
            ClusterCall.of(build_parser().parse_args(words))


def test_the_range_of_ray_holds_what_is_tested():
    """`launchers.cluster.cluster` reads what nodes have free by a function that Ray keeps to itself."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options.extras_require"]["cluster"].split()
    requirement = next(Requirement(line) for line in lines if line.startswith("ray"))
    constraints = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert requirement.extras == {"default"} and constraints["ray"] in requirement.specifier
    assert {clause.operator for clause in requirement.specifier} == {">=", "<"}
