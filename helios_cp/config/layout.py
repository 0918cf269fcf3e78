"""Which layout of ranks a call runs in: the flags, the defaults, and what is refused."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Execution
from helios_cp.config.request import Request
from parallel.mesh import Degrees, default_degrees

DEGREES = {"cfg_parallel": "cfg", "ring": "ring", "ulysses": "ulysses", "ffn_tp": "ffn_tp", "vae_parallel": "vae"}
PLAIN = Execution()
"""Nothing compiled, quantised or offloaded."""


@dataclass(frozen=True)
class Layout:
    """How the ranks of a job share the work."""

    degrees: Degrees = field(default_factory=Degrees)
    attention: str = "native"
    shard_weights: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def as_planned(self, hardware: str) -> str:
        """One line for the user of `--layout auto`."""
        shards = ", weights sharded" if self.shard_weights else ""
        return f"--layout auto: {self.degrees}{shards} is modelled as fastest on {hardware}"

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Layout:
        return cls(Degrees(**values["degrees"]), values["attention"], values["shard_weights"])


def check_shard(shard_weights: bool, ffn_tp: int) -> None:
    """Raises `RequestError` for both ways to spread weights at once."""
    if shard_weights and ffn_tp > 1:
        raise RequestError(
            f"--shard-weights with --ffn-tp {ffn_tp}: give one of the two; --shard-weights saves more memory"
        )


def refusal(given: dict[str, int], world_size: int, **limits: Any) -> str | None:
    """Why the degrees given cannot be completed, in the words of a layout without `--layout auto`."""
    try:
        fill_degrees(given, world_size, **limits).check(world_size, **limits)
    except ValueError as error:
        return f"{flags_of(given)}: {error}"
    return None


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


def flags_of(given: dict[str, int]) -> str:
    names = {name: "--" + flag.replace("_", "-") for flag, name in DEGREES.items()}
    return " ".join(f"{names[name]} {value}" for name, value in given.items()) or "number of ranks"


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
