"""Which layout of ranks a call runs in: that of its flags, a sound default, or with `--layout auto` the fastest."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Execution
from helios_cp.config.layout import (
    DEGREES,
    PLAIN,
    Layout,
    check_shard,
    fill_degrees,
    flags_of,
    segment_lengths,
    smallest_tokens,
)
from helios_cp.config.request import Request
from helios_cp.config.sampling_plan import SamplingPlan
from helios_cp.plan.detect import Hardware, detect_hardware, find_hardware
from helios_cp.plan.search import choose
from parallel.engines import unavailable_engine


def choose_layout(
    arguments: argparse.Namespace,
    checkpoint: Checkpoint,
    requests: Sequence[Request],
    world_size: int,
    device: torch.device,
    dtype: torch.dtype,
    execution: Execution = PLAIN,
    ranks_of_node: int | None = None,
) -> Layout:
    """The layout of the flags given, or a sound default for `world_size` ranks. Raises `RequestError`.

    By default guidance is split first where it is on, then the sequence by Ulysses; a degree that is given is kept and
    the others follow from it. With `--layout auto` they are what `helios_cp.plan` models as fastest here, in memory's
    bounds, which depend on the execution and on how many of the ranks share a node: all, unless told otherwise.
    """
    given = {name: getattr(arguments, flag) for flag, name in DEGREES.items() if hasattr(arguments, flag)}
    attention = getattr(arguments, "attention", "native")
    shard_weights = getattr(arguments, "shard_weights", False)
    hardware = planning_hardware(arguments, device.type, ranks_of_node or world_size)
    if hardware is not None:
        kept = {**given, **({"shard_weights": shard_weights} if hasattr(arguments, "shard_weights") else {})}
        planned = choose(checkpoint, requests, dtype, world_size, device.type, kept, execution, hardware)
        given = {name: getattr(planned.degrees, name) for name in DEGREES.values()}
        shard_weights = planned.shard_weights
    guidance = any(SamplingPlan.of(request, checkpoint).is_guided for request in requests)
    limits = {
        "guidance": guidance,
        "heads": checkpoint.transformer.num_attention_heads,
        "smallest_tokens": min(smallest_tokens(request, checkpoint) for request in requests),
        "vae_rows": min(request.latent_size[0] for request in requests),
    }
    try:
        degrees = fill_degrees(given, world_size, **limits)
        degrees.check(world_size, **limits)
    except ValueError as error:
        raise RequestError(f"{flags_of(given)}: {error}") from None
    check_shard(shard_weights, degrees.ffn_tp)
    sequences = {lengths for request in requests for lengths in segment_lengths(request, checkpoint)}
    backend = getattr(arguments, "backend", None)
    reason = unavailable_engine(attention, device, dtype, degrees, sequences, limits["heads"], backend)
    if reason is not None:
        raise RequestError(f"--attention {attention}: {reason}")
    return Layout(degrees, attention, shard_weights)


def planning_hardware(arguments: argparse.Namespace, device_type: str, ranks_of_node: int) -> Hardware | None:
    """What `--layout auto` plans for, with so many ranks a node; `None` without that flag. Raises `RequestError`."""
    name = getattr(arguments, "hardware", None)
    if getattr(arguments, "layout", None) != "auto":
        if name is not None:
            raise RequestError(f"--hardware {name}: only allowed beside --layout auto")
        return None
    if name is None:
        return detect_hardware(device_type, ranks_of_node)
    return replace(find_hardware(name), gpus_per_node=ranks_of_node)
