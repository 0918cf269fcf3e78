"""What decoding a chunk at full size needs, counted on tensors without memory: FLOPs, bytes and memory.

Elementwise bytes are those of all operations but convolutions and attention; each reads its inputs and writes its
result once. A convolution on a CPU adds its bias, and the sum of a residual block. cuDNN's add neither, so PyTorch adds
a bias in a pass of its own, and ours in that of the norm that follows.

A norm of ours is one pass with the sum before it and the SiLU after it: eager code works in blocks that stay in a cache
from one to the next, and compiled code keeps them in registers, so both move the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from benchmarks.measuring.counting import Counter, Counts
from benchmarks.measuring.memory import LiveMemory
from benchmarks.models.peer_vae import peer_vae
from helios_cp.model.vae.autoencoder import Autoencoder
from helios_cp.model.vae.config import VaeConfig

SIZE = (384, 640)
LATENT_FRAMES = 9
DEVICES = ON_CARD, ON_CPU = "on a card", "on a CPU"


@dataclass(frozen=True)
class DecodeCounts:
    """Of one chunk. `memory` is the peak beside the weights, and `least_memory` that of one latent frame at a time."""

    flops: int
    elementwise_bytes: int
    memory: int
    least_memory: int


class CardCounter(Counter):
    """Counts the pass of a convolution's bias as `BIAS`. A second term of a sum finds the first in a cache."""

    BIAS = "bias"

    def __init__(self) -> None:
        super().__init__()
        self._last_sum: Tensor | None = None

    def __torch_dispatch__(self, function: OpOverload, types, args=(), kwargs=None):
        is_sum = function is torch.ops.aten.add.out
        is_in_cache = is_sum and args[0] is self._last_sum
        self._last_sum = kwargs["out"] if is_sum else None
        if is_in_cache:
            return function(*args, **kwargs)
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if function is torch.ops.aten.convolution.default and args[2] is not None:
            moved = Counts(kernels=1, elementwise_bytes=2 * result.nbytes + args[2].nbytes)
            self.operations[self.BIAS] = self.operations.get(self.BIAS, Counts()) + moved
        return result


class NormTraffic:
    """Stands in for the norms of a VAE, and counts what each reads and writes in one pass; `sums` is that of sums."""

    def __init__(self) -> None:
        self.bytes = self.sums = 0

    def __call__(
        self,
        states: Tensor,
        weight: Tensor,
        out: Tensor,
        addend: Tensor | None = None,
        bias: Tensor | None = None,
        keep: bool = False,
    ) -> None:
        self.bytes += states.nbytes + weight.nbytes + out.nbytes
        self.sums += sum(term.nbytes for term in (addend, bias) if term is not None) + keep * states.nbytes


@functools.cache
def count_decodes(config: VaeConfig | None = None, size: tuple[int, int] = SIZE) -> dict[str, dict[str, Any]]:
    """By program, in fp32."""
    config = config or VaeConfig()
    with torch.device("meta"):
        ours = Autoencoder(config).eval()
    theirs = peer_vae(ours)
    latents = torch.empty(1, config.z_dim, LATENT_FRAMES, *(pixels // config.spatial for pixels in size), device="meta")
    most, least = (_peak(lambda group=group: _frames(ours.decode_groups(latents, group))) for group in (None, 1))
    peak = _peak(lambda: theirs.decode(latents))
    ours.norm_silu = norms = NormTraffic()
    peer, one_pass = _operations(lambda: theirs.decode(latents)), _operations(lambda: ours.decode(latents))
    found = {}
    for device in DEVICES:
        left_out = (CardCounter.BIAS, "aten.add.out") if device == ON_CPU else ()
        moved, moved_by_ours = (_elementwise_bytes(counter, left_out) for counter in (peer, one_pass))
        moved_by_ours += norms.bytes + (norms.sums if device == ON_CARD else 0)
        found[f"diffusers, {device}"] = DecodeCounts(peer.total.flops, moved, peak, peak)
        found[f"ours, {device}"] = DecodeCounts(one_pass.total.flops, moved_by_ours, most, least)
    return {name: asdict(each) for name, each in found.items()}


def _frames(groups: Iterator[Tensor]) -> Tensor:
    """As bytes, which is what is kept of a group."""
    return torch.cat([group.to(torch.uint8) for group in groups], 1)


def _operations(run: Callable[[], Any]) -> CardCounter:
    with torch.inference_mode(), CardCounter() as counter:
        run()
    return counter


def _elementwise_bytes(counter: Counter, left_out: Sequence[str]) -> int:
    return sum(counts.elementwise_bytes for name, counts in counter.operations.items() if name not in left_out)


def _peak(run: Callable[[], Any]) -> int:
    with torch.no_grad(), LiveMemory() as memory:
        run()
    return memory.peak_bytes
