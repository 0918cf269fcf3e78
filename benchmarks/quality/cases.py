"""What is compared: the embedded models, and each choice that is not exact against the same model without it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from helios_cp.config.arguments import OneLineParser, add_flags, given
from helios_cp.config.execution import Execution
from helios_cp.config.request import Request
from helios_cp.pipeline.pipeline import Pipeline
from helios_cp.tiny.world import TRAINED_SIZE

HEIGHT, WIDTH = TRAINED_SIZE
BATCH = 6
"""Videos that are made at once."""
STEPS = {
    "tiny-base": {"num_inference_steps": 20, "guidance_scale": 2.0},
    "tiny-mid": {"pyramid_num_inference_steps_list": (8, 8, 8), "guidance_scale": 2.0},
    "tiny-distilled": {},
}
"""What each model is run with, where a case says nothing else."""


@dataclass(frozen=True)
class Case:
    """A model with flags of `helios_cp.generate` that change its pictures; none for the exact run."""

    model: str
    flags: str = ""

    @property
    def name(self) -> str:
        return f"{self.model} {self.flags}".strip()

    @property
    def is_plain(self) -> bool:
        """Whether it is the exact run that others of its model are held against."""
        return not self.flags

    @property
    def file_name(self) -> str:
        return "-".join(self.name.replace("--", "").split())


CASES = (
    *(Case(model) for model in STEPS),
    *(Case("tiny-distilled", f"--quantize {kind}") for kind in ("int8", "int4", "fp8")),
    *(Case("tiny-distilled", f"--vae-dtype {kind}") for kind in ("bfloat16", "float16")),
    Case("tiny-distilled", "--dtype bfloat16"),
    Case("tiny-distilled", "--pyramid-steps 1 1 1"),
    Case("tiny-distilled", "--match-seams"),
    *(Case("tiny-mid", f"--block-cache {share}") for share in ("0.08", "0.5")),
)
LONG = (*(Case(model) for model in STEPS), Case("tiny-distilled", "--match-seams"))
"""Of which drift is measured."""


def cases_for(device: torch.device) -> list[Case]:
    """Those of `CASES` that a device runs within minutes: convolutions in float16 take a CPU very long."""
    return [case for case in CASES if device.type != "cpu" or "float16" not in case.flags.split()]


def parse(case: Case) -> tuple[Request, Execution, torch.dtype]:
    """What a case's flags say: a request without prompt, how it is run, and the dtype of the transformer."""
    parser = OneLineParser(prog="benchmarks.quality", add_help=False)
    add_flags(parser, Execution)
    add_flags(parser, Request)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args(shlex.split(case.flags))
    request = Request(**{"height": HEIGHT, "width": WIDTH, **STEPS[case.model], **given(Request, arguments)})
    return request, Execution(**given(Execution, arguments)), getattr(torch, arguments.dtype)


def make_videos(case: Case, prompts: Sequence[str], chunks: int, device: torch.device) -> list[np.ndarray]:
    """A video `[T, H, W, 3]` in uint8 of each prompt; the seed is its place. Raises `RequestError` where the flags do
    not go with the device."""
    request, execution, dtype = parse(case)
    pipeline = Pipeline.from_pretrained(case.model, dtype=dtype, device=device, execution=execution)
    videos: list[np.ndarray] = []
    for first, texts in _batches(prompts):
        seeds = tuple(range(first, first + len(texts)))
        batch = dataclasses.replace(request, prompt=texts, seed=seeds, num_frames=chunks * request.frames_per_chunk)
        videos += list(torch.cat([chunk.frames for chunk in pipeline.stream(batch)], 1).numpy())
    return videos


def _batches(prompts: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    for first in range(0, len(prompts), BATCH):
        yield first, tuple(prompts[first : first + BATCH])
