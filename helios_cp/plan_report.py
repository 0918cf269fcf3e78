"""A plan as tables for a reader and as JSON for a program, with the counts that the times rest on."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from helios_cp.config import Request
from helios_cp.cost import forward_cost, repeated_flops, whole
from helios_cp.hardware import Hardware
from helios_cp.predict import Candidate, Prediction, StageCost, Workload, limit_fps
from helios_cp.weight_cost import parameters
from parallel.mesh import Degrees

if TYPE_CHECKING:
    from helios_cp.plan import Plan

WIDTH = 118


@dataclass(frozen=True)
class Subject:
    """What a plan is of."""

    model: str
    request: Request
    workload: Workload
    hardware: Hardware
    ranks: int
    nodes: int


def stage_counts(workload: Workload) -> list[dict[str, Any]]:
    """Of each stage, tokens and what one forward on one rank costs; `diffusers_flops` are those of its forward."""
    found = []
    for stage in workload.stages:
        itemsize = workload.dtype.itemsize
        alone = whole(workload.config, stage.lengths)
        cost = forward_cost(workload.config, alone, Degrees(), workload.text_tokens, itemsize)
        found.append(
            {
                "tokens": alone.tokens,
                "history_tokens": alone.history,
                "noisy_tokens": alone.noisy,
                "forwards_per_chunk": stage.forwards * workload.branches,
                "flops": cost.flops,
                "diffusers_flops": repeated_flops(workload.config, stage.lengths, workload.text_tokens),
                "elementwise_bytes": cost.elementwise_bytes,
                "matrix_bytes": cost.matrix_bytes(itemsize),
                "kernels": cost.kernels,
            }
        )
    return found


def limits(workload: Workload, hardware: Hardware) -> dict[str, float]:
    """FPS that no program exceeds on one rank, at the data sheet's rates."""
    stages = stage_counts(workload)
    rates = hardware.peak_flops, hardware.peak_vae_flops

    def limit(kind: str) -> float:
        flops = sum(stage["forwards_per_chunk"] * stage[kind] for stage in stages)
        return limit_fps(workload.frames, flops, workload.decode_flops, *rates)

    return {"fps_at_peak": limit("flops"), "fps_at_peak_with_diffusers_flops": limit("diffusers_flops")}


def to_json(plan: Plan, subject: Subject) -> dict[str, Any]:
    """Plain JSON values; FLOPs, bytes and calls are counts, seconds and FPS are modelled."""
    workload, request = subject.workload, subject.request
    return {
        "note": "seconds, FPS and memory are modelled, not measured",
        "model": subject.model,
        "height": request.height,
        "width": request.width,
        "num_frames": request.num_frames,
        "chunks": request.num_chunks,
        "ranks": subject.ranks,
        "nodes": subject.nodes,
        "dtype": str(workload.dtype).removeprefix("torch."),
        "hardware": subject.hardware.to_json(),
        "config": asdict(workload.config),
        "parameters": parameters(workload.config),
        "vae_decode_flops": workload.decode_flops,
        "stages": stage_counts(workload),
        "limits": limits(workload, subject.hardware),
        "plans": [_prediction(each, subject) for each in plan.fitting],
        "impossible": [
            {**_layout(each.candidate), "reason": each.reason, "memory_bytes": each.memory_bytes}
            for each in plan.refused
        ],
    }


def _layout(candidate: Candidate) -> dict[str, Any]:
    layout = candidate.layout
    return {**asdict(layout.degrees), "shard_weights": layout.shard_weights, "decoders": candidate.decoders}


def _prediction(prediction: Prediction, subject: Subject) -> dict[str, Any]:
    return {
        **_layout(prediction.candidate),
        "modelled_fps": prediction.fps,
        "modelled_latency_seconds": prediction.latency,
        "modelled_interval_seconds": prediction.interval,
        "modelled_video_seconds": video_seconds(prediction, subject),
        "modelled_seconds_per_chunk": dict(prediction.seconds),
        "modelled_decode_seconds": prediction.decode,
        "dominant": prediction.dominant,
        "memory_bytes": dict(prediction.memory),
        "sent_bytes_per_chunk": prediction.sent_bytes,
        "stages": [_stage(each, subject.workload.dtype.itemsize) for each in prediction.stages],
    }


def _stage(stage: StageCost, itemsize: int) -> dict[str, Any]:
    cost = stage.cost
    return {
        "flops": cost.flops,
        "elementwise_bytes": cost.elementwise_bytes,
        "matrix_bytes": cost.matrix_bytes(itemsize),
        "kernels": cost.kernels,
        "traffic": {axis: asdict(traffic) for axis, traffic in cost.traffic.items()},
        "modelled_seconds": dict(stage.seconds),
    }


def video_seconds(prediction: Prediction, subject: Subject) -> float:
    """From the first step to the last frame, text encoding apart; the first chunk may have twice the steps."""
    denoise = prediction.latency - prediction.decode
    first = denoise if subject.request.is_amplify_first_chunk else 0.0
    return first + prediction.latency + (subject.request.num_chunks - 1) * prediction.interval


def print_tables(plan: Plan, subject: Subject) -> None:
    console = Console(soft_wrap=False, highlight=False)
    if not console.is_terminal:
        console = Console(width=WIDTH, highlight=False)
    console.print(_counts(subject))
    if plan.fitting:
        console.print(_plans(plan, subject))
    if plan.refused:
        console.print(_impossible(plan))
    bounds = limits(subject.workload, subject.hardware)
    console.print(
        f"One rank at the data sheet's rates, which nothing exceeds: {bounds['fps_at_peak']:.1f} FPS "
        f"({bounds['fps_at_peak_with_diffusers_flops']:.1f} with the FLOPs of diffusers). All times are modelled."
    )


def _counts(subject: Subject) -> Table:
    workload, request = subject.workload, subject.request
    dtype = str(workload.dtype).removeprefix("torch.")
    table = Table(
        title=f"{subject.model}, {parameters(workload.config) / 1e9:.3f} B parameters, {dtype}, "
        f"{request.height}x{request.width}, {request.frames_per_chunk} frames a chunk; counted"
    )
    names = ("stage", "tokens", "noisy", "forwards", "TFLOP", "GB elementwise", "GB matrix", "kernels")
    for name in names:
        table.add_column(name, justify="right")
    for index, stage in enumerate(stage_counts(workload)):
        table.add_row(
            str(index + 1),
            str(stage["tokens"]),
            str(stage["noisy_tokens"]),
            str(stage["forwards_per_chunk"]),
            f"{stage['flops'] / 1e12:.3g}" if stage["flops"] < 1e12 else f"{stage['flops'] / 1e12:.1f}",
            f"{stage['elementwise_bytes'] / 1e9:.3g}",
            f"{stage['matrix_bytes'] / 1e9:.3g}",
            str(stage["kernels"]),
        )
    return table


def _plans(plan: Plan, subject: Subject) -> Table:
    table = Table(
        title=f"{subject.ranks} rank(s) on {subject.nodes} node(s) of {subject.hardware.name}; all times are modelled"
    )
    for name in ("cfg x uly x ring", "ffn-tp", "shard", "VAE"):
        table.add_column(name)
    for name in ("FPS", "latency s", "GB a rank", "GB sent", "most time"):
        table.add_column(name, justify="right")
    for each in plan.fitting:
        candidate = each.candidate
        total = sum(each.seconds.values())
        table.add_row(
            _axes(candidate),
            _degree(candidate.layout.degrees.ffn_tp),
            "yes" if candidate.layout.shard_weights else "-",
            candidate.vae,
            f"{each.fps:.4g}",
            f"{each.latency:.3g}",
            f"{each.memory_bytes / 1e9:.1f}",
            f"{each.sent_bytes / 1e9:.2f}",
            f"{each.dominant} {each.seconds[each.dominant] / total:.0%}",
        )
    return table


def _impossible(plan: Plan) -> Table:
    """One line a reason and kind of layout, with how many share it."""
    table = Table(title="Impossible")
    for name in ("cfg x uly x ring", "ffn-tp", "shard", "VAE", "why"):
        table.add_column(name)
    alike = defaultdict(list)
    for each in plan.refused:
        alike[each.reason].append(each.candidate)
    for reason, found in alike.items():
        first = found[0]
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        table.add_row(
            _axes(first) + more,
            _degree(first.layout.degrees.ffn_tp),
            "yes" if first.layout.shard_weights else "-",
            first.vae,
            reason,
        )
    return table


def _axes(candidate: Candidate) -> str:
    degrees = candidate.layout.degrees
    return f"{degrees.cfg} x {degrees.ulysses} x {degrees.ring}"


def _degree(degree: int) -> str:
    return "-" if degree == 1 else str(degree)
