"""Unit: which layout `--layout auto` takes, for what it plans, and what it says where none is possible."""

from __future__ import annotations

import argparse
import dataclasses
import json

import pytest
import torch

from helios_cp.config.arguments import add_flags
from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Execution
from helios_cp.config.layout import AskedLayout, Layout
from helios_cp.config.request import Request
from helios_cp.plan.choose import best_prediction, choose_layout, make_plan, planning_hardware
from helios_cp.plan.hardware import H100, RTX4090, Hardware
from helios_cp.plan.workload import BuiltInCheckpoint
from parallel.mesh import Degrees
from tests.plan.workloads import workload


def auto(presets, name: str, ranks: int, **flags) -> Layout:
    checkpoint = Checkpoint.read(presets[name])
    request = Request(prompt=("a fox",), height=64, width=64).resolve(checkpoint)
    arguments = AskedLayout(layout="auto", **flags)
    hardware = planning_hardware(arguments, "cpu", ranks)
    return choose_layout(arguments, checkpoint, [request], ranks, torch.float32, hardware=hardware)


def test_layout_auto_takes_the_best_plan(presets):
    assert auto(presets, "random-mid", 1) == Layout()
    assert auto(presets, "random-mid", 2).degrees.cfg == 2
    kept = auto(presets, "random-distilled", 6, ulysses=3, shard_weights=True)
    assert (kept.degrees.ulysses, kept.degrees.ring, kept.shard_weights) == (3, 2, True)


@pytest.mark.parametrize(
    ("ranks", "flags", "said"),
    [
        (4, {"ulysses": 3}, "--ulysses 3: cfg 1 ring 1 ulysses 3 vae 3: cfg · ring · ulysses is 3 but must equal"),
        (10, {}, "4 heads and 9 tokens"),
        (4, {"vae_parallel": 3}, "--vae-parallel 3: vae 3: must divide or equal the sequence group of 4"),
        (2, {"cfg_parallel": 2}, "--cfg-parallel 2: cfg 2: allowed is 1, as there is no guidance"),
    ],
)
def test_layout_auto_says_what_is_impossible(presets, ranks, flags, said):
    with pytest.raises(RequestError, match=r"--layout auto: no layout of .* is possible") as refusal:
        auto(presets, "random-distilled", ranks, **flags)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_layout_auto_is_a_flag():
    parser = argparse.ArgumentParser()
    add_flags(parser, AskedLayout)
    assert parser.parse_args(["--layout", "auto"]).layout == "auto"


@pytest.mark.parametrize(
    ("ranks", "flags", "expected"),
    [
        (4, {"vae_parallel": 2}, {"vae": 2}),
        (6, {"ffn_tp": 3}, {"ffn_tp": 3}),
        (4, {"vae_parallel": 1, "ring": 2}, {"vae": 1, "ring": 2}),
    ],
)
def test_degrees_given_stay(presets, ranks, flags, expected):
    """Also those that a search of its own does not try."""
    degrees = auto(presets, "random-distilled", ranks, **flags).degrees
    assert {name: getattr(degrees, name) for name in expected} == expected and degrees.world == ranks


def test_sharded_weights_of_one_rank_are_whole(presets):
    assert auto(presets, "random-distilled", 1, shard_weights=True) == Layout(shard_weights=True)


BF16 = torch.bfloat16


def chosen(ranks: int, hardware: Hardware, given=None, execution=Execution(), **fields) -> Layout:
    checkpoint = BuiltInCheckpoint.named("14b")
    requests = [Request(**{"prompt": ("a",), **fields}).resolve(checkpoint)]
    best = best_prediction(checkpoint, requests, BF16, ranks, hardware, given, execution=execution)
    return best.candidate.layout


def test_layout_auto_fits_in_memory():
    assert chosen(8, H100) == Layout(Degrees(ulysses=8, vae=8))
    assert chosen(4, RTX4090).shard_weights
    with pytest.raises(
        RequestError, match=r"no layout of 1 rank\(s\) fits in the 24\.5 GB.*--offload group"
    ) as refusal:
        chosen(1, RTX4090)
    assert "\n" not in str(refusal.value)


def test_offloaded_and_quantised_weights_count_as_such():
    """A card of 24 GB holds what is offloaded; two hold quantised weights, and no others can be sharded beside."""
    assert chosen(1, RTX4090, execution=Execution(offload="group")) == Layout()
    assert not chosen(2, RTX4090, execution=Execution(offload="group")).shard_weights
    assert chosen(2, H100, execution=Execution(quantize="int8")).shard_weights is False
    with pytest.raises(RequestError, match=r"fits in the 24\.5 GB"):
        chosen(2, RTX4090, execution=Execution(quantize="int8"))  # beside the text encoder
    for execution, said in (
        (Execution(offload="group"), "--shard-weights with --offload group"),
        (Execution(quantize="int8"), "--shard-weights with --quantize int8"),
    ):
        with pytest.raises(RequestError, match=said):
            chosen(2, H100, {"shard_weights": True}, execution)


def test_a_batch_is_not_taken_for_one_video():
    with pytest.raises(RequestError, match="no layout of 1 rank"):
        chosen(1, H100, prompt=("a",) * 8)
    assert chosen(1, H100) == Layout()


def test_the_request_that_needs_most_decides():
    """Not the one of most pixels: a guided batch of the same size needs more. Either must do with the layout."""
    checkpoint = BuiltInCheckpoint.named("14b-mid")
    plain, guided = (Request(prompt=("a",), guidance_scale=scale).resolve(checkpoint) for scale in (1.0, 5.0))
    batch = Request(prompt=("a",) * 8).resolve(checkpoint)
    alone = best_prediction(checkpoint, [guided], BF16, 2, H100)
    assert alone.candidate.layout.degrees.cfg == 2  # which leaves half of the ranks idle without guidance
    first, second = (best_prediction(checkpoint, each, BF16, 2, H100) for each in ([plain, guided], [guided, plain]))
    assert first == second and first.candidate.layout.degrees.cfg == 1
    assert first.seconds["products"] > best_prediction(checkpoint, [plain], BF16, 2, H100).seconds["products"]
    with pytest.raises(RequestError, match="no layout of 1 rank"):
        best_prediction(checkpoint, [plain, batch], BF16, 1, H100)


def test_hardware_given_is_planned_for(presets, tmp_path):
    """By name or from a calibration, with as many ranks a node as there are here."""
    flags = {"height": 64, "width": 64}
    checkpoint = Checkpoint.read(presets["random-distilled"])
    request = Request(prompt=("a fox",), **flags).resolve(checkpoint)
    profile = tmp_path / "small.json"
    profile.write_text(json.dumps(dataclasses.replace(H100, name="small", memory_bytes=1e6).to_json()))

    def planned(**given):
        arguments = AskedLayout(**given)
        hardware = planning_hardware(arguments, "cpu", 2)
        return choose_layout(arguments, checkpoint, [request], 2, torch.float32, hardware=hardware)

    assert planned(layout="auto", hardware="h100").degrees.world == 2
    with pytest.raises(RequestError, match="GB of small that each may use"):
        planned(layout="auto", hardware=str(profile))
    with pytest.raises(RequestError, match="--hardware h100: only allowed beside --layout auto"):
        planned(hardware="h100")
    near, far = (planning_hardware(AskedLayout(layout="auto", hardware="h100"), "cpu", count) for count in (2, 4))
    assert (near.gpus_per_node, far.gpus_per_node) == (2, 4) and near.name == "h100"


def test_a_quantised_feed_forward_is_split_where_its_groups_allow():
    """13824 features over 8 ranks are 1728, whole groups of int4; over 32 they are 432, which are not."""
    tried = {}
    for kind in (None, "int4"):
        plan = make_plan([workload("14b-mid")], H100, 32, {"decoders": 0}, Execution(quantize=kind))
        tried[kind] = {each.candidate.layout.degrees.ffn_tp for each in plan.fitting}
    assert tried == {None: {1, 2, 4, 8, 16, 32}, "int4": {1, 2, 4, 8, 16}}


def test_the_user_is_told_what_was_taken_and_for_what():
    said = Layout(Degrees(ulysses=2), shard_weights=True).as_planned("an A10")
    assert said == "--layout auto: cfg 1 ring 1 ulysses 2, weights sharded is modelled as fastest on an A10"
