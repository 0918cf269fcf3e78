"""What decoding a chunk at full size needs, counted on tensors without memory: FLOPs, bytes and memory.

Elementwise bytes are those of all operations but convolutions and attention; each reads its inputs and writes its
result once. What ours leaves in a cache between a norm and its SiLU is not counted: it works in blocks that are made
for that, and compiled code keeps it in registers, so both move the same. A CPU's convolutions add the residual
themselves, which on a card is an operation of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring.counting import Counter
from benchmarks.measuring.memory import LiveMemory
from benchmarks.models.peer_vae import peer_vae
from helios_cp.model.vae.autoencoder import Autoencoder
from helios_cp.model.vae.config import VaeConfig

SIZE = (384, 640)
LATENT_FRAMES = 9
ON_CARD, ON_CPU = "ours, on a card", "ours, on a CPU"


@dataclass(frozen=True)
class DecodeCounts:
    """Of one chunk. `memory` is the peak beside the weights, and `least_memory` that of one latent frame at a time."""

    flops: int
    elementwise_bytes: int
    memory: int
    least_memory: int


def count_decodes(config: VaeConfig | None = None, size: tuple[int, int] = SIZE) -> dict[str, dict[str, Any]]:
    """By program, in fp32."""
    config = config or VaeConfig()
    with torch.device("meta"):
        ours = Autoencoder(config).eval()
    theirs = peer_vae(ours)
    latents = torch.empty(1, config.z_dim, LATENT_FRAMES, *(pixels // config.spatial for pixels in size), device="meta")
    peer, one_pass = _operations(lambda: theirs.decode(latents)), _operations(lambda: ours.decode(latents))
    most, least = (_peak(lambda group=group: _frames(ours.decode_groups(latents, group))) for group in (None, 1))
    peak = _peak(lambda: theirs.decode(latents))
    flops = one_pass.total.flops
    passes = one_pass.total.elementwise_bytes - _bytes(one_pass, "aten.rms_norm.default", "aten.silu.out") // 2
    sums = _bytes(one_pass, "aten.add_.Tensor")
    found = {
        "diffusers": DecodeCounts(peer.total.flops, peer.total.elementwise_bytes, peak, peak),
        ON_CARD: DecodeCounts(flops, passes, most, least),
        ON_CPU: DecodeCounts(flops, passes - sums, most, least),
    }
    return {name: asdict(each) for name, each in found.items()}


def _frames(groups: Iterator[Tensor]) -> Tensor:
    """As bytes, which is what is kept of a group."""
    return torch.cat([group.to(torch.uint8) for group in groups], 1)


def _operations(run: Callable[[], Any]) -> Counter:
    with torch.inference_mode(), Counter() as counter:
        run()
    return counter


def _bytes(counter: Counter, *names: str) -> int:
    return sum(counter.operations[name].elementwise_bytes for name in names)


def _peak(run: Callable[[], Any]) -> int:
    with torch.no_grad(), LiveMemory() as memory:
        run()
    return memory.peak_bytes
