"""Unit, without a cluster: what the command lines refuse and when, the cards they ask for, what they say and write."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Execution
from helios_cp.files.mp4 import encode_segment
from helios_cp.generate.__main__ import build_parser as build_single_parser
from helios_cp.tiny.vocabulary import outside
from launchers import demo, status
from launchers.cluster.address import address_of, check_address, host_and_port
from launchers.cluster.cluster import ClusterError, connected, knock
from launchers.driver.pipeline import PipelineError
from launchers.driver.recipes import Resources
from launchers.driver.timeline import Event
from launchers.generate import checks, opening
from launchers.generate import run as runner
from launchers.generate.__main__ import build_parser, main
from launchers.generate.checks import cards_for, check_cards, check_session, pick_cluster_device, shares_of_workers
from launchers.generate.flags import ClusterCall
from launchers.schedule.terms import check_offload
from tests.launchers.conftest import QUICK

CLUSTER = "127.0.0.1:7777"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HELIOS_CP_CACHE", str(cache))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


REFUSED = {
    "no group": ["--groups", "0"],
    "no rank": ["--ranks", "0"],
    "ranks that are not those of the layout": ["--ulysses", "2", "--ranks", "3"],
    "a layout for an unknown number of ranks": ["--layout", "auto", "--spread"],
    "a ring that is not there": ["--spread"],
    "a ring that does not follow": ["--spread", "--ranks", "2"],
    "less than no decoder": ["--decoders", "-1"],
    "a split VAE": ["--vae-parallel", "2"],
    "more ranks than heads": ["--ulysses", "5"],
    "no chunk under way": ["--undelivered", "0"],
    "no time to wait": ["--wait", "0"],
    "no number to wait": ["--wait", "nan"],
    "no number as timeout": ["--timeout", "nan"],
    "an endless timeout": ["--timeout", "inf"],
    "more than a card": ["--gpus", "2", "0.5", "0.5"],
    "less than no card": ["--gpus", "1", "-0.5", "0.5"],
    "decoders on CUDA without a card": ["--gpus", "1", "0", "0.5", "--device", "cuda"],
    "ranks that share a card by NCCL": ["--gpus", "0.4", "0.1", "0.1", "--device", "cuda", "--ulysses", "2"],
    "a timeline of another kind": ["--timeline", "a.gif"],
    "a timeline in no folder": ["--timeline", "/dev/null/a.png"],
    "an unknown flag": ["--group", "2"],
    "a device of no cluster": ["--device", "mps"],
    "a bad size": ["--height", "65"],
    "a bad size beside a layout": ["--height", "65", "--layout", "auto"],
}


def refusal_of(flags, capsys) -> str:
    with pytest.raises(SystemExit) as refusal:
        main([*QUICK, "--prompt", "a fox", *flags])
    assert refusal.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and stderr.startswith("launchers.generate: error: ")
    return stderr


@pytest.mark.parametrize("address", ["local", CLUSTER, "auto"])
@pytest.mark.parametrize("flags", REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line_before_anything_starts(flags, address, folder, capsys, monkeypatch):
    """On `CLUSTER` nobody listens, and no instance can be started: whoever tries gets another error."""
    monkeypatch.setattr(opening, "connected", None)
    assert flags[0] in refusal_of([*flags, "--address", address], capsys)


ADDRESSES = ["locall", "here:port", "127.0.0.1:1", "127.0.0.1:70000", "::1:6379", "ray://head:10001", "", "a b:6379"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_forms_of_an_address(address, folder, capsys, monkeypatch):
    monkeypatch.setattr(opening, "connected", None)
    assert f"--address {address}: " in refusal_of(["--address", address], capsys)
    with pytest.raises(SystemExit) as refusal:
        status.main(["--address", address])
    assert refusal.value.code == 2 and "HOST:PORT" in capsys.readouterr().err


def test_an_address_is_taken_apart():
    assert host_and_port("head-0.example.com:6379") == ("head-0.example.com", 6379)
    assert host_and_port("[::1]:6379") == ("::1", 6379) and host_and_port("::1:6379") is None
    for address in ("local", "auto", "10.0.0.1:6379", "[fe80::1]:6379"):
        check_address(address)


def test_only_auto_looks_at_the_environment():
    assert address_of("auto", {}) == address_of("auto", {"RAY_ADDRESS": ""}) == "auto"
    assert address_of("auto", {"RAY_ADDRESS": "10.0.0.1:6379"}) == "10.0.0.1:6379"
    for address in ("local", "10.0.0.2:6379"):
        assert address_of(address, {"RAY_ADDRESS": "10.0.0.1:6379"}) == address
    with pytest.raises(RequestError, match="RAY_ADDRESS http://head:8265: "):
        address_of("auto", {"RAY_ADDRESS": "http://head:8265"})


@pytest.mark.parametrize("flags", [["--watch", "-1"], ["--watch", "0"], ["--watch", "nan"], ["--address", "local"]])
def test_status_refuses(flags, capsys):
    with pytest.raises(SystemExit) as refusal:
        status.main(flags)
    stderr = capsys.readouterr().err
    assert refusal.value.code == 2 and stderr.count("\n") == 1 and flags[0] in stderr


def test_a_cluster_has_time_to_begin_to_answer():
    with socket.socket() as late:
        late.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{late.getsockname()[1]}"
        with (
            pytest.raises(ClusterError, match=f"--address {address}: no Ray cluster answers there"),
            connected(address),
        ):
            pass
        began = threading.Event()

        def listen() -> None:
            time.sleep(0.3)
            began.set()
            late.listen()

        thread = threading.Thread(target=listen)
        thread.start()
        knock(address, 60)
        assert began.is_set()
        thread.join()


def test_flags_are_those_of_the_single_program():
    flags = {flag for action in build_parser()._actions for flag in action.option_strings}
    assert {flag for action in build_single_parser()._actions for flag in action.option_strings} < flags


# Cards


@pytest.mark.parametrize(
    ("shares", "cards"),
    [
        ([1, 0.5, 0.5], 2),
        ([0.4, 0.3, 0.3], 1),
        ([0.3, 0.3, 0.4], 1),
        ([0.6, 0.6, 0.6], 3),  # 1.8 cards, and no two of them fit on one
        ([0.5, 0.6, 0.4, 0.5], 2),
        ([0.1] * 10, 1),
        ([0, 0, 0], 0),
        ([1] * 4 + [0.5] * 2 + [0], 5),
    ],
)
def test_cards_for_parts_of_a_card(shares, cards):
    assert cards_for(shares) == cards


def call(*flags: str) -> ClusterCall:
    return ClusterCall.of(build_parser().parse_args(["--prompt", "a fox", *QUICK, *flags]))


@pytest.mark.parametrize(
    ("flags", "present", "said"),
    [
        ([], 0, r"1 rank.* need 2 card\(s\), this machine has 0; .*--device cpu$"),
        ([], 1, r"need 2 card\(s\), this machine has 1; share them by --gpus 0\.6 0\.2 0\.2$"),
        (["--groups", "2", "--decoders", "2"], 2, r"need 4 .* has 2; share them by --gpus 0\.6 0\.2 0\.2$"),
        (["--groups", "2", "--decoders", "0"], 1, "2 rank.* need 3 .* has 1; ask for fewer --groups"),
        (["--ulysses", "2"], 2, "need 3 .* has 2; ask for fewer --groups or ranks"),
        (["--gpus", "0.4", "0.4", "0.4"], 1, "need 2 .* has 1"),
    ],
)
def test_a_private_instance_has_no_cards_that_are_not_there(flags, present, said, folder, capsys, monkeypatch):
    monkeypatch.setattr(opening, "connected", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: present)
    refused = refusal_of([*flags, "--device", "cuda"], capsys).strip()
    assert refused.startswith("launchers.generate: error: --address local: ") and re.search(said, refused)
    advised = re.search(r"(--gpus .*)$", refused)
    if advised:
        arguments = call(*flags, "--device", "cuda", *advised[1].split())
        shares = [arguments.gpus[0]] * arguments.groups + [arguments.gpus[1]] * arguments.decoders + [arguments.gpus[2]]
        check_cards(arguments, shares)
        with pytest.raises(RequestError):
            check_cards(arguments, [*shares, 1.0])


def test_ranks_of_a_group_share_no_card_by_nccl(folder, capsys, monkeypatch):
    monkeypatch.setattr(opening, "connected", None)
    flags = ["--ulysses", "2", "--gpus", "0.4", "0.1", "0.1", "--device", "cuda"]
    assert "--gpus 0.4 0.1 0.1: ranks of a group would share a card" in refusal_of(flags, capsys)
    arguments = call(*flags, "--backend", "gloo")
    layout = check_session(arguments, None, 2, "cuda").layout
    resources = Resources(*arguments.gpus)
    assert shares_of_workers(arguments, "cuda", layout, "none", resources) == [0.4, 0.4, 0.1, 0.1]
    # A card that does not hold the transformer has no room for a text encoder that stays there.
    assert shares_of_workers(arguments, "cuda", layout, "group", resources) == [0.4, 0.4, 0.1, 0.0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the driver's machine has a card here")
@pytest.mark.parametrize("flags", ["--cuda-graphs", "--offload group", "--quantize int8", "--quantize fp8"])
def test_what_cards_can_do_is_asked_of_the_cluster_not_of_the_driver(flags, folder):
    arguments = call(*flags.split(), "--device", "cuda")
    assert check_session(arguments, None, 1, "cuda").execution == Execution(**arguments.execution)
    with pytest.raises(RequestError, match="--cuda-graphs: "):
        check_session(call("--cuda-graphs"), None, 1, "cpu")


def test_a_vae_does_not_stay_beside_an_offloaded_transformer():
    check_offload("model", 1)
    check_offload("none", 0)
    with pytest.raises(RequestError, match=r"--offload model with --decoders 0: .*--decoders 1"):
        check_offload("model", 0)


@pytest.mark.parametrize(("resources", "device"), [({}, "cpu"), ({"CPU": 8.0}, "cpu"), ({"GPU": 4.0}, "cuda")])
def test_the_device_is_that_of_the_cluster(resources, device, monkeypatch):
    monkeypatch.setattr(checks.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(checks.ray, "cluster_resources", lambda: resources)
    assert pick_cluster_device(call("--address", CLUSTER)) == device
    assert pick_cluster_device(call("--address", CLUSTER, "--device", "cuda")) == "cuda"


# What it says and writes


class LostPipeline:
    """Starts, works, and is lost: its own handle of every video."""

    def __init__(self, *_, **options):
        self.events = [Event("group-0", "denoise", 0, 0, 0.0, 1.0)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def nodes(self):
        return {}

    def submit(self, *_, **__):
        return self

    def result(self, timeout):
        raise PipelineError("all machines are gone")


@pytest.fixture
def lost(folder, monkeypatch, capsys):
    """Runs a call on a cluster with these resources, up to the first video; returns the exit code and stderr."""

    def run(resources, *flags):
        monkeypatch.setattr(opening, "connected", lambda *_, **__: contextlib.nullcontext())
        monkeypatch.setattr(opening, "ChunkPipeline", LostPipeline)
        monkeypatch.setattr(checks.ray, "is_initialized", lambda: True)
        monkeypatch.setattr(checks.ray, "cluster_resources", lambda: resources)
        code = main([*QUICK, "--prompt", "a fox", "--address", CLUSTER, *flags])
        return code, capsys.readouterr().err

    return run


def test_a_cpu_is_not_taken_silently(lost):
    _, said = lost({"CPU": 4.0})
    assert "no node has a card by now" in said and "--device cuda" in said
    assert "loading tiny-distilled on cpu in float32: 1 group(s), 1 decoder(s)" in said
    _, said = lost({"CPU": 4.0, "GPU": 4.0})
    assert "no node has a card" not in said and "loading tiny-distilled on cuda in bfloat16: 1 group(s)" in said
    _, said = lost({"CPU": 4.0}, "--device", "cpu")
    assert "no node has a card" not in said


def test_a_picture_that_fails_hides_no_other_error(lost, folder, monkeypatch):
    def draw(*_):
        raise OSError("no space left")

    monkeypatch.setattr(runner, "draw", draw)
    code, said = lost({}, "--timeline", "a.png", "--report", "a.json")
    assert code == 1 and said.endswith("launchers.generate: error: all machines are gone\n")
    assert "--timeline a.png: it could not be written: " in said and "no space left" in said
    assert (folder / "a.json").exists()


def test_a_timeline_needs_matplotlib(folder, capsys, monkeypatch):
    monkeypatch.setattr(opening, "connected", None)
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    assert "--timeline a.png: it is drawn by matplotlib" in refusal_of(["--timeline", "a.png"], capsys)


STATUS = {
    "model": "tiny",
    "workers": [{"name": "group-0", "state": "ready", "places": ["host:1 on node 2"], "in hand": []}],
    "queue": {"denoise": 3},
    "videos": {0: "1 of 3 chunks, running"},
    "chunks per second": 0.5,
    "overlap": None,
    "time": 0.0,
}


def test_status_for_readers_and_programs(folder, capsys, monkeypatch):
    monkeypatch.setattr("launchers.cluster.cluster.connected", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(status, "read_boards", lambda: [STATUS, STATUS])
    assert status.main([]) == 0
    assert capsys.readouterr().out.count("group-0") == 2
    assert status.main(["--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first == second == {**STATUS, "videos": {"0": "1 of 3 chunks, running"}}
    monkeypatch.setattr(status, "read_boards", list)
    assert status.main(["--json"]) == 1


# The demonstration


@pytest.fixture
def demonstration(folder, monkeypatch):
    """`launchers.demo` beside stand-ins for the cluster and the program: what each was given."""
    calls = argparse.Namespace(nodes=[], flags=None, is_down=False, result=0)

    class StandInCluster:
        address = CLUSTER

        def __init__(self, initialize_head, head_node_args):
            self.add_node(**head_node_args)

        def add_node(self, num_cpus, **_):
            calls.nodes.append(num_cpus)

        def shutdown(self):
            calls.is_down = True

    def generate(flags):
        calls.flags = flags
        for index in range(len(demo.PROMPTS) if calls.result == 0 else 0):
            path = Path(flags[flags.index("--output") + 1]) / f"{index}.mp4"
            path.write_bytes(encode_segment(torch.zeros(33, demo.HEIGHT, demo.WIDTH, 3, dtype=torch.uint8), 24))
        if isinstance(calls.result, BaseException):
            raise calls.result
        return calls.result

    monkeypatch.setenv("RAY_TMPDIR", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("ray.cluster_utils.Cluster", StandInCluster)
    monkeypatch.setattr("launchers.generate.__main__.main", generate)
    return calls


def test_the_demonstration_asks_for_what_its_nodes_have(demonstration, folder, cache):
    assert demo.main(["--output", "made"]) == 0
    arguments = ClusterCall.of(build_parser().parse_args(demonstration.flags))
    session = check_session(arguments, cache, 1, "cpu")
    assert [job.output[0].name for job in session.jobs] == ["0.mp4", "1.mp4"]
    assert arguments.address == CLUSTER and arguments.timeline == Path("made/timeline.png")
    assert arguments.device == "cpu", "each of the nodes would see all cards of this machine"
    workers = arguments.groups + arguments.decoders + 1
    assert len(demonstration.nodes) == 2 and sum(demonstration.nodes) == workers > max(demonstration.nodes)
    assert demonstration.is_down
    assert Image.open("made/sheet.png").size == (2 * 8 * demo.WIDTH, 2 * 2 * demo.HEIGHT)
    assert not [text for text in demo.PROMPTS if outside(text)]


def test_the_demonstration_replaces_its_own_files_only(demonstration, folder):
    for name in ("0.mp4", "mine.mp4"):
        (folder / name).write_text("something")
    assert demo.main(["--output", "."]) == 0
    assert (folder / "mine.mp4").read_text() == "something" and (folder / "0.mp4").stat().st_size > 100
    with pytest.raises(SystemExit) as refusal:
        demo.main(["--output", "mine.mp4"])
    assert refusal.value.code == 2


def test_the_demonstration_ends_its_cluster_when_it_fails(demonstration, folder):
    demonstration.result = 1
    assert demo.main([]) == 1
    demonstration.result, demonstration.is_down = OSError("the disk is full"), False
    with pytest.raises(OSError, match="full"):
        demo.main([])
    assert demonstration.is_down


def test_make_runs_the_demonstration():
    command = ["make", "--no-print-directory", "--dry-run", "--always-make", "demo-ray"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # it may run under make
    plan = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=True).stdout
    assert plan.splitlines()[-1].split()[1:] == ["-m", "launchers.demo", "--output", "outputs/demo-ray"]
