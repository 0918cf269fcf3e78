"""Unit: the planner's counts of the VAE, whole and split, against the decoder itself on meta tensors.

FLOPs, kernels, parameters and messages are exact. Copies that a split adds come within 1 %, as the frames that travel
to rank 0 are left out. Memory of a decoding is a model that may say up to 30 % too much, and 2 % too little.
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
from helios_cp.pipeline.split_codec import SplitCodec, SplitRows
from helios_cp.plan import vae_cost
from helios_cp.plan.machines import CPU, H100
from helios_cp.plan.predict import Candidate, predict
from helios_cp.plan.vae_cost import decode_kernels, split_extra
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
    assert vae_cost.parameters(config) == sum(parameter.numel() for parameter in vae.parameters())


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
        Codec(vae, group=group).decode(latents, "uint8")
    assert 0.7 < memory.peak_bytes / vae_cost.decode_bytes(VaeConfig(), latent_frames, 12, 20, group) < 1.02


def split_counts(config: VaeConfig, latent_frames: int):
    """Of a whole decoding of six rows, and of that of the middle one of three ranks."""
    vae, latents = meta_vae(config), torch.empty(1, config.z_dim, latent_frames, 6, 4, device=META)
    with silent_mesh(Degrees(ulysses=3, vae=3), 1) as (mesh, _):
        rows = SplitRows(mesh.vae, (2, 2, 2))
        return count(vae.decode, latents), count(vae.decode, latents[..., 2:4, :], rows=rows)


@pytest.mark.parametrize("latent_frames", [1, 2, 5])
@pytest.mark.parametrize("config", VAES, ids=str)
def test_a_split_vae_costs_what_is_counted(config, latent_frames):
    unsplit, split = split_counts(config, latent_frames)
    extra = split_extra(config, latent_frames, 6, 2, 4, 3)
    assert (decode_kernels(config, latent_frames), extra.kernels) == (unsplit.kernels, split.kernels)
    assert 3 * (split.flops - extra.flops) == unsplit.flops
    assert extra.bytes == pytest.approx(split.elementwise_bytes - unsplit.elementwise_bytes / 3, rel=0.01)


def test_a_wrong_halo_is_seen(monkeypatch):
    unsplit, split = split_counts(VAES[1], 5)
    monkeypatch.setattr(vae_cost, "_border_passes", lambda *_: 0)
    split_extra.cache_clear()
    extra = split_extra(VAES[1], 5, 6, 2, 4, 3)
    split_extra.cache_clear()
    assert extra.bytes != pytest.approx(split.elementwise_bytes - unsplit.elementwise_bytes / 3, rel=0.01)


def test_a_split_vae_takes_longer_than_its_share():
    """By what is copied and made again, by messages, and on many ranks by launches, of which there are no fewer."""
    work = workload()[0]
    whole, halves = (predict(work, Candidate(Layout(Degrees(ulysses=2, vae=vae))), CPU).decode for vae in (1, 2))
    assert whole / 2 < halves < whole
    slow, quick = (dataclasses.replace(H100, kernel_seconds=seconds) for seconds in (1e-3, 1e-9))
    many = Candidate(Layout(Degrees(ulysses=8, vae=8)))
    launches = split_extra(work.vae, work.latent_frames, 48, 6, 80, 8).kernels * slow.kernel_seconds
    assert predict(work, many, slow).decode > launches > predict(work, many, quick).decode


def test_exchanges_have_a_latency_of_their_own():
    """As halos and rings have on gloo; collectives keep theirs."""
    late = dataclasses.replace(CPU, node_exchange_latency=10 * CPU.node_latency, overlap=0.0)
    for degrees, differs in (
        (Degrees(ring=2), True),
        (Degrees(ulysses=2, vae=2), True),
        (Degrees(ulysses=2), False),
    ):
        before, after = (predict(workload()[0], Candidate(Layout(degrees)), each).interval for each in (CPU, late))
        assert (after > before) == differs
