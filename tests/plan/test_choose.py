"""Unit: which layout a number of ranks gets, and which are refused with the nearest that work."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.json_types import from_json
from helios_cp.config.layout import AskedLayout, Layout, smallest_tokens
from helios_cp.config.ranks import Ranks
from helios_cp.config.request import Request
from helios_cp.device.device import card_of_rank
from helios_cp.pipeline.world import pick_backend
from helios_cp.plan.choose import choose_layout
from parallel.mesh import Degrees

CPU = torch.device("cpu")
GUIDED, PLAIN = "random-mid", "random-distilled"


def choose(presets, name: str, ranks: int, size=(64, 64), **flags) -> Layout:
    checkpoint = Checkpoint.read(presets[name])
    request = Request(prompt=("a fox",), height=size[0], width=size[1]).resolve(checkpoint)
    return choose_layout(AskedLayout(**flags), checkpoint, [request], ranks, torch.float32)


@pytest.mark.parametrize(
    ("name", "ranks", "flags", "expected"),
    [
        (PLAIN, 1, {}, Degrees()),
        (PLAIN, 2, {}, Degrees(ulysses=2, vae=2)),
        (PLAIN, 3, {}, Degrees(ulysses=3, vae=3)),
        (PLAIN, 7, {}, Degrees(ring=7, vae=7)),
        (PLAIN, 8, {}, Degrees(ring=2, ulysses=4, vae=8)),
        (GUIDED, 2, {}, Degrees(cfg=2)),
        (GUIDED, 3, {}, Degrees(ulysses=3, vae=3)),
        (GUIDED, 8, {}, Degrees(cfg=2, ulysses=4, vae=4)),
        (GUIDED, 8, {"ulysses": 4}, Degrees(cfg=2, ulysses=4, vae=4)),
        (GUIDED, 6, {"cfg_parallel": 1}, Degrees(ring=2, ulysses=3, vae=6)),
        (PLAIN, 6, {"ring": 3}, Degrees(ring=3, ulysses=2, vae=6)),
        (PLAIN, 6, {"ulysses": 3, "ffn_tp": 2, "vae_parallel": 3}, Degrees(ring=2, ulysses=3, ffn_tp=2, vae=3)),
    ],
)
def test_defaults_follow_from_what_is_given(presets, name, ranks, flags, expected):
    """Tiny models have 4 heads, a bound on Ulysses, and 64 pixels 8 rows of latents, a bound on the VAE."""
    assert choose(presets, name, ranks, **flags).degrees == expected


@pytest.mark.parametrize(
    ("name", "ranks", "flags", "said"),
    [
        (PLAIN, 4, {"ulysses": 3}, "nearest that work: cfg 1 ring 1 ulysses 4"),
        (PLAIN, 5, {"ulysses": 5}, "ulysses 5: at most 4 is allowed, the number of heads; nearest"),
        (PLAIN, 2, {"cfg_parallel": 2}, "no guidance"),
        (PLAIN, 4, {"ulysses": 4, "ffn_tp": 3}, "ffn_tp 3: must divide or equal the sequence group of 4"),
        (PLAIN, 4, {"ulysses": 4, "vae_parallel": 3}, "vae 3: must divide or equal"),
        (PLAIN, 10, {"ring": 10}, "no layout of 10 ranks works with 4 heads and 9 tokens"),
        (PLAIN, 16, {}, "nearest number of ranks"),
        (PLAIN, 2, {"ulysses": -2}, "--ulysses -2"),
        (GUIDED, 3, {"cfg_parallel": 3}, "cfg 3: allowed is 1 or 2"),
    ],
)
def test_impossible_layouts_are_refused(presets, name, ranks, flags, said):
    with pytest.raises(RequestError) as refusal:
        choose(presets, name, ranks, **flags)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_smallest_stage(presets):
    base, distilled = Checkpoint.read(presets["random-base"]), Checkpoint.read(presets["random-distilled"])
    size = {"height": 384, "width": 640}
    assert smallest_tokens(Request(prompt=("a",), **size).resolve(distilled), distilled) == 540
    assert smallest_tokens(Request(prompt=("a",), **size).resolve(base), base) == 8640


def test_layouts_travel_as_json():
    layout = Layout(Degrees(cfg=2, ring=3, ulysses=4, ffn_tp=2, vae=6), "flash", True)
    assert from_json(Layout, json.loads(json.dumps(dataclasses.asdict(layout)))) == layout


def test_devices_and_backends(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cuda = torch.device("cuda")
    assert card_of_rank(cuda, 5) == torch.device("cuda:1")
    assert card_of_rank(torch.device("cuda:0"), 5) == torch.device("cuda:0")
    assert card_of_rank(CPU, 5) == CPU
    assert pick_backend(None, CPU, Ranks()) == "gloo"
    assert pick_backend(None, cuda, Ranks(0, 0, 2, 2)) == "nccl"
    assert pick_backend("gloo", cuda, Ranks(0, 0, 8, 8)) == "gloo"
    with pytest.raises(RequestError, match="8 ranks share 2 card"):
        pick_backend("nccl", cuda, Ranks(0, 0, 8, 8))
    with pytest.raises(RequestError, match="--backend nccl"):
        pick_backend("nccl", CPU, Ranks())
