"""The layout of ranks that a call runs in: what is asked for, what it becomes, and the tokens to be shared out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from helios_cp.config.arguments import flag, flag_name
from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Execution
from helios_cp.config.paths import user_path_text
from helios_cp.config.request import Request
from parallel.degrees import Degrees, default_degrees

DEGREES = {"cfg_parallel": "cfg", "ring": "ring", "ulysses": "ulysses", "ffn_tp": "ffn_tp", "vae_parallel": "vae"}
ENGINES = ("native", "cudnn", "flash", "yunchang", "xfuser")
"""As in `parallel.engines`, which imports torch."""

MACHINES = ("h100", "h200", "a100-80", "rtx4090", "cpu")
"""As in `helios_cp.plan.hardware`, which imports torch."""

PLAIN = Execution()
"""Nothing compiled, quantised or offloaded."""


@dataclass(frozen=True)
class AskedLayout:
    """What a user asks of the layout. `None` is left to `helios_cp.plan.choose.choose_layout`."""

    layout: str | None = flag(
        None,
        "auto: what is modelled as fastest here and fits in memory, see helios_cp.plan; flags given are kept",
        group="layout of the ranks (cfg-parallel · ring · ulysses = number of ranks)",
        choices=("auto",),
    )
    hardware: str | None = flag(
        None,
        f"what --layout auto plans for: {', '.join(MACHINES)}, or a JSON file of benchmarks.calibrate (default: the "
        "cards here)",
        "NAME",
        parse=user_path_text,
    )
    ulysses: int | None = flag(None, "share the sequence, tokens against heads", "U")
    ring: int | None = flag(None, "share the sequence, keys and values passed on", "R")
    cfg_parallel: int | None = flag(None, "2: a branch of guidance each; Base, Mid", "C")
    ffn_tp: int | None = flag(None, "split the feed-forward weights; saves memory", "T")
    vae_parallel: int | None = flag(None, "split the VAE by rows of the picture", "V")
    shard_weights: bool | None = flag(
        None, "spread the blocks' weights over all ranks, gathered one block ahead; saves most memory (default: off)"
    )
    attention: str | None = flag(None, "kernels of the attention (default: native, PyTorch's own)", choices=ENGINES)
    backend: str | None = flag(
        None, "of the communication (default: nccl on CUDA, gloo elsewhere)", choices=("gloo", "nccl")
    )
    timeout: float = flag(
        600.0, "how long a rank waits for another before the job ends with an error", "SECONDS", above=0.0, most=1e6
    )

    @property
    def is_auto(self) -> bool:
        return self.layout == "auto"

    @property
    def degrees(self) -> dict[str, int]:
        """The degrees that are given, by the names of `Degrees`."""
        values = {name: getattr(self, field) for field, name in DEGREES.items()}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Layout:
    """How the ranks of a job share the work."""

    degrees: Degrees = field(default_factory=Degrees)
    attention: str = "native"
    shard_weights: bool = False

    def as_planned(self, hardware: str) -> str:
        """One line for the user of `--layout auto`."""
        shards = ", weights sharded" if self.shard_weights else ""
        return f"--layout auto: {self.degrees}{shards} is modelled as fastest on {hardware}"


def complete_degrees(given: dict[str, int], world_size: int, **limits: Any) -> Degrees:
    """As `fill_degrees`, and checked against the limits of `Degrees.check`. Raises `RequestError` with their flags."""
    try:
        degrees = fill_degrees(given, world_size, **limits)
        degrees.check(world_size, **limits)
    except ValueError as error:
        names = {name: flag_name(AskedLayout, field) for field, name in DEGREES.items()}
        typed = " ".join(f"{names[name]} {value}" for name, value in given.items()) or "number of ranks"
        raise RequestError(f"{typed}: {error}") from None
    return degrees


def fill_degrees(
    given: dict[str, int], world_size: int, *, guidance: bool, heads: int, smallest_tokens: int, vae_rows: int
) -> Degrees:
    """Complete the degrees given: of the ranks left, two go to guidance where there is any, the rest to the sequence.

    The VAE is split over as many ranks of the sequence group as have a row of the picture each.
    """
    axes = {name: value for name, value in given.items() if name in ("cfg", "ring", "ulysses")}
    if axes:
        used = math.prod(axes.values())
        left = world_size // used if used > 0 and world_size % used == 0 else 1
        if guidance and "cfg" not in axes and left % 2 == 0:
            axes["cfg"], left = 2, left // 2
        if "ulysses" not in axes:
            at_most = left if "ring" in axes else heads
            axes["ulysses"] = max(d for d in range(1, left + 1) if left % d == 0 and d <= max(at_most, 1))
            left //= axes["ulysses"]
        axes.setdefault("ring", left)
        degrees = Degrees(**axes)
    else:
        degrees = default_degrees(world_size, guidance, heads, smallest_tokens)
    rest = {name: value for name, value in given.items() if name in ("ffn_tp", "vae")}
    fitting = (d for d in range(1, degrees.sequence + 1) if degrees.sequence % d == 0 and d <= vae_rows)
    return replace(degrees, **{"vae": max(fitting), **rest})


def smallest_tokens(request: Request, checkpoint: Checkpoint) -> int:
    """Noisy tokens of the smallest stage of a resolved request, which is what the ranks have to share at least."""
    return min(lengths[-1] for lengths in segment_lengths(request, checkpoint))


def segment_lengths(request: Request, checkpoint: Checkpoint) -> list[tuple[int, ...]]:
    """Tokens of the segments of a resolved request's sequence, long · mid · short · noisy, for each stage in turn.

    The history has full size in every stage. A history token covers 4, 2 or 1 patches along each axis; where these do
    not fill it, the history is padded.
    """
    pt, ph, pw = checkpoint.transformer.patch_size
    frames = request.num_latent_frames_per_chunk // pt
    rows, columns = request.latent_size[0] // ph, request.latent_size[1] // pw
    long, mid, short = request.history_frames
    parts = ((long, 4), (mid, 2), (short + request.keep_first_frame, 1))  # the anchor frame precedes the short history
    history = tuple(
        math.ceil(count / (pool * pt)) * math.ceil(rows / pool) * math.ceil(columns / pool) for count, pool in parts
    )
    stages = len(request.pyramid_num_inference_steps_list) if checkpoint.is_pyramid else 1
    halvings = range(stages - 1, -1, -1)
    return [(*history, frames * (rows >> halving) * (columns >> halving)) for halving in halvings]
