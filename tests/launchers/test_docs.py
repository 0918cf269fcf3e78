"""Unit: the Slurm script and the Kubernetes manifest are valid, and the flags in them exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import yaml

from launchers.generate import build_parser

DOCS = Path(__file__).parents[2] / "docs"


def flags_of(command: str) -> set[str]:
    return {word.partition("=")[0] for word in shlex.split(command, comments=True) if re.match(r"--[a-z]", word)}


def known_flags() -> set[str]:
    return {flag for action in build_parser()._actions for flag in action.option_strings}


def test_the_slurm_script():
    path = DOCS / "helios.sbatch"
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    text = path.read_text()
    directives = re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.MULTILINE)
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "time"} <= {name for name, _ in directives}
    assert text.index("#SBATCH") < text.index("set -euo"), "Slurm reads directives before the first command only"
    command = text[text.index("python -m launchers.generate") :].replace('"$@"', "")
    assert flags_of(command) <= known_flags()
    ray_program = Path(sys.executable).with_name("ray")
    help_text = subprocess.run([ray_program, "start", "--help"], capture_output=True, text=True, check=True).stdout
    offered = set(re.findall(r"--[a-z][a-z-]+", help_text))
    for start in re.findall(r"ray start [^&]*", text[text.index("set -euo") : text.index("# The driver")]):
        assert flags_of(start.replace("\\\n", " ")) <= offered, start


@pytest.fixture
def manifest() -> dict:
    return yaml.safe_load((DOCS / "rayjob.yaml").read_text())


def check_manifest(manifest: dict) -> None:
    """What KubeRay requires of a RayJob, and what this program needs."""
    assert manifest["apiVersion"] == "ray.io/v1" and manifest["kind"] == "RayJob" and manifest["metadata"]["name"]
    spec = manifest["spec"]
    assert flags_of(spec["entrypoint"]) <= known_flags()
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["name"] and container["image"]
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            limits, requests = container["resources"]["limits"], container["resources"]["requests"]
            assert limits.get("nvidia.com/gpu") == requests.get("nvidia.com/gpu"), "Kubernetes demands them equal"
    for group in cluster["workerGroupSpecs"]:
        assert group["groupName"] and group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_kubernetes_manifest(manifest):
    check_manifest(manifest)
    assert manifest["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__


def test_the_manifest_has_room_for_what_it_asks(manifest):
    arguments = build_parser().parse_args(shlex.split(manifest["spec"]["entrypoint"])[3:])
    cluster = manifest["spec"]["rayClusterSpec"]
    cards = sum(
        group["replicas"] * int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
        for group in cluster["workerGroupSpecs"]
    )
    assert arguments.groups * arguments.ulysses + 0.5 * arguments.decoders + 0.5 <= cards


@pytest.mark.parametrize("damage", ["kind", "flag", "volume", "replicas"])
def test_the_check_sees_a_broken_manifest(manifest, damage):
    worker = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    if damage == "kind":
        manifest["kind"] = "Job"
    elif damage == "flag":
        manifest["spec"]["entrypoint"] += " --no-such-flag"
    elif damage == "volume":
        worker["template"]["spec"]["volumes"].pop()
    else:
        worker["replicas"] = 5
    with pytest.raises(AssertionError):
        check_manifest(manifest)
