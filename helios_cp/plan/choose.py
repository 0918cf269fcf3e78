"""Which layout of ranks a call runs in: that of its flags, a sound default, or with `--layout auto` the fastest.

A call can have several kinds of requests, and its layout must do for all of them. Each kind is predicted. The one that
needs most memory decides what fits, and the sum of their seconds a chunk decides what is fastest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import FEATURE_MULTIPLES, Execution
from helios_cp.config.layout import PLAIN, AskedLayout, Layout, complete_degrees, smallest_tokens
from helios_cp.config.refusals import Setting, check_setting
from helios_cp.config.request import Request
from helios_cp.config.sampling_plan import SamplingPlan
from helios_cp.plan.hardware import Hardware, detect_hardware, find_hardware
from helios_cp.plan.memory import FITTING_SHARE
from helios_cp.plan.predict import Candidate, Prediction, predict
from helios_cp.plan.workload import Workload
from parallel.mesh import Degrees
from parallel.tensor import shard_sizes

Given = Mapping[str, int | bool]
"""What must keep its value: degrees by the names of `Degrees`, `shard_weights`, `decoders`."""


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

    A degree that is given is kept. The others follow as `parallel.degrees.default_degrees` says, or with `hardware`
    they are what is modelled as fastest there of what fits in memory with this execution.
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
    workloads = sorted(kinds, key=lambda each: each.flops, reverse=True)
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


# All layouts, each predicted


@dataclass(frozen=True)
class Refused:
    """A candidate that cannot run, and why."""

    candidate: Candidate
    reason: str
    memory_bytes: float | None = None


@dataclass(frozen=True)
class Plan:
    """All sensible candidates for some ranks: those that fit, the fastest first, and the others."""

    fitting: tuple[Prediction, ...]
    refused: tuple[Refused, ...]


def make_plan(
    workloads: Sequence[Workload],
    hardware: Hardware,
    ranks: int,
    given: Given | None = None,
    execution: Execution = PLAIN,
) -> Plan:
    """Predict every sensible layout of `ranks` ranks that keeps what is given.

    The layouts do for all workloads, which are of one model; predictions are of the first one.
    """
    given = given or {}
    fitting: list[tuple[float, Prediction]] = []
    refused: list[Refused] = []
    limits = limits_of(workloads)
    usable = FITTING_SHARE * hardware.memory_bytes
    for decoders, core in _cores(ranks, given):
        misfit = _refusal(core, limits)
        tried = _layouts(core, decoders, workloads[0], limits["vae_rows"], given, execution)
        for layout in [Layout(core)] if misfit else tried:
            candidate = Candidate(layout, decoders)
            if reason := misfit or _refusal(layout.degrees, limits):
                refused.append(Refused(candidate, reason))
                continue
            predictions = [predict(each, candidate, hardware, execution) for each in workloads]
            fullest = max(predictions, key=lambda each: each.memory_bytes)
            if fullest.memory_bytes <= usable:
                fitting.append((sum(each.interval for each in predictions), predictions[0]))
                continue
            part = max(fullest.memory, key=lambda name: fullest.memory[name])
            reason = (
                f"memory: {fullest.memory_bytes / 1e9:.1f} GB of {usable / 1e9:.1f} GB, "
                f"{fullest.memory[part] / 1e9:.1f} GB of them {part}"
            )
            refused.append(Refused(candidate, reason, fullest.memory_bytes))
    fitting.sort(key=lambda each: (each[0], each[1].latency, each[1].sent_bytes, each[1].memory_bytes))
    return Plan(tuple(prediction for _, prediction in fitting), tuple(refused))


def limits_of(workloads: Sequence[Workload]) -> dict[str, Any]:
    """What `Degrees.check` is told."""
    return {
        "guidance": any(each.is_guided for each in workloads),
        "heads": workloads[0].config.num_attention_heads,
        "smallest_tokens": min(stage.noisy for each in workloads for stage in each.stages),
        "vae_rows": min(each.latent_size[0] for each in workloads),
    }


def _refusal(degrees: Degrees, limits: Mapping[str, Any]) -> str | None:
    try:
        degrees.check(degrees.world, **limits)
    except ValueError as error:
        return str(error).partition(";")[0]
    return None


def _cores(ranks: int, given: Given) -> Iterator[tuple[int, Degrees]]:
    """Numbers of decoders, each with every way to divide the ranks that denoise; possible or not.

    Where their number is not given, decoders are powers of two, up to half of all ranks.
    """
    kept = {name: value for name, value in given.items() if name in ("cfg", "ring", "ulysses")}
    powers = [2**power for power in range(ranks.bit_length()) if 2 * 2**power <= ranks]
    for decoders in [given["decoders"]] if "decoders" in given else [0, *powers]:
        left = ranks - decoders
        for cfg in (1, 2):
            for ulysses in _divisors(left // cfg) if left % cfg == 0 else ():
                core = Degrees(cfg, left // cfg // ulysses, ulysses)
                if kept.items() <= vars(core).items():
                    yield decoders, core


def _layouts(
    core: Degrees, decoders: int, workload: Workload, vae_rows: int, given: Given, execution: Execution
) -> Iterator[Layout]:
    """The layouts that divide the ranks like `core`.

    The VAE is split over as many ranks as it can be, or not at all; feed-forward layers over 2, 4, 8 or all ranks of a
    sequence group, or not at all. Weights are sharded or not, where the execution allows that.
    """
    vae_degrees = [1] if decoders else sorted({1, max(d for d in _divisors(core.sequence) if d <= vae_rows)})
    can_shard = execution.offload == "none" and execution.quantize is None and not execution.cuda_graphs
    shardings = [False, True] if core.world > 1 and can_shard else [False]
    for vae in [given["vae"]] if "vae" in given else vae_degrees:
        for ffn_tp in [given["ffn_tp"]] if "ffn_tp" in given else _ffn_degrees(core.sequence, workload, execution):
            for shard in [given["shard_weights"]] if "shard_weights" in given else shardings:
                if not (shard and ffn_tp > 1):
                    yield Layout(replace(core, ffn_tp=ffn_tp, vae=vae), shard_weights=shard)


def _ffn_degrees(sequence: int, workload: Workload, execution: Execution) -> list[int]:
    features, multiple = workload.config.ffn_dim, FEATURE_MULTIPLES.get(execution.quantize or "", 1)
    return [
        degree
        for degree in sorted({1, 2, 4, 8, sequence})
        if sequence % degree == 0
        and degree <= features
        and not any(size % multiple for size in shard_sizes(features, degree))
    ]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
