"""Unit, without a cluster: how large a group can be, which layout `--layout auto` takes, and where text is encoded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helios_cp.config.errors import RequestError
from helios_cp.config.layout import Layout
from helios_cp.config.request import Request
from helios_cp.plan.choose import best_prediction
from helios_cp.plan.hardware import detect_hardware
from helios_cp.weights.load import resolve
from launchers.driver.recipes import Resources, bundle, recipes
from launchers.generate import automatic_layout as automatic
from launchers.generate.__main__ import build_parser
from launchers.generate.automatic_layout import largest_group, with_best_layout
from launchers.generate.flags import ClusterCall
from launchers.workers.loading import Loading
from parallel.mesh import Degrees

NODES = [{"CPU": 8.0}, {"CPU": 4.0}]


@pytest.mark.parametrize(
    ("nodes", "groups", "others", "expected"),
    [
        ([8], 1, 0, 8),
        ([8], 1, 3, 5),
        ([8], 3, 0, 2),
        ([8, 4], 1, 4, 8),  # the small node takes the others
        ([8, 4], 1, 5, 7),
        ([8, 4], 2, 3, 4),
        ([8, 4], 2, 7, 2),
        ([4, 4], 1, 0, 4),  # never over two nodes
        ([2, 2], 5, 0, 0),
        ([2], 1, 2, 0),
        ([], 1, 0, 0),
    ],
)
def test_largest_group(nodes, groups, others, expected):
    free = [{"CPU": float(count)} for count in nodes]
    assert largest_group(free, groups, {"CPU": 1.0}, [{"CPU": 1.0}] * others) == expected
    assert free == [{"CPU": float(count)} for count in nodes], "nothing is taken for good"


def test_cards_are_shared_by_decoder_and_text_encoder():
    eight = [{"CPU": 64.0, "GPU": 8.0}]
    assert largest_group(eight, 1, bundle(1, 1), [bundle(1, 0.5)] * 2) == 7
    assert largest_group(eight, 1, bundle(1, 1), [bundle(1, 0.5)] * 3) == 6


def arguments_of(*flags: str, address: str = "HOST:6379"):
    words = ["--prompt", "a fox", "--layout", "auto", "--address", address, *flags]
    return ClusterCall.of(build_parser().parse_args(words))


@pytest.fixture
def take(presets, cache, monkeypatch):
    """Runs `with_best_layout` on a cluster of `NODES`; returns the call."""
    monkeypatch.setattr(automatic, "nodes_free", lambda: NODES)

    def take(*flags: str, name: str = "random-mid", address: str = "HOST:6379"):
        arguments = arguments_of("--model", str(presets[name]), *flags, address=address)
        found = with_best_layout(arguments, cache, "cpu", Resources())
        assert not found.layout.is_auto, "from here on the degrees count"
        return found

    return take


def predictions(presets, name, ranks, size, groups, decoders):
    checkpoint = resolve(str(presets[name]))
    request = Request(prompt=("a fox",), height=size, width=size).resolve(checkpoint)
    hardware = detect_hardware("cpu", groups * ranks)
    return best_prediction(checkpoint, [request], torch.float32, ranks, hardware, {"vae": 1}, decoders)


@pytest.mark.parametrize(("groups", "decoders", "most"), [(1, 1, 8), (1, 4, 7), (2, 2, 4)])
def test_the_fastest_group_that_has_room(take, presets, groups, decoders, most):
    """Large enough a video that more ranks pay, so that a wrong limit would show."""
    found = take("--groups", str(groups), "--decoders", str(decoders), "--height", "512", "--width", "512")
    made = [predictions(presets, "random-mid", ranks, 512, groups, decoders // groups) for ranks in range(1, most + 1)]
    best = max(made, key=lambda each: (each.fps, -each.latency)).candidate
    assert best.decoders == decoders // groups and best.layout.degrees.world > 1
    assert Layout(Degrees(**found.layout.degrees), shard_weights=found.layout.shard_weights) == best.layout
    assert found.ranks == best.layout.degrees.world


def test_what_is_given_stays(take):
    found = take("--ranks", "4", "--ring", "2", "--height", "64", "--width", "64")
    assert (found.ranks, found.layout.ring, found.layout.cfg_parallel * found.layout.ulysses) == (4, 2, 2)
    assert take("--ulysses", "3", "--decoders", "0", "--height", "64", "--width", "64").layout.ulysses == 3


def test_a_machine_of_few_cores_has_room_for_one_rank(take, monkeypatch):
    monkeypatch.setattr(automatic.os, "cpu_count", lambda: 2)
    assert take("--groups", "4", "--height", "64", "--width", "64", address="local").ranks == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--groups", "13"], "no room for 13 group.* 4 CPU; 8 CPU|no room for 13 group.* 8 CPU; 4 CPU"),
        (["--ranks", "4", "--ulysses", "3"], "no layout of 4 rank"),
        (["--spread"], "--spread: say how many ranks"),
    ],
)
def test_refused_in_one_line(take, flags, said):
    with pytest.raises(RequestError, match=said) as refusal:
        take(*flags, "--height", "64", "--width", "64")
    assert "\n" not in str(refusal.value)


def loading(shard_weights: bool) -> Loading:
    layout = Layout(Degrees(ulysses=2), shard_weights=shard_weights)
    return Loading("random-distilled", "auto", "cuda", "nccl", layout, 60.0)


@pytest.mark.parametrize(
    ("degrees", "groups", "decoders", "spread", "said"),
    [
        (Degrees(ulysses=2), 0, 1, False, "--groups 0"),
        (Degrees(ulysses=2), 1, -1, False, "--decoders -1"),
        (Degrees(ulysses=2, vae=2), 1, 1, False, "--vae-parallel 2"),
        (Degrees(ulysses=2), 1, 1, True, "--spread"),
    ],
)
def test_workers_that_no_pipeline_can_have(degrees, groups, decoders, spread, said):
    """In Python as by flags, which `test_command_line.py` looks at."""
    asked = replace(loading(shard_weights=False), layout=Layout(degrees))
    with pytest.raises(RequestError, match=said):
        recipes(asked, groups, decoders, Resources(), spread, "node")


@pytest.mark.parametrize(("shard_weights", "device", "gpus"), [(False, "cuda", 0.5), (True, "cpu", None)])
def test_text_is_encoded_where_the_single_program_does_it(shard_weights, device, gpus):
    """On the CPU beside sharded weights, and then without a card; see `pipeline.parallelize.load_parallel`."""
    found = recipes(loading(shard_weights), 1, 1, Resources.of("cuda"), False, "node")
    text = next(recipe for recipe in found if recipe.name == "text")
    ((_, (_, where, dtype, _), _),) = text.actors
    assert (where, dtype) == (device, "bfloat16")
    assert text.needs.bundles[0].get("GPU") == gpus
