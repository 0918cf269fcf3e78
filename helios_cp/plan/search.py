"""Which layouts of some ranks are possible, how fast each is modelled to be, and which is best.

A layout must do for every request of a call, so that several kinds of requests are predicted side by side: memory is
that of the one that needs most, and what is compared is the seconds of a chunk of each kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import FEATURE_MULTIPLES, Execution
from helios_cp.config.layout import PLAIN, Layout, refusal, smallest_tokens
from helios_cp.config.refusals import Setting, check_setting
from helios_cp.config.request import Request
from helios_cp.plan.card_memory import FITTING_SHARE
from helios_cp.plan.configs import part_configs
from helios_cp.plan.forward_cost import forward_cost
from helios_cp.plan.hardware import Hardware
from helios_cp.plan.machines import detect_hardware
from helios_cp.plan.predict import Candidate, Prediction, predict
from helios_cp.plan.rank_shares import whole
from helios_cp.plan.workload import Workload
from parallel.mesh import Degrees
from parallel.tensor import shard_sizes

Given = Mapping[str, int | bool]
"""What must keep its value: degrees by the names of `Degrees`, `shard_weights`, `decoders`."""


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
    workload: Workload,
    hardware: Hardware,
    ranks: int,
    smallest: int,
    given: Given | None = None,
    execution: Execution = PLAIN,
    others: Sequence[Workload] = (),
) -> Plan:
    """Predict every sensible layout of `ranks` ranks. `smallest` is the noisy tokens of the smallest stage.

    Predictions are of `workload`; the layouts do for `others` too.
    """
    works = (workload, *others)
    fitting: list[tuple[float, Prediction]] = []
    refused: list[Refused] = []
    limits = limits_of(works, smallest)
    usable = FITTING_SHARE * hardware.memory_bytes
    is_folded_given = given is not None and ("vae" in given or "ffn_tp" in given)
    told: set[Degrees] = set()
    accepted: set[Degrees] = set()
    for candidate in candidates(workload, ranks, limits["vae_rows"], given or {}, execution):
        degrees = candidate.layout.degrees
        core = Degrees(degrees.cfg, degrees.ring, degrees.ulysses)
        if core in told:
            continue
        reason = None if core in accepted else _refusal(core, limits)
        accepted.add(core)
        if reason is not None:
            told.add(core)
            refused.append(Refused(Candidate(Layout(core), candidate.decoders), reason))
            continue
        reason = _refusal(degrees, limits) if is_folded_given else None  # those tried otherwise fit
        if reason is not None:
            refused.append(Refused(candidate, reason))
            continue
        predictions = [predict(each, candidate, hardware, execution) for each in works]
        fullest = max(predictions, key=lambda each: each.memory_bytes)
        if fullest.memory_bytes > usable:
            part = max(fullest.memory, key=lambda name: fullest.memory[name])
            reason = (
                f"memory: {fullest.memory_bytes / 1e9:.1f} GB of {usable / 1e9:.1f} GB, "
                f"{fullest.memory[part] / 1e9:.1f} GB of them {part}"
            )
            refused.append(Refused(candidate, reason, fullest.memory_bytes))
        else:
            fitting.append((sum(each.interval for each in predictions), predictions[0]))
    fitting.sort(key=lambda each: (each[0], each[1].latency, each[1].sent_bytes, each[1].memory_bytes))
    return Plan(tuple(prediction for _, prediction in fitting), tuple(refused))


def limits_of(workloads: Sequence[Workload], smallest: int) -> dict[str, Any]:
    """What `Degrees.check` is told."""
    return {
        "guidance": any(each.is_guided for each in workloads),
        "heads": workloads[0].config.num_attention_heads,
        "smallest_tokens": smallest,
        "vae_rows": min(each.latent_size[0] for each in workloads),
    }


def _refusal(degrees: Degrees, limits: Mapping[str, Any]) -> str | None:
    try:
        degrees.check(degrees.world, **limits)
    except ValueError as error:
        return str(error).partition(";")[0]
    return None


def candidates(
    workload: Workload, ranks: int, vae_rows: int, given: Given, execution: Execution = PLAIN
) -> Iterator[Candidate]:
    """Every way to divide the ranks that keeps what is given; possible or not.

    Decoders beside the ranks that denoise are powers of two, up to half of all, where their number is not given. The
    VAE is split over as many ranks as it can be, or not at all. Feed-forward layers are split over 2, 4, 8, or all
    ranks of a sequence group, or not. Weights are not sharded beside an execution that cannot have them so.
    """
    powers = [2**power for power in range(ranks.bit_length()) if 2 * 2**power <= ranks]
    can_shard = execution.offload == "none" and execution.quantize is None and not execution.cuda_graphs
    for count in [given["decoders"]] if "decoders" in given else [0, *powers]:
        for degrees in _divided(ranks - count):
            if any(getattr(degrees, name) != given.get(name, getattr(degrees, name)) for name in AXES):
                continue
            shardings = [given["shard_weights"]] if "shard_weights" in given else [False]
            if "shard_weights" not in given and degrees.world > 1 and can_shard:
                shardings = [False, True]
            for vae in _vae_degrees(degrees.sequence, vae_rows, count, given):
                for ffn_tp in _ffn_degrees(degrees.sequence, workload, execution, given):
                    for shard in shardings:
                        if not (shard and ffn_tp > 1):
                            yield Candidate(
                                Layout(replace(degrees, ffn_tp=ffn_tp, vae=vae), shard_weights=shard), count
                            )


AXES = ("cfg", "ring", "ulysses")


def _vae_degrees(sequence: int, rows: int, decoders: int, given: Given) -> list[int]:
    if "vae" in given:
        return [given["vae"]]
    return [1] if decoders else sorted({1, max(d for d in _divisors(sequence) if d <= rows)})


def _ffn_degrees(sequence: int, workload: Workload, execution: Execution, given: Given) -> list[int]:
    if "ffn_tp" in given:
        return [given["ffn_tp"]]
    features, multiple = workload.config.ffn_dim, FEATURE_MULTIPLES.get(execution.quantize or "", 1)
    return [
        degree
        for degree in sorted({1, 2, 4, 8, sequence})
        if sequence % degree == 0
        and degree <= features
        and not any(size % multiple for size in shard_sizes(features, degree))
    ]


def _divided(ranks: int) -> Iterator[Degrees]:
    for cfg in (1, 2):
        if ranks % cfg == 0:
            for ulysses in _divisors(ranks // cfg):
                yield Degrees(cfg, ranks // cfg // ulysses, ulysses)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def choose(
    checkpoint: Checkpoint,
    requests: Sequence[Request],
    dtype: Any,
    ranks: int,
    device_type: str,
    given: Given | None = None,
    execution: Execution = PLAIN,
    hardware: Hardware | None = None,
) -> Layout:
    """The layout of `ranks` ranks in one process group that is modelled fastest and fits in memory.

    It does for every one of the resolved `requests`. `hardware` is this machine's unless given. Raises `RequestError`
    where none fits.
    """
    hardware = hardware or detect_hardware(device_type, ranks)
    found = best_prediction(checkpoint, requests, dtype, ranks, hardware, given, execution=execution)
    return found.candidate.layout


def best_prediction(
    checkpoint: Checkpoint,
    requests: Sequence[Request],
    dtype: Any,
    ranks: int,
    hardware: Hardware,
    given: Given | None = None,
    decoders: int = 0,
    execution: Execution = PLAIN,
) -> Prediction:
    """As `choose`, with the figures, of the request that computes most.

    `decoders` ranks beside the others do nothing but decode.
    """
    given = dict(given or {})
    asked = Layout(Degrees(ffn_tp=given.get("ffn_tp", 1)), shard_weights=given.get("shard_weights", False))
    check_setting(Setting(execution, asked))
    configs = part_configs(checkpoint)
    kinds = dict.fromkeys(Workload.of(checkpoint, request, dtype, *configs) for request in requests)
    workload, *others = sorted(kinds, key=flops, reverse=True)
    smallest = min(smallest_tokens(each, checkpoint) for each in requests)
    asked = {**given, "decoders": decoders}
    plan = make_plan(workload, hardware, ranks + decoders, smallest, asked, execution, others)
    if plan.fitting:
        return plan.fitting[0]
    needs = [refused.memory_bytes for refused in plan.refused if refused.memory_bytes is not None]
    if not needs:
        degrees = {name: value for name, value in given.items() if name in Degrees.__dataclass_fields__}
        why = refusal(degrees, ranks, **limits_of([workload, *others], smallest))
        why = why or (plan.refused[-1].reason if plan.refused else "none goes with the flags given")
        raise RequestError(f"--layout auto: no layout of {ranks} rank(s) is possible: {why}")
    advice = "" if execution.offload == "group" else " give --offload group,"
    raise RequestError(
        f"--layout auto: no layout of {ranks} rank(s) fits in the {FITTING_SHARE * hardware.memory_bytes / 1e9:.1f} GB "
        f"of {hardware.name} that each may use (the least needs {min(needs) / 1e9:.1f} GB a rank, as modelled); use "
        f"more ranks or a smaller size,{advice} or give the layout yourself"
    )


def flops(workload: Workload) -> int:
    """Of a chunk, on one rank."""
    itemsize = workload.dtype.itemsize
    forwards = sum(
        stage.forwards
        * forward_cost(
            workload.config, whole(workload.config, stage.lengths), Degrees(), workload.text_tokens, itemsize
        ).flops
        for stage in workload.stages
    )
    return workload.batch * (workload.branches * forwards + workload.decode_flops)
