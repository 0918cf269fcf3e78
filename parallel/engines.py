"""Sequence-parallel attention by engine: this package's own algorithms over some kernel, or the layer of a peer.

`native`, `cudnn` and `flash` are kernels (see `parallel.attention`) under `parallel.unified`; they take any sizes. The
peers bring their own communication, which no `Meter` sees, and need equally many tokens and heads on every rank.
Queries may be fewer than keys, if those too are shared out evenly.

- `yunchang` is `LongContextAttention` of yunchang 0.6: an all-to-all each for q, k, v and the output. Its kernel is
  flash-attn 2 where that is installed, else torch's flash kernel, whose log-sum-exps its ring rounds to the dtype of q:
  the error is then several times ours. On a CPU its kernel gives no log-sum-exp, so a ring is wrong there. It reads
  `yunchang.globals.PROCESS_GROUP` when a layer is made, and only then.
- `xfuser` is `USP` of xfuser 0.7, with torch's flash kernel. It makes its groups once a process and looks them up at
  every call, so a second mesh of other degrees is refused. It logs to stdout; `LOG_LEVEL=error` quiets it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist

from parallel import attention as kernels
from parallel.attention import Attention, attend, attend_with_lse
from parallel.collectives import Group
from parallel.mesh import Degrees
from parallel.opaque import OpaqueAttention
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
    """From token counts to an engine's attention over the `ring.size · ulysses.size` ranks of a `Mesh`.

    A peer's layer is made here, once. Raises `ValueError` where a peer cannot run at all. The function that is returned
    raises it for token counts that the engine does not take. `unavailable_engine` says both beforehand.
    """
    if engine not in PEERS:
        local = functools.partial(attend, engine=engine)
        return functools.partial(
            unified_attention,
            ulysses,
            ring,
            attention=local if engine == "native" else OpaqueAttention(local),
            attention_with_lse=functools.partial(attend_with_lse, engine=engine),
        )
    device = torch.device(device)
    degrees = Degrees(ring=ring.size, ulysses=ulysses.size)
    backend = dist.get_backend() if degrees.sequence > 1 else None
    if reason := _peer_unavailable(engine, device, degrees, backend):
        raise ValueError(reason)
    layer = OpaqueAttention(peer_layer(engine, ulysses, ring, device))

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
    sequences: Iterable[Sequence[int]],
    heads: int,
    backend: str | None = None,
) -> str | None:
    """Why an engine cannot run here, in one line, or None where it can. Ask before weights are loaded.

    `dtype` is that of query, key and value. `sequences` has the token counts of the segments of every sequence to come:
    history parts, then noisy tokens, which are the only queries of the last block. All are checked together. `backend`
    is that of the communication, by default nccl on CUDA. The package of a peer is imported, because only that shows
    whether it can be. Raises `ValueError` for an unknown engine.
    """
    if engine not in ENGINES:
        raise ValueError(f"attention engine {engine!r}: allowed are {', '.join(ENGINES)}")
    device = torch.device(device)
    if engine not in PEERS:
        if degrees.ring > 1 and device.type not in ("cpu", "cuda"):
            return f"{engine} attention in a ring runs on cpu and cuda, not on {device.type}; use ulysses"
        return kernels.unavailable(engine, device, dtype)
    if reason := _peer_unavailable(engine, device, degrees, backend):
        return reason
    if device.type == "cuda" and dtype not in kernels.HALF:
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
        return f"{engine} attention in a ring of CUDA tensors needs nccl, not gloo; use ulysses alone, or native"
    for package in PEERS[engine]:
        if importlib.util.find_spec(package) is None:
            return f"{engine} attention needs the package {package}, which is not installed; use native"
    try:
        importlib.import_module("yunchang" if engine == "yunchang" else "xfuser.model_executor.layers.usp")
    except Exception as error:  # packages fail in many ways on versions and machines that they do not know
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return f"{engine} attention needs the package {engine}, whose import fails with {reason}; use native"
    return None


def peer_layer(engine: str, ulysses: Group, ring: Group, device: torch.device) -> Attention:
    """A peer's layer for the ranks of a mesh. Checks nothing beforehand: `sequence_attention` does."""
    return _yunchang_layer(ulysses, ring, device) if engine == "yunchang" else _xfuser_layer(ulysses, ring, device)


def _yunchang_layer(ulysses: Group, ring: Group, device: torch.device) -> Attention:
    from yunchang import LongContextAttention
    from yunchang.globals import HAS_FLASH_ATTN, PROCESS_GROUP
    from yunchang.kernels import AttnType

    kernel = AttnType.TORCH_MATH
    if device.type == "cuda":
        kernel = AttnType.FA if HAS_FLASH_ATTN else AttnType.TORCH_FLASH
    groups = _process_group(ulysses), _process_group(ring)
    before = PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG
    PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG = groups
    try:
        return LongContextAttention(attn_type=kernel)
    finally:
        PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG = before


def _process_group(group: Group) -> dist.ProcessGroup:
    """A process group even for one rank: yunchang takes None for all ranks of the world."""
    if group.process_group is not None:
        return group.process_group
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)


def _xfuser_layer(ulysses: Group, ring: Group, device: torch.device) -> Attention:
    from xfuser import xFuserArgs
    from xfuser.core import distributed as xfuser_groups
    from xfuser.core.distributed import runtime_state
    from xfuser.model_executor.layers.usp import USP

    degrees = {"ulysses_degree": ulysses.size, "ring_degree": ring.size}
    branches = dist.get_world_size() // (ulysses.size * ring.size)
    if not xfuser_groups.model_parallel_is_initialized():
        card = torch.cuda.current_device() if device.index is None else device.index
        xfuser_groups.init_distributed_environment(
            dist.get_world_size(), dist.get_rank(), local_rank=card, backend=dist.get_backend()
        )
        # Numbers ranks as a mesh does: ulysses innermost, then ring, then the branches of guidance.
        xfuser_groups.initialize_model_parallel(
            classifier_free_guidance_degree=branches, **degrees, backend=dist.get_backend()
        )
    made = xfuser_groups.get_ulysses_parallel_world_size(), xfuser_groups.get_ring_parallel_world_size()
    if made != (ulysses.size, ring.size):
        raise ValueError(
            f"xfuser attention over ulysses {ulysses.size} and ring {ring.size}: this process has its groups of "
            f"ulysses {made[0]} and ring {made[1]} already, and a process has them once; start another"
        )
    if not runtime_state.runtime_state_is_initialized():
        config, _ = xFuserArgs(**degrees, use_cfg_parallel=branches > 1, attention_backend="SDPA_FLASH").create_config()
        # `initialize_runtime_state` sets it only for a pipeline of xfuser's own, or for a single rank.
        runtime_state._RUNTIME = runtime_state.RuntimeState(config)

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return USP(*heads_first, combine_qkv_a2a=True).transpose(1, 2)

    return attention
