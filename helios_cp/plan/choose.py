"""Which layout of ranks a call runs in: that of its flags, a sound default, or with `--layout auto` the fastest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Execution
from helios_cp.config.layout import PLAIN, AskedLayout, Layout, complete_degrees, smallest_tokens
from helios_cp.config.refusals import Setting, check_setting
from helios_cp.config.request import Request
from helios_cp.config.sampling_plan import SamplingPlan
from helios_cp.plan.hardware import Hardware
from helios_cp.plan.machines import detect_hardware, find_hardware
from helios_cp.plan.memory import FITTING_SHARE
from helios_cp.plan.predict import Prediction
from helios_cp.plan.search import Given, limits_of, make_plan
from helios_cp.plan.workload import Workload
from parallel.mesh import Degrees


def choose_layout(
    asked: AskedLayout,
    checkpoint: Checkpoint,
    requests: Sequence[Request],
    world_size: int,
    dtype: torch.dtype,
    execution: Execution = PLAIN,
    hardware: Hardware | None = None,
) -> Layout:
    """The layout of the flags given, or a sound default for `world_size` ranks. Raises `RequestError`.

    By default guidance is split first where it is on, then the sequence by Ulysses; a degree that is given is kept and
    the others follow from it. With `hardware`, see `planning_hardware`, they are what `helios_cp.plan` models as
    fastest there of what fits in memory, which depends on the execution.
    """
    attention = asked.attention or "native"
    if hardware is not None:
        kept = asked.degrees if asked.shard_weights is None else {**asked.degrees, "shard_weights": asked.shard_weights}
        best = best_prediction(checkpoint, requests, dtype, world_size, hardware, kept, execution=execution)
        return replace(best.candidate.layout, attention=attention)
    degrees = complete_degrees(
        asked.degrees,
        world_size,
        guidance=any(SamplingPlan.of(request, checkpoint).is_guided for request in requests),
        heads=checkpoint.transformer.num_attention_heads,
        smallest_tokens=min(smallest_tokens(request, checkpoint) for request in requests),
        vae_rows=min(request.latent_size[0] for request in requests),
    )
    return Layout(degrees, attention, bool(asked.shard_weights))


def planning_hardware(asked: AskedLayout, device_type: str, ranks_of_node: int) -> Hardware | None:
    """What `--layout auto` plans for, with so many ranks a node; `None` without that flag. Raises `RequestError`."""
    if not asked.is_auto:
        if asked.hardware is not None:
            raise RequestError(f"--hardware {asked.hardware}: only allowed beside --layout auto")
        return None
    if asked.hardware is None:
        return detect_hardware(device_type, ranks_of_node)
    return replace(find_hardware(asked.hardware), gpus_per_node=ranks_of_node)


def best_prediction(
    checkpoint: Checkpoint,
    requests: Sequence[Request],
    dtype: torch.dtype,
    ranks: int,
    hardware: Hardware,
    given: Given | None = None,
    decoders: int = 0,
    execution: Execution = PLAIN,
) -> Prediction:
    """The layout of `ranks` ranks that is modelled fastest and fits in memory, with its figures.

    It does for every one of the resolved `requests`; the figures are those of the request that computes most.
    `decoders` ranks beside the others do nothing but decode. Raises `RequestError` where none fits.
    """
    given = given or {}
    asked = Layout(Degrees(ffn_tp=given.get("ffn_tp", 1)), shard_weights=given.get("shard_weights", False))
    check_setting(Setting(execution, asked))
    kinds = dict.fromkeys(Workload.of(checkpoint, request, dtype) for request in requests)
    workloads = sorted(kinds, key=_flops, reverse=True)
    plan = make_plan(workloads, hardware, ranks + decoders, {**given, "decoders": decoders}, execution)
    if plan.fitting:
        return plan.fitting[0]
    needs = [refused.memory_bytes for refused in plan.refused if refused.memory_bytes is not None]
    if not needs:
        why = plan.refused[-1].reason if plan.refused else "none goes with the flags given"
        try:
            degrees = {name: value for name, value in given.items() if name in Degrees.__dataclass_fields__}
            complete_degrees(degrees, ranks, **limits_of(workloads))
        except RequestError as error:
            why = error
        raise RequestError(f"--layout auto: no layout of {ranks} rank(s) is possible: {why}")
    advice = "" if execution.offload == "group" else " give --offload group,"
    raise RequestError(
        f"--layout auto: no layout of {ranks} rank(s) fits in the {FITTING_SHARE * hardware.memory_bytes / 1e9:.1f} GB "
        f"of {hardware.name} that each may use (the least needs {min(needs) / 1e9:.1f} GB a rank, as modelled); use "
        f"more ranks or a smaller size,{advice} or give the layout yourself"
    )


def _flops(workload: Workload) -> int:
    """Of a chunk, on one rank."""
    forwards = sum(stage.forwards * workload.forward_cost(stage).flops for stage in workload.stages)
    return workload.batch * (workload.branches * forwards + workload.decode_flops)
