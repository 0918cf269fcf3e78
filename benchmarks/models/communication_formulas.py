"""What the ranks of a forward must send each other, from the shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.models.models import HISTORY_INDICES, NOISY_INDICES, STAGES
from helios_cp.config.checkpoint import VAE_SPATIAL, TransformerConfig
from helios_cp.plan.forward_cost import Traffic
from parallel.mesh import Degrees

DTYPE = torch.bfloat16
AXES = ("cfg", "sequence", "ring", "ulysses", "ffn_tp")


ByAxis = dict[str, Traffic]
"""Traffic by the axis of the mesh that it crosses; `sequence` is the gather of the output, `context` diffusers'."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of one forward: S = history + noisy, N = noisy."""

    history: int
    noisy: int

    @classmethod
    def of(cls, size: tuple[int, int], stage: int) -> Tokens:
        """Of a pyramid stage of a video of `size` (height, width) pixels, patches being (1, 2, 2)."""
        rows, columns = (pixels // VAE_SPATIAL // 2 for pixels in size)
        shrink = 2 ** (STAGES[-1] - stage)
        history = 0
        for name, pool in (("short", 1), ("mid", 2), ("long", 4)):
            history += -(-len(HISTORY_INDICES[name]) // pool) * -(-rows // pool) * -(-columns // pool)
        return cls(history, len(NOISY_INDICES) * (rows // shrink) * (columns // shrink))

    @property
    def sequence(self) -> int:
        return self.history + self.noisy


def predict_ours(config: TransformerConfig, tokens: Tokens, degrees: Degrees) -> ByAxis:
    """Calls of each rank, and the bytes that all ranks of the job send *together*.

    With S, N tokens, width D, P = U·R ranks a sequence and T that share a feed-forward layer, a rank sends on average,
    in elements a block: Ulysses 4SD/P · (U − 1)/U, ring 2SD/P · (R − 1), feed-forward 2SD/P · (T − 1). In the last
    block history asks no questions, so that 2SD + 2ND takes the place of Ulysses' 4SD and N that of the feed-forward's
    S. At the end N tokens of 64 channels are gathered, and the two branches of guidance exchange their velocities.
    Sums over ranks are exact for uneven tokens too; heads must divide by U.
    """
    if config.num_attention_heads % degrees.ulysses:
        raise ValueError(f"ulysses {degrees.ulysses}: must divide the {config.num_attention_heads} heads")
    dim, inner = config.dim, config.num_layers - 1
    ulysses, ring, ffn = degrees.ulysses, degrees.ring, degrees.ffn_tp
    asked = tokens.sequence * inner + tokens.noisy  # queries of all blocks
    every = tokens.sequence * config.num_layers
    out = tokens.noisy * config.out_channels * 4  # a velocity, which is also what a rank has in the end
    elements = {
        "ulysses": (2 * asked + 2 * every) * dim * (ulysses - 1) // ulysses,
        "ring": 2 * every * dim * (ring - 1),
        "ffn_tp": 2 * asked * dim * (ffn - 1),
        "sequence": out * (degrees.sequence - 1),
        "cfg": out * degrees.sequence if degrees.cfg > 1 else 0,
    }
    calls = {
        "ulysses": 2 * config.num_layers * (ulysses > 1),
        "ring": config.num_layers * (ring - 1),
        "ffn_tp": 2 * config.num_layers * (ffn > 1),
        "sequence": int(degrees.sequence > 1),
        "cfg": int(degrees.cfg > 1),
    }
    return {axis: Traffic(calls[axis], elements[axis] * degrees.cfg * DTYPE.itemsize) for axis in AXES}


def predict_theirs(config: TransformerConfig, tokens: Tokens, ranks: int) -> ByAxis:
    """As `predict_ours` for diffusers' Ulysses.

    In each block 4 all-to-all (q, k, v, out) send 4SD/P · (P − 1)/P a rank, then its attention, cross-attention and
    feed-forward are each gathered whole: (2S + N)D · (P − 1)/P.
    """
    exchanged = 4 * tokens.sequence * config.dim * (ranks - 1) // ranks
    gathered = (2 * tokens.sequence + tokens.noisy) * config.dim * (ranks - 1)
    layers = config.num_layers
    return {"context": Traffic(7 * layers, (exchanged + gathered) * layers * DTYPE.itemsize)}
