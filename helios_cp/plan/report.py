"""From the flags of `helios_cp.plan` to its tables for a reader, or to JSON with the counts that the times rest on."""

from __future__ import annotations

import json
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from helios_cp.config.request import Request
from helios_cp.plan.choose import Plan, make_plan
from helios_cp.plan.flags import PlanCall
from helios_cp.plan.forward_cost import ForwardCost, repeated_flops
from helios_cp.plan.hardware import Hardware, find_hardware
from helios_cp.plan.memory import transformer_parameters
from helios_cp.plan.predict import Candidate, Prediction, limit_fps
from helios_cp.plan.rank_shares import whole
from helios_cp.plan.workload import Workload, find_checkpoint

WIDTH = 118
LAYOUT = ("cfg x ring x uly", "ffn-tp", "shard", "VAE")


@dataclass(frozen=True)
class Subject:
    """What a plan is of."""

    call: PlanCall
    request: Request
    workload: Workload
    hardware: Hardware


def run(call: PlanCall) -> int:
    """Print the plan. Returns 0, or 1 where no layout fits. Raises `RequestError`."""
    hardware = replace(find_hardware(call.hardware), gpus_per_node=call.gpus)
    checkpoint = find_checkpoint(call.model)
    request = Request(prompt=("any",), **call.request).resolve(checkpoint)
    workload = Workload.of(checkpoint, request, getattr(torch, call.dtype))
    plan = make_plan([workload], hardware, call.ranks)
    subject = Subject(call, request, workload, hardware)
    if call.json:
        print(json.dumps(to_json(plan, subject), indent=2))
    else:
        print_tables(plan, subject)
    return 0 if plan.fitting else 1


def stage_counts(workload: Workload) -> list[dict[str, Any]]:
    """Of each stage, tokens and what one forward on one rank costs; `diffusers_flops` are those of its forward."""
    found = []
    for stage in workload.stages:
        alone = whole(workload.config, stage.lengths)
        found.append(
            {
                "tokens": alone.tokens,
                "history_tokens": alone.history,
                "noisy_tokens": alone.noisy,
                "forwards_per_chunk": stage.forwards * workload.branches,
                "diffusers_flops": repeated_flops(workload.config, stage.lengths, workload.text_tokens),
                **_cost_counts(workload.forward_cost(stage, alone), workload.dtype.itemsize),
            }
        )
    return found


def _cost_counts(cost: ForwardCost, itemsize: int) -> dict[str, int]:
    return {
        "flops": cost.flops,
        "elementwise_bytes": cost.elementwise_bytes,
        "matrix_bytes": cost.matrix_bytes(itemsize),
        "kernels": cost.kernels,
    }


def limits(workload: Workload, hardware: Hardware) -> dict[str, float]:
    """FPS that no program exceeds on one rank, at the data sheet's rates."""
    stages = stage_counts(workload)
    rates = hardware.peak_flops, hardware.peak_vae_flops

    def limit(kind: str) -> float:
        flops = sum(stage["forwards_per_chunk"] * stage[kind] for stage in stages)
        return limit_fps(workload.frames, flops, workload.decode_flops, *rates)

    return {"fps_at_peak": limit("flops"), "fps_at_peak_with_diffusers_transformer": limit("diffusers_flops")}


def to_json(plan: Plan, subject: Subject) -> dict[str, Any]:
    """Plain JSON values; FLOPs, bytes and calls are counts, seconds and FPS are modelled."""
    workload, request, call = subject.workload, subject.request, subject.call
    return {
        "note": "seconds, FPS and memory are modelled, not measured, of eager PyTorch: nothing compiled or quantised",
        "model": call.model,
        "height": request.height,
        "width": request.width,
        "num_frames": request.num_frames,
        "chunks": request.num_chunks,
        "ranks": call.ranks,
        "nodes": call.nodes,
        "dtype": call.dtype,
        "hardware": subject.hardware.to_json(),
        "config": asdict(workload.config),
        "parameters": transformer_parameters(workload.config),
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
        "command": command(prediction.candidate, subject.call),
        "modelled_fps": prediction.fps,
        "modelled_latency_seconds": prediction.latency,
        "modelled_interval_seconds": prediction.interval,
        "modelled_video_seconds": video_seconds(prediction, subject),
        "modelled_seconds_per_chunk": dict(prediction.seconds),
        "modelled_decode_seconds": prediction.decode,
        "dominant": prediction.dominant,
        "memory_bytes": dict(prediction.memory),
        "sent_bytes_per_chunk": prediction.sent_bytes,
        "stages": [
            {
                **_cost_counts(stage.cost, subject.workload.dtype.itemsize),
                "traffic": {axis: asdict(traffic) for axis, traffic in stage.cost.traffic.items()},
                "modelled_seconds": dict(stage.seconds),
            }
            for stage in prediction.stages
        ],
    }


def video_seconds(prediction: Prediction, subject: Subject) -> float:
    """From the first step to the last frame, text encoding apart; the first chunk may have twice the steps."""
    denoise = prediction.latency - prediction.decode
    first = denoise if subject.request.is_amplify_first_chunk else 0.0
    return first + prediction.latency + (subject.request.num_chunks - 1) * prediction.interval


def command(candidate: Candidate, call: PlanCall) -> str:
    """What to type for this layout; `--model` and `--prompt` are left to the user."""
    layout = candidate.layout
    degrees = layout.degrees
    flags = {"cfg-parallel": degrees.cfg, "ring": degrees.ring, "ulysses": degrees.ulysses, "ffn-tp": degrees.ffn_tp}
    words = [f"--{name} {degree}" for name, degree in flags.items() if degree > 1]
    words += ["--shard-weights"] * layout.shard_weights
    if candidate.decoders:
        words = [f"--ranks {degrees.world}", *words, f"--decoders {candidate.decoders}"]
        return " ".join(["python -m launchers.generate --address auto", *words])
    if degrees.world > 1:
        words.append(f"--vae-parallel {degrees.vae}")
    if call.ranks == 1:
        return " ".join(["python -m helios_cp.generate", *words])
    nodes = f"--nnodes {call.nodes} " if call.nodes > 1 else ""
    return " ".join([f"torchrun {nodes}--nproc_per_node {call.gpus} -m helios_cp.generate", *words])


def print_tables(plan: Plan, subject: Subject) -> None:
    """The `--top` fastest layouts, what to type for the best, and as many reasons why others are impossible."""
    top = subject.call.top
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)

    def say(line: str) -> None:
        console.print("\n".join(textwrap.wrap(line, console.width, break_on_hyphens=False)), soft_wrap=True)

    console.print(_count_table(subject))
    if plan.fitting:
        console.print(_plan_table(plan, subject))
        if len(plan.fitting) > top:
            say(f"{len(plan.fitting) - top} slower ones are left out; --top {len(plan.fitting)} prints all.")
        for line in _advice(plan, subject):
            say(line)
    if plan.refused:
        console.print(_refusal_table(plan, top))
    ours, theirs = limits(subject.workload, subject.hardware).values()
    say(
        f"One rank at the data sheet's rates, which nothing exceeds: {ours:.3g} FPS ({theirs:.3g} with diffusers' "
        "transformer). All times are modelled, of eager PyTorch: --compile, --quantize and --offload are not in them."
    )


def _advice(plan: Plan, subject: Subject) -> Iterator[str]:
    """What to type for the fastest layout, for the fastest without decoders, and how long the video takes."""
    best = plan.fitting[0]
    alone = next((each for each in plan.fitting if not each.candidate.decoders), None)
    yield f"Best: {command(best.candidate, subject.call)}"
    if best.candidate.decoders:
        yield "  Rows with decoders need launchers.generate, which runs on Ray."
        if alone is not None:
            yield f"Best with torchrun, {alone.fps:.4g} FPS: {command(alone.candidate, subject.call)}"
    request = subject.request
    yield (
        f"{request.num_chunks} chunks of {request.frames_per_chunk} frames take {video_seconds(best, subject):.3g} s, "
        "text encoding apart."
    )


def _count_table(subject: Subject) -> Table:
    workload, request, call = subject.workload, subject.request, subject.call
    table = _table(
        f"{call.model}, {transformer_parameters(workload.config) / 1e9:.3f} B parameters, {call.dtype}, "
        f"{request.height}x{request.width}, {request.frames_per_chunk} frames a chunk; counted",
        right=("stage", "tokens", "noisy", "forwards", "TFLOP", "GB elementwise", "GB matrix", "kernels"),
    )
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


def _plan_table(plan: Plan, subject: Subject) -> Table:
    call = subject.call
    table = _table(
        f"{call.ranks} rank(s) on {call.nodes} node(s) of {subject.hardware.name}, eager; all times are modelled",
        left=LAYOUT,
        right=("FPS", "latency s", "GB a rank", "GB sent a chunk", "most time"),
    )
    for each in plan.fitting[: call.top]:
        total = sum(each.seconds.values())
        table.add_row(
            *_cells(each.candidate),
            f"{each.fps:.4g}",
            f"{each.latency:.3g}",
            f"{each.memory_bytes / 1e9:.1f}",
            f"{each.sent_bytes / 1e9:.2f}",
            f"{each.dominant} {each.seconds[each.dominant] / total:.0%}",
        )
    return table


def _refusal_table(plan: Plan, top: int) -> Table:
    """One line a reason and kind of layout, with how many share it; `top` of them."""
    alike = defaultdict(list)
    for each in plan.refused:
        alike[each.reason].append(each.candidate)
    more = f", the first {top} of {len(alike)} reasons" if len(alike) > top else ""
    table = _table(f"Impossible{more}", left=(*LAYOUT, "why"))
    for reason, found in list(alike.items())[:top]:
        axes, *rest = _cells(found[0])
        table.add_row(axes + (f" and {len(found) - 1} more" if len(found) > 1 else ""), *rest, reason)
    return table


def _table(title: str, left: Sequence[str] = (), right: Sequence[str] = ()) -> Table:
    """Without rows; its columns by the side that their cells keep to."""
    table = Table(title=title)
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _cells(candidate: Candidate) -> tuple[str, str, str, str]:
    degrees = candidate.layout.degrees
    return (
        f"{degrees.cfg} x {degrees.ring} x {degrees.ulysses}",
        "-" if degrees.ffn_tp == 1 else str(degrees.ffn_tp),
        "yes" if candidate.layout.shard_weights else "-",
        candidate.vae,
    )
