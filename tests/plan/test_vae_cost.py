"""Unit: the planner's counts of the VAE, whole and split, against the decoder itself on meta tensors.

FLOPs and messages are exact. Memory of a decoding is a model that may say up to 30 % too much, and 2 % too little.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.measuring.counting import count
from benchmarks.measuring.memory import LiveMemory
from benchmarks.ranks.silent import silent_mesh
from helios_cp.config.layout import Layout
from helios_cp.model.codec import Codec
from helios_cp.model.vae.autoencoder import Autoencoder
from helios_cp.model.vae.config import VaeConfig
from helios_cp.pipeline.split_codec import SplitCodec
from helios_cp.plan import vae_cost
from helios_cp.plan.hardware import CPU, H100
from helios_cp.plan.predict import Candidate, predict
from parallel.mesh import Degrees
from tests.plan.workloads import workload

META = torch.device("meta")
FOUR = {"latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4}
VAES = (VaeConfig(), VaeConfig(8, 16, (1, 1, 1, 1), 0), VaeConfig(16, 4, (1, 2, 4), 1, (True, False), **FOUR))


def meta_vae(config: VaeConfig) -> Autoencoder:
    with META:
        return Autoencoder(config).eval()


@pytest.mark.parametrize("config", VAES, ids=str)
def test_vae_costs_what_is_counted(config):
    vae = meta_vae(config)
    for frames in (1, 2, 5):
        latents = torch.empty(1, config.z_dim, frames, 6, 4, device=META)
        assert vae_cost.decode_flops(config, frames, 6, 4) == count(vae.decode, latents).flops


def test_flops_of_the_vae_by_channels():
    """Beside the widths of the levels there are those of q, k and v at once, and of two frames at once."""
    flat = vae_cost.decode_flops_by_channels(VaeConfig(32, 16, (1, 1, 1), 1, (False, True)), 3, 6, 4)
    assert flat.keys() == {16, 32, 2 * 32, 3 * 32}
    by_channels = vae_cost.decode_flops_by_channels(VaeConfig(), 9, 48, 80)
    assert by_channels.keys() == {16, 96, 192, 384, 2 * 384, 3 * 384}
    assert sum(by_channels.values()) == vae_cost.decode_flops(VaeConfig(), 9, 48, 80)
    assert by_channels[16] == flat[16] * (9 * 48 * 80) // (3 * 6 * 4) == 2 * 9 * 48 * 80 * 16 * 16  # of the latents


def test_split_vae_sends_what_is_counted():
    """The middle one of three ranks, with two rows each."""
    config = VAES[2]
    vae = meta_vae(config)
    with silent_mesh(Degrees(ulysses=3, vae=3), 1) as (mesh, meters), torch.inference_mode():
        latents = torch.empty(1, config.z_dim, 3, 6, 4, device=META)
        codec = SplitCodec(vae, mesh.vae)
        codec.group = 3
        codec.decode(latents, "uint8")
        sent = meters["vae"].total_calls, meters["vae"].total_bytes
    assert vae_cost.decode_traffic(config, 3, 2, 4, 3) == sent


@pytest.mark.parametrize(("latent_frames", "group"), [(3, 3), (3, 1), (9, 9), (9, 4), (9, 1)])
def test_memory_of_decoding(latent_frames, group):
    vae, latents = meta_vae(VaeConfig()), torch.empty(1, 16, latent_frames, 12, 20, device=META)
    with torch.no_grad(), LiveMemory() as memory:
        codec = Codec(vae)
        codec.group = group
        codec.decode(latents, "uint8")
    assert 0.7 < memory.peak_bytes / vae_cost.decode_bytes(VaeConfig(), latent_frames, 12, 20, group) < 1.02


def test_a_split_vae_takes_longer_than_its_share():
    """By its messages, which on many ranks take as long as the rest."""
    whole, *split = (
        predict(workload(), Candidate(Layout(Degrees(ulysses=8, vae=vae))), H100).decode for vae in (1, 2, 8)
    )
    assert whole / 2 < split[0] < whole and whole / 8 < split[1] < split[0]
    slow = dataclasses.replace(H100, node_latency=1e-3)
    later = predict(workload(), Candidate(Layout(Degrees(ulysses=8, vae=8))), slow).decode - split[1]
    calls, _ = vae_cost.decode_traffic(VaeConfig(), 9, 6, 80, 8)
    assert later == pytest.approx(calls * (slow.node_latency - H100.node_latency))


def test_exchanges_have_a_latency_of_their_own():
    """As halos and rings have on gloo; collectives keep theirs."""
    late = dataclasses.replace(CPU, node_exchange_latency=10 * CPU.node_latency, overlap=0.0)
    for degrees, differs in (
        (Degrees(ring=2), True),
        (Degrees(ulysses=2, vae=2), True),
        (Degrees(ulysses=2), False),
    ):
        before, after = (predict(workload(), Candidate(Layout(degrees)), each).interval for each in (CPU, late))
        assert (after > before) == differs
