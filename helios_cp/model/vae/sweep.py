"""One pass over a video: frames in groups, rows all here or spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from helios_cp.model.vae.kernels import NormSilu, norm_silu

PAST = 2  # frames that a causal kernel of three sees beside its own


class Rows:
    """The rows of a picture, all of them here. The layers know no ranks; `pipeline.split_codec` spreads the rows."""

    is_whole = True
    """Whether all are here. If not, what a convolution reads has room for a row of its neighbours on either side."""

    def fetch(self, states: Tensor, above: int, below: int) -> None:
        """Fill the first `above` and last `below` rows of `[B, T, above + H + below, W, C]` from those who have them.

        They are 0 or 1. Rows outside the picture are zeros. Where all rows are here, convolutions pad above by
        themselves.
        """
        if below:
            states[:, :, -below:] = 0

    def gather(self, states: Tensor) -> Tensor:
        """All rows of a picture, from `[B, T, H, W, C]` with those that lie here."""
        return states


@dataclass
class Sweep:
    """Keeps past frames of each layer's input from one group of frames to the next.

    `is_first` and `is_last` are about the current group. The first has no past, and of the last nothing is kept.
    """

    rows: Rows = field(default_factory=Rows)
    norm_silu: NormSilu = norm_silu
    is_first: bool = True
    is_last: bool = False
    _past: dict[nn.Module, Tensor] = field(default_factory=dict)

    @property
    def border(self) -> int:
        """Rows of others on either side of a convolution's input."""
        return 0 if self.rows.is_whole else 1

    def past(self, layer: nn.Module, frames: int) -> int:
        """How many past frames this group of `frames` needs in front of it.

        At the beginning of a video they are zeros. Groups of one or two frames then take fewer, and a smaller kernel.
        """
        return PAST if layer in self._past else min(frames - 1, PAST)

    def fill(self, layer: nn.Module, past: Tensor) -> None:
        """Write the past frames of a layer, zeros where there are none."""
        if layer in self._past:
            past.copy_(self._past.pop(layer))
        else:
            past.zero_()

    def keep(self, layer: nn.Module, states: Tensor, frames: int = PAST) -> None:
        """Remember the last frames of a layer's input for the group that follows, zeros in front of too few."""
        if self.is_last:
            return
        last = states[:, -frames:]
        kept = last.new_empty(last.shape[0], frames, *last.shape[2:])
        missing = frames - last.shape[1]
        kept[:, :missing] = 0
        kept[:, missing:] = last
        self._past[layer] = kept
