"""Command line: how much memory a card has → which flags hold a model on it → how fast it then is, as Markdown.

python -m helios_cp.plan.cards
python -m helios_cp.plan.cards --model 14b-base --height 768 --width 1280

Weights are counted. Working memory and FPS are modelled (`plan.memory`, `plan.predict`), and nothing is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from helios_cp.config.arguments import OneLineParser, add_flags
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Execution
from helios_cp.config.layout import Layout
from helios_cp.config.request import Request
from helios_cp.plan.flags import PlanCall
from helios_cp.plan.hardware import PROFILES
from helios_cp.plan.memory import FITTING_SHARE, card_memory, decoder_parameters, host_bytes, transformer_bytes
from helios_cp.plan.predict import Candidate, predict
from helios_cp.plan.vae_cost import FP32
from helios_cp.plan.workload import Workload, find_checkpoint

PROGRAM = "helios_cp.plan.cards"
GIBI = 2**30  # what sellers of cards call a gigabyte
PCIE = 0.8 * 32e9  # bytes/s to the card: assumed, of PCIe 4.0 x16
CARDS = {8: None, 12: None, 16: None, 24: "rtx4090", 32: None, 40: None, 48: None, 80: "h100", 141: "h200"}
"""Gigabytes of a card, and the hardware profile that stands for it, where there is one."""
STEPS = ((1, 1, 1), (2, 2, 2))


@dataclass(frozen=True)
class Choice:
    """An execution, and whether with `--offload model` the transformer stays on the card while a chunk is decoded."""

    execution: Execution
    transformer_stays: bool = False

    @property
    def flags(self) -> str:
        given = [("--quantize", self.execution.quantize), ("--offload", self.execution.offload)]
        return " ".join(f"{flag} {value}" for flag, value in given if value not in (None, "none"))


EXACT = (
    Choice(Execution()),
    Choice(Execution(offload="model"), transformer_stays=True),
    Choice(Execution(offload="model")),
    Choice(Execution(offload="group")),
)
QUANTISED = tuple(
    Choice(Execution(offload="model", quantize=quantize), stays)
    for quantize, stays in (("int8", True), ("int4", True), ("int8", False), ("int4", False))
)


@dataclass(frozen=True)
class Row:
    """A card and what to do with it.

    `bytes` are of the card as its driver counts them, `host` of the host's memory. `fps` has one value for each
    workload, `None` where no profile tells. With `is_bound` these are upper bounds: what the transfer of the weights
    allows.
    """

    gigabytes: int
    choice: Choice
    bytes: float
    host: float
    fps: tuple[float | None, ...]
    is_bound: bool
    hardware: str | None


def rows(workloads: Sequence[Workload]) -> Iterator[Row]:
    """For each card the first exact choice that fits; if that needs offloading, also the first quantised one.

    `workloads` are of one request with different steps.
    """
    for gigabytes, profile in CARDS.items():
        usable = FITTING_SHARE * GIBI * gigabytes
        exact, quantised = (
            next((choice for choice in choices if _needed(choice, workloads[0]) <= usable), None)
            for choices in (EXACT, QUANTISED)
        )
        if exact is not None:
            yield _row(gigabytes, exact, workloads, profile)
            if quantised is not None and exact not in EXACT[:2]:
                yield _row(gigabytes, quantised, workloads, profile)


def _needed(choice: Choice, workload: Workload) -> float:
    return card_memory(workload, choice.execution, transformer_stays=choice.transformer_stays).bytes


def _row(gigabytes: int, choice: Choice, workloads: Sequence[Workload], profile: str | None) -> Row:
    is_bound = profile is None and choice.execution.offload == "group"
    if is_bound:  # every forward brings the blocks to the card
        streamed = transformer_bytes(workloads[0].config, workloads[0].dtype).streamed
        fps = tuple(each.frames / (each.forwards * streamed / PCIE) for each in workloads)
    elif profile is None or choice.execution.quantize is not None:  # quantised products are not modelled
        fps = (None,) * len(workloads)
    else:
        fps = tuple(each.frames / chunk_seconds(each, choice, profile) for each in workloads)
    needed, host = _needed(choice, workloads[0]), host_bytes(workloads[0], choice.execution)
    return Row(gigabytes, choice, needed, host, fps, is_bound, None if is_bound else profile)


def chunk_seconds(workload: Workload, choice: Choice, profile: str) -> float:
    """Modelled seconds of a steady chunk.

    Weights come to the card beside the computing of a forward with `--offload group`, and before it with `model`.
    """
    prediction = predict(workload, Candidate(Layout()), PROFILES[profile])
    offload = choice.execution.offload
    if offload == "none" or choice.transformer_stays:
        return prediction.interval
    weights = transformer_bytes(workload.config, workload.dtype)
    decoder = FP32 * decoder_parameters(workload.vae)
    if offload == "model":
        return prediction.interval + (weights.whole + decoder) / PCIE
    seconds = prediction.decode + (weights.rest + decoder) / PCIE
    for stage, each in zip(workload.stages, prediction.stages, strict=True):
        computing = sum(each.seconds.values())
        seconds += stage.forwards * workload.branches * max(computing, weights.streamed / PCIE)
    return seconds


def markdown(found: Sequence[Row], steps: Sequence[Sequence[int]]) -> str:
    """A table of the rows, one column of FPS for each of the steps. Cards whose rows are equal share one."""
    fps = [f"FPS at [{','.join(map(str, each))}], modelled" for each in steps]
    names = ["card", "flags", "needs, modelled", "host memory, modelled", *fps, "modelled for"]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    cards: dict[Row, list[int]] = {}
    for row in found:
        cards.setdefault(replace(row, gigabytes=0), []).append(row.gigabytes)
    for row, gigabytes in cards.items():
        source = "PCIe 4.0 x16 alone" if row.is_bound else row.hardware if row.fps[0] is not None else ""
        flags = f"`{row.choice.flags}`" if row.choice.flags else "none"
        cells = [f"{', '.join(map(str, gigabytes))} GB", flags, f"{row.bytes / 1e9:.1f} GB", f"{row.host / 1e9:.0f} GB"]
        cells += [_fps(value, row.is_bound) for value in row.fps]
        lines.append("| " + " | ".join([*cells, source or ""]) + " |")
    return "\n".join(lines)


def _fps(value: float | None, is_bound: bool) -> str:
    if value is None:
        return ""
    return f"at most {value:.1f}" if is_bound else f"{value:.1f}"


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0, 2 for bad input."""
    parser = OneLineParser(
        prog=PROGRAM,
        usage="python -m helios_cp.plan.cards [flag ...]",
        description="A table of card memory, the flags to use and modelled FPS, as Markdown.",
    )
    add_flags(parser, PlanCall, ("model",))
    add_flags(parser, Request, ("height", "width"))
    arguments = parser.parse_args(argv)
    try:
        print(table(PlanCall.of(arguments)))
    except RequestError as error:
        parser.error(str(error))
    return 0


def table(call: PlanCall) -> str:
    """The Markdown for a model and a size. Raises `RequestError`."""
    checkpoint = find_checkpoint(call.model)
    variants = [{"pyramid_num_inference_steps_list": each} for each in STEPS] if checkpoint.is_distilled else [{}]
    requests = [Request(prompt=("any",), **call.request, **fields).resolve(checkpoint) for fields in variants]
    workloads = [Workload.of(checkpoint, request, torch.bfloat16) for request in requests]
    steps = [
        request.pyramid_num_inference_steps_list if checkpoint.is_pyramid else (request.num_inference_steps,)
        for request in requests
    ]
    return markdown(list(rows(workloads)), steps)


if __name__ == "__main__":
    sys.exit(main())
