"""Which layout of ranks a call runs in: the flags, the defaults, and what is refused."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from helios_cp.config import Checkpoint, Request, RequestError
from helios_cp.sampling import SamplingPlan
from parallel.attention import unavailable
from parallel.mesh import Degrees, default_degrees

ENGINES = ("native", "cudnn", "flash", "yunchang", "xfuser")
DEGREES = {"cfg_parallel": "cfg", "ring": "ring", "ulysses": "ulysses", "ffn_tp": "ffn_tp", "vae_parallel": "vae"}


@dataclass(frozen=True)
class Layout:
    """How the ranks of a job share the work."""

    degrees: Degrees = field(default_factory=Degrees)
    attention: str = "native"
    shard_weights: bool = False


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a layout. Flags that the user leaves out are absent from the namespace."""
    layout = parser.add_argument_group("layout of the ranks (cfg-parallel · ring · ulysses = number of ranks)")
    layout.add_argument("--ulysses", type=int, metavar="U", help="shard the sequence, exchanging tokens for heads")
    layout.add_argument("--ring", type=int, metavar="R", help="shard the sequence, passing keys and values round")
    layout.add_argument("--cfg-parallel", type=int, metavar="C", help="2: a branch of guidance each; Base and Mid")
    layout.add_argument("--ffn-tp", type=int, metavar="T", help="split the feed-forward weights; saves memory")
    layout.add_argument("--vae-parallel", type=int, metavar="V", help="split the VAE by rows of the picture")
    layout.add_argument(
        "--shard-weights",
        action="store_true",
        help="spread every block's weights over all ranks and gather them one block ahead; saves most memory",
    )
    layout.add_argument(
        "--attention", choices=ENGINES, help="kernels of the attention (default: native, PyTorch's own)"
    )
    layout.add_argument(
        "--backend", choices=("gloo", "nccl"), help="of the communication (default: nccl on CUDA, gloo elsewhere)"
    )
    layout.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="how long a rank waits for another before the job ends with an error (default: 600)",
    )


def choose_layout(
    arguments: argparse.Namespace,
    checkpoint: Checkpoint,
    requests: Sequence[Request],
    world_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Layout:
    """The layout of the flags given, or a sound default for `world_size` ranks. Raises `RequestError`.

    By default guidance is split first where it is on, then the sequence by Ulysses; a degree that is given is kept and
    the others follow from it.
    """
    given = {name: getattr(arguments, flag) for flag, name in DEGREES.items() if hasattr(arguments, flag)}
    attention = getattr(arguments, "attention", "native")
    shard_weights = getattr(arguments, "shard_weights", False)
    guidance = any(SamplingPlan.of(request, checkpoint).is_guided for request in requests)
    limits = {
        "guidance": guidance,
        "heads": checkpoint.transformer.num_attention_heads,
        "smallest_tokens": min(smallest_tokens(request, checkpoint) for request in requests),
        "vae_rows": min(request.latent_size[0] for request in requests),
    }
    try:
        degrees = _fill(given, world_size, **limits)
        degrees.check(world_size, **limits)
    except ValueError as error:
        raise RequestError(f"{_flags(given)}: {error}") from None
    if shard_weights and degrees.ffn_tp > 1:
        raise RequestError(
            f"--shard-weights with --ffn-tp {degrees.ffn_tp}: give one of the two; --shard-weights saves more memory"
        )
    reason = unavailable(attention, device, dtype) if attention in ("native", "cudnn", "flash") else None
    if reason is not None:
        raise RequestError(f"--attention {attention}: {reason}")
    return Layout(degrees, attention, shard_weights)


def _fill(given: dict[str, int], world_size: int, **limits) -> Degrees:
    """Complete the degrees given: what is left of the world goes to ulysses, or to the ring where ulysses is given."""
    if not {"cfg", "ring", "ulysses"} & given.keys():
        default = default_degrees(world_size, **limits)
        chosen = {"cfg": default.cfg, "ring": default.ring, "ulysses": default.ulysses, "vae": default.vae}
        return Degrees(**{**chosen, **given})
    chosen = dict(given)
    for free in ("ulysses", "ring", "cfg"):
        used = math.prod(chosen.get(name, 1) for name in ("cfg", "ring", "ulysses"))
        if free not in chosen and used and world_size % used == 0 and free != "cfg":
            chosen[free] = world_size // used
    return Degrees(**chosen)


def _flags(given: dict[str, int]) -> str:
    names = {name: "--" + flag.replace("_", "-") for flag, name in DEGREES.items()}
    return " ".join(f"{names[name]} {value}" for name, value in given.items()) or "number of ranks"


def smallest_tokens(request: Request, checkpoint: Checkpoint) -> int:
    """Noisy tokens of the smallest stage of a resolved request, which is what the ranks have to share at least."""
    stages = len(request.pyramid_num_inference_steps_list) if checkpoint.is_pyramid else 1
    pt, ph, pw = checkpoint.transformer.patch_size
    height, width = (size // 2 ** (stages - 1) for size in request.latent_size)
    return (request.num_latent_frames_per_chunk // pt) * (height // ph) * (width // pw)
