"""Which layouts of some ranks are possible, and how fast each is modelled to be.

A call can have several kinds of requests, and its layout must do for all of them. Each kind is predicted. The one that
needs most memory decides what fits, and the sum of their seconds a chunk decides what is fastest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from helios_cp.config.execution import FEATURE_MULTIPLES, Execution
from helios_cp.config.layout import PLAIN, Layout
from helios_cp.plan.hardware import Hardware
from helios_cp.plan.memory import FITTING_SHARE
from helios_cp.plan.predict import Candidate, Prediction, predict
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
        reason = _refusal(core, limits)
        if reason is not None:
            refused.append(Refused(Candidate(Layout(core), decoders), reason))
            continue
        for layout in _layouts(core, decoders, workloads[0], limits["vae_rows"], given, execution):
            candidate = Candidate(layout, decoders)
            reason = _refusal(layout.degrees, limits)
            if reason is not None:
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
