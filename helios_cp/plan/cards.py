"""Command line: how much memory a card has → which flags hold a model on it → how fast it then is, as Markdown.

python -m helios_cp.plan.cards
python -m helios_cp.plan.cards --model 14b-base --height 768 --width 1280

Weights are counted; working memory and FPS are modelled (`plan.card_memory`, `plan.predict`), nothing here is
measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from helios_cp.config.arguments import OneLineParser, add_flags
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Execution
from helios_cp.config.request import Request
from helios_cp.plan.flags import PlanCall

PROGRAM = "helios_cp.plan.cards"
GIBIBYTE = 2**30  # what sellers of cards call a gigabyte
PCIE = 0.8 * 32e9  # bytes/s to the card: assumed, of PCIe 4.0 x16
CARDS = {8: None, 12: None, 16: None, 24: "rtx4090", 32: None, 40: None, 48: None, 80: "h100", 141: "h200"}
"""Gigabytes of a card, and the hardware profile that stands for it, where there is one."""
STEPS = ((1, 1, 1), (2, 2, 2))


@dataclass(frozen=True)
class Choice:
    """An execution, and whether with `--offload model` the transformer stays on the card while a chunk is decoded."""

    execution: Execution
    stays: bool = False

    @property
    def flags(self) -> str:
        given = [("--quantize", self.execution.quantize), ("--offload", self.execution.offload)]
        return " ".join(f"{flag} {value}" for flag, value in given if value not in (None, "none"))


EXACT = (
    Choice(Execution()),
    Choice(Execution(offload="model"), stays=True),
    Choice(Execution(offload="model")),
    Choice(Execution(offload="group")),
)
QUANTISED = tuple(
    Choice(Execution(offload="model", quantize=quantize), stays)
    for quantize, stays in (("int8", True), ("int4", True), ("int8", False), ("int4", False))
)


@dataclass(frozen=True)
class Row:
    """A card and what to do with it. `bytes` as the driver counts them, `host` those of the host's memory. `fps` is by
    pyramid steps, `None` where no profile tells; with `is_bound` it is no more than what the transfer of the weights
    allows."""

    gigabytes: int
    choice: Choice
    bytes: float
    host: float
    fps: tuple[float | None, ...]
    is_bound: bool
    hardware: str | None


def rows(workloads: Sequence, cards: dict[int, str | None] = CARDS) -> Iterator[Row]:
    """For each card what is first in `EXACT` to fit, and in `QUANTISED`, where exact results ask for offloading.

    `workloads` are of one request with different steps.
    """
    for gigabytes, profile in cards.items():
        exact = _first(EXACT, workloads[0], gigabytes)
        if exact is None:
            continue
        yield _row(gigabytes, exact, workloads, profile)
        quantised = _first(QUANTISED, workloads[0], gigabytes)
        if quantised is not None and exact not in EXACT[:2]:
            yield _row(gigabytes, quantised, workloads, profile)


def _memory(choice: Choice, workload):
    from helios_cp.plan.card_memory import card_memory

    return card_memory(workload, choice.execution, together=("decode",) if choice.stays else ())


def _first(choices: Sequence[Choice], workload, gigabytes: int) -> Choice | None:
    from helios_cp.plan.card_memory import FITTING_SHARE

    most = FITTING_SHARE * GIBIBYTE * gigabytes
    fitting = (choice for choice in choices if _memory(choice, workload).bytes <= most)
    return next(fitting, None)


def _row(gigabytes: int, choice: Choice, workloads: Sequence, profile: str | None) -> Row:
    from helios_cp.plan.card_memory import host_bytes

    needed, host = _memory(choice, workloads[0]).bytes, host_bytes(workloads[0], choice.execution)
    is_bound = profile is None and choice.execution.offload == "group"
    if is_bound:
        fps = tuple(each.frames / _transfer_seconds(each, choice.execution) for each in workloads)
    elif profile is None or choice.execution.quantize is not None:  # quantised products are not modelled
        fps = (None,) * len(workloads)
    else:
        fps = tuple(each.frames / chunk_seconds(each, choice, profile) for each in workloads)
    return Row(gigabytes, choice, needed, host, fps, is_bound, None if is_bound else profile)


def _transfer_seconds(workload, execution: Execution) -> float:
    from helios_cp.plan.card_memory import transformer_bytes

    streamed = transformer_bytes(workload.config, workload.dtype, execution.quantize).streamed
    return sum(stage.forwards for stage in workload.stages) * workload.branches * streamed / PCIE


def chunk_seconds(workload, choice: Choice, profile: str) -> float:
    """Modelled seconds of a steady chunk: weights on their way to the card beside the computing of a forward with
    `--offload group`, and before it with `--offload model`."""
    from helios_cp.config.layout import Layout
    from helios_cp.plan.card_memory import transformer_bytes
    from helios_cp.plan.machines import PROFILES
    from helios_cp.plan.predict import Candidate, predict
    from helios_cp.plan.vae_cost import FP32, decoder_parameters

    prediction = predict(workload, Candidate(Layout()), PROFILES[profile])
    offload = choice.execution.offload
    if offload == "none" or choice.stays:
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
    """A table of the rows, one column of FPS for each of the steps; cards of which all the same is said share one."""
    names = [
        "card",
        "flags",
        "needs, modelled",
        "host memory, modelled",
        *(f"FPS at {_steps(each)}, modelled" for each in steps),
        "modelled for",
    ]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    cards: dict[Row, list[int]] = {}
    for row in found:
        cards.setdefault(replace(row, gigabytes=0), []).append(row.gigabytes)
    for row, gigabytes in cards.items():
        fps = [_fps(value, row.is_bound) for value in row.fps]
        source = "PCIe 4.0 x16 alone" if row.is_bound else row.hardware if row.fps[0] is not None else ""
        flags = f"`{row.choice.flags}`" if row.choice.flags else "none"
        cells = [f"{', '.join(map(str, gigabytes))} GB", flags, f"{row.bytes / 1e9:.1f} GB", f"{row.host / 1e9:.0f} GB"]
        cells += [*fps, source or ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _steps(steps: Sequence[int]) -> str:
    return f"[{','.join(map(str, steps))}]"


def _fps(value: float | None, is_bound: bool) -> str:
    if value is None:
        return ""
    return f"at most {value:.1f}" if is_bound else f"{value:.1f}"


def build_parser() -> OneLineParser:
    parser = OneLineParser(
        prog=PROGRAM,
        usage="python -m helios_cp.plan.cards [flag ...]",
        description="A table of card memory, the flags to use and modelled FPS, as Markdown.",
    )
    add_flags(parser, PlanCall, ("model",))
    add_flags(parser, Request, ("height", "width"))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0, 2 for bad input."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        print(table(PlanCall.of(arguments)))
    except RequestError as error:
        parser.error(str(error))
    return 0


def table(call: PlanCall) -> str:
    """The Markdown for a model and a size. Raises `RequestError`."""
    import torch

    from helios_cp.plan.configs import part_configs
    from helios_cp.plan.run import find_checkpoint
    from helios_cp.plan.workload import Workload

    checkpoint = find_checkpoint(call.model)
    variants = [{"pyramid_num_inference_steps_list": each} for each in STEPS] if checkpoint.is_distilled else [{}]
    requests = [Request(prompt=("any",), **call.request, **fields).resolve(checkpoint) for fields in variants]
    configs = part_configs(checkpoint)
    workloads = [Workload.of(checkpoint, request, torch.bfloat16, *configs) for request in requests]
    steps = [
        request.pyramid_num_inference_steps_list if checkpoint.is_pyramid else (request.num_inference_steps,)
        for request in requests
    ]
    return markdown(list(rows(workloads)), steps)


if __name__ == "__main__":
    sys.exit(main())
