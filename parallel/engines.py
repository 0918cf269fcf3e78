"""Sequence-parallel attention by engine: this package's own algorithms over some kernel, or the layer of a peer.

- `native`, `cudnn` and `flash` are kernels (see `parallel.attention`) under `parallel.unified`; they take any sizes.
- `yunchang` is `yunchang.LongContextAttention` and `xfuser` is `xFuserLongContextAttention`, the layers of Unified
  Sequence Parallelism of those packages, with their own communication and kernels: flash-attn 2 where it is installed,
  else torch's flash kernel; on a CPU, where only Ulysses of yunchang works, torch's mathematical one. Every rank must
  hold equally many tokens and heads. Queries may be fewer than keys, if those too are shared out evenly. The layers
  move q, k and v in an all-to-all each, a call four in all, which no `Meter` sees. Without flash-attn their ring
  rounds log-sum-exps to the dtype of q, which makes it several times less exact than ours.

Both peers read their process groups from `yunchang.globals.PROCESS_GROUP`, but only when a layer is made. It holds the
groups of the mesh for that moment alone, so that layers of different meshes can live side by side.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from parallel import attention as kernels
from parallel.attention import Attention, attend, attend_with_lse
from parallel.collectives import Group
from parallel.mesh import Degrees
from parallel.segments import check_lengths
from parallel.unified import unified_attention

# What each peer needs to be imported; triton is imported by xfuser but not among its requirements.
PEERS = {"yunchang": ("yunchang",), "xfuser": ("xfuser", "yunchang", "triton")}
ENGINES = (*kernels.ENGINES, *PEERS)

SequenceAttention = Callable[[Sequence[int], Sequence[int]], Attention]
"""(query lengths, key lengths) of every rank of the sequence group → attention of this rank's `[B, S_local, H, D]`."""


def sequence_attention(
    engine: str, ulysses: Group, ring: Group, device: torch.device | str = "cpu"
) -> SequenceAttention:
    """What gives an engine's attention over the `ring.size · ulysses.size` ranks of a `Mesh`, for given token counts.

    A peer's layer is made here, once. Raises `ValueError` where a peer cannot run at all, and what is returned raises
    it for lengths that the engine does not take; `unavailable_engine` says so beforehand.
    """
    if engine not in PEERS:
        return functools.partial(
            unified_attention,
            ulysses,
            ring,
            attention=functools.partial(attend, engine=engine),
            attention_with_lse=functools.partial(attend_with_lse, engine=engine),
        )
    device = torch.device(device)
    degrees = Degrees(ring=ring.size, ulysses=ulysses.size)
    backend = dist.get_backend() if degrees.sequence > 1 else None
    if reason := _peer_unavailable(engine, device, degrees, backend):
        raise ValueError(reason)
    layer = peer_layer(engine, ulysses, ring, device)

    def with_lengths(query_lengths: Sequence[int], key_lengths: Sequence[int]) -> Attention:
        check_lengths(degrees.sequence, query_lengths, key_lengths)
        for lengths in (query_lengths, key_lengths):
            if len(set(lengths)) > 1:
                raise ValueError(
                    f"{engine} attention of {tuple(lengths)} tokens: it needs equally many on every rank; use native"
                )
        return layer

    return with_lengths


def unavailable_engine(
    engine: str,
    device: torch.device | str,
    dtype: torch.dtype,
    degrees: Degrees,
    sequences: Sequence[Sequence[int]],
    heads: int,
    backend: str | None = None,
) -> str | None:
    """Why an engine cannot run here, in one line, or None where it can. To be asked before weights are loaded.

    `dtype` is that of query, key and value. `sequences` has the token counts of the segments of every sequence to come
    (history parts, then noisy tokens, which in the last block ask alone); they are checked together. `backend` is that
    of the communication, by default nccl on CUDA. Imports the package of a peer, as nothing less shows whether it can
    be imported. Raises `ValueError` for an unknown engine.
    """
    if engine not in ENGINES:
        raise ValueError(f"attention engine {engine!r}: allowed are {', '.join(ENGINES)}")
    device = torch.device(device)
    if engine not in PEERS:
        return kernels.unavailable(engine, device, dtype)
    if reason := _peer_unavailable(engine, device, degrees, backend):
        return reason
    if device.type == "cuda" and dtype not in (torch.float16, torch.bfloat16):
        return f"{engine} attention takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}; use native"
    if heads % degrees.ulysses:
        allowed = [size for size in range(1, degrees.ulysses) if heads % size == 0]
        return (
            f"{engine} attention needs equally many heads on every rank, and {heads} heads do not divide by ulysses "
            f"{degrees.ulysses}; allowed are {', '.join(map(str, allowed))}; or use native"
        )
    counts = {count for lengths in sequences for count in (sum(lengths), lengths[-1])}
    for count in sorted(counts):
        if count % degrees.sequence:
            allowed = [size for size in range(2, degrees.sequence) if not any(number % size for number in counts)]
            return (
                f"{engine} attention needs equally many tokens on every rank, and {count} tokens do not divide by "
                f"{degrees.sequence} sequence ranks; "
                + (f"allowed are {', '.join(map(str, allowed))}; or use native" if allowed else "use native")
            )
    return None


def _peer_unavailable(engine: str, device: torch.device, degrees: Degrees, backend: str | None) -> str | None:
    """As `unavailable_engine`, of what does not depend on the tensors."""
    if engine == "xfuser" and device.type != "cuda":
        return f"xfuser attention needs a CUDA device, not {device.type}; use native"
    if device.type not in ("cpu", "cuda"):
        return f"{engine} attention runs on cpu and cuda, not on {device.type}; use native"
    if degrees.sequence == 1:
        return f"{engine} attention shares a sequence among ranks, and here a single rank holds it; use native"
    if degrees.ring > 1 and device.type == "cpu":
        return f"{engine} attention gives wrong results in a ring on the CPU; use ulysses alone, or native"
    if degrees.ring > 1 and backend == "gloo":
        return f"{engine} attention in a ring sends CUDA tensors rank to rank, which gloo cannot; use nccl, or native"
    for package in PEERS[engine]:
        if importlib.util.find_spec(package) is None:
            return f"{engine} attention needs the package {package}, which is not installed; use native"
    try:
        _peer_class(engine)
    except Exception as error:  # packages fail in many ways on versions and machines that they do not know
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return f"{engine} attention needs the package {engine}, whose import fails with {reason}; use native"
    return None


def _peer_class(engine: str) -> type[torch.nn.Module]:
    if engine == "yunchang":
        return importlib.import_module("yunchang").LongContextAttention
    return importlib.import_module("xfuser.core.long_ctx_attention").xFuserLongContextAttention


def peer_layer(engine: str, ulysses: Group, ring: Group, device: torch.device) -> Attention:
    """A peer's layer on the groups of a mesh. Checks nothing: `sequence_attention` does."""
    from yunchang.globals import HAS_FLASH_ATTN, PROCESS_GROUP
    from yunchang.kernels import AttnType

    kernel = AttnType.TORCH_MATH
    if device.type == "cuda":
        kernel = AttnType.FA if HAS_FLASH_ATTN else AttnType.TORCH_FLASH
    groups = _process_group(ulysses), _process_group(ring)
    before = PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG
    PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG = groups
    try:
        layer = _peer_class(engine)(attn_type=kernel)
    finally:
        PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG = before
    # xfuser's takes first a module that keeps keys and values from step to step, which is for its pipelines.
    return layer if engine == "yunchang" else functools.partial(layer, None)


def _process_group(group: Group) -> dist.ProcessGroup:
    """A process group even for one rank: the peers take None for all ranks of the world."""
    if group.process_group is not None:
        return group.process_group
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)
