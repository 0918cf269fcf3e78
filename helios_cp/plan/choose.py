"""Which layout of ranks a call runs in: that of its flags, a sound default, or with `--layout auto` the fastest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Execution
from helios_cp.config.layout import (
    DEGREES,
    PLAIN,
    AskedLayout,
    Layout,
    fill_degrees,
    flags_of,
    smallest_tokens,
)
from helios_cp.config.request import Request
from helios_cp.config.sampling_plan import SamplingPlan
from helios_cp.plan.hardware import Hardware
from helios_cp.plan.machines import detect_hardware, find_hardware
from helios_cp.plan.search import choose


def choose_layout(
    asked: AskedLayout,
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
    given = asked.degrees
    attention = asked.attention or "native"
    shard_weights = bool(asked.shard_weights)
    hardware = planning_hardware(asked, device.type, ranks_of_node or world_size)
    if hardware is not None:
        kept = given if asked.shard_weights is None else {**given, "shard_weights": asked.shard_weights}
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
    return Layout(degrees, attention, shard_weights)


def planning_hardware(asked: AskedLayout, device_type: str, ranks_of_node: int) -> Hardware | None:
    """What `--layout auto` plans for, with so many ranks a node; `None` without that flag. Raises `RequestError`."""
    if not asked.is_auto:
        if asked.hardware is not None:
            raise RequestError(f"--hardware {asked.hardware}: only allowed beside --layout auto")
        return None
    if asked.hardware is None:
        return detect_hardware(device_type, ranks_of_node)
    return replace(find_hardware(asked.hardware), gpus_per_node=ranks_of_node)
