"""What one chunk hands to the next, and how it is kept on disk."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from helios_cp.config.request import Request
from helios_cp.model.conditions import History


@dataclass(frozen=True)
class ChunkState:
    """All that the next chunk needs. Its size does not grow with the video.

    `history` `[B, C, T, h, w]` are the last latent frames, long · mid · short, in fp32. `anchor` `[B, C, 1, h, w]` is
    the first frame that every chunk sees, or `None` without one. `generators` `[B, n]` are the states of the random
    generators, as bytes. The prompt's position follows from `index`, the number of finished chunks.
    """

    index: int
    history: Tensor
    anchor: Tensor | None
    generators: Tensor

    def make_generators(self) -> list[torch.Generator]:
        generators = []
        for saved in self.generators:
            generator = torch.Generator()
            generator.set_state(saved.clone())
            generators.append(generator)
        return generators

    def chunk_before(self, frames: int) -> Tensor | None:
        """The latents `[B, C, T, h, w]` of the chunk before, of so many latent frames, where the history holds them.

        `None` before chunk 0, whatever picture or clip it goes on from.
        """
        return None if self.index == 0 else self.history[:, :, -frames:]

    def after(
        self, latents: Tensor, generators: list[torch.Generator], request: Request, *, anchored: bool
    ) -> ChunkState:
        """The state after a chunk of `latents` `[B, C, T, h, w]`.

        `anchored` says that the anchor came from a picture or clip. Otherwise the first frame of chunk 0 becomes the
        anchor for good; `is_skip_first_chunk` replaces it by that of chunk 1.
        """
        latents = latents.float()
        anchor = self.anchor
        takes_anchor = (self.index == 0 and not anchored) or (self.index == 1 and request.is_skip_first_chunk)
        if request.keep_first_frame and takes_anchor:
            anchor = latents[:, :, :1].clone()
        history = torch.cat([self.history, latents], dim=2)[:, :, -self.history.shape[2] :].clone()
        return ChunkState(self.index + 1, history, anchor, generator_states(generators))

    def to_tensors(self) -> dict[str, Tensor]:
        """Named tensors for safetensors, on the CPU; `from_tensors` reads them back."""
        tensors = {"history": self.history, "generators": self.generators}
        if self.anchor is not None:
            tensors["anchor"] = self.anchor
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    @classmethod
    def from_tensors(cls, index: int, tensors: dict[str, Tensor], device: torch.device) -> ChunkState:
        anchor = tensors.get("anchor")
        return cls(
            index, tensors["history"].to(device), None if anchor is None else anchor.to(device), tensors["generators"]
        )


def generator_states(generators: list[torch.Generator]) -> Tensor:
    """`[B, n]` bytes."""
    return torch.stack([generator.get_state() for generator in generators])


def split_history(state: ChunkState, request: Request) -> tuple[History, tuple[int, ...]]:
    """The history of a state with its frame indices, and the indices of the noisy frames.

    Indices are the same for every chunk: anchor · long · mid · short · noisy, counted from 0.
    """
    sizes = request.history_frames
    long, mid, short = state.history.split(sizes, dim=2)
    anchor = 0 if state.anchor is None else 1
    bounds = [anchor]
    for size in (*sizes, request.num_latent_frames_per_chunk):
        bounds.append(bounds[-1] + size)
    long_indices, mid_indices, short_indices, noisy_indices = (
        tuple(range(start, stop)) for start, stop in itertools.pairwise(bounds)
    )
    if state.anchor is not None:
        short, short_indices = torch.cat([state.anchor, short], dim=2), (0, *short_indices)
    return History(short, short_indices, mid, mid_indices, long, long_indices), noisy_indices
