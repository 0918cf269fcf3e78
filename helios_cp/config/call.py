"""A command line, typed, as everything below the command sees it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helios_cp.config.arguments import add_flags, check_bounds, flag, given
from helios_cp.config.checkpoint import DTYPES
from helios_cp.config.execution import Execution
from helios_cp.config.layout import AskedLayout
from helios_cp.config.request import Request


@dataclass(frozen=True)
class Call:
    """What a user typed; `None` is what was left out.

    `request` and `execution` hold the fields of `Request` and `Execution` that are given; a saved run may give others.
    """

    output: Path | None = flag(
        None, "MP4 to write; with --prompt-file a folder (default: out.mp4)", "FILE", group="output"
    )
    save_latents: Path | None = flag(None, "also write the latents, as safetensors", "FILE")
    report: Path | None = flag(None, "also write times, FPS and memory, as JSON", "FILE")
    checkpoint_dir: Path | None = flag(
        None,
        "save every chunk there, and go on with the run that is there already: the same call may be made again and "
        "again, as batch systems do",
        "DIR",
    )
    resume: Path | None = flag(
        None,
        "go on with the run that is kept there; refuses a folder without one; the other flags need not be "
        "repeated, and --num-frames may be another",
        "DIR",
    )
    model: str | None = flag(
        None,
        "tiny-base, tiny-mid or tiny-distilled, small models that the package carries (random-…: of random weights), a "
        "folder in the diffusers layout, or a hub id such as BestWishYsh/Helios-Distilled, also with @REVISION "
        "(default: tiny-distilled)",
        "MODEL",
        group="model",
    )
    dtype: str | None = flag(
        None,
        "of the transformer and text encoder (default: auto, float32 on a CPU and bfloat16 elsewhere)",
        choices=(*DTYPES, "auto"),
    )
    device: str = flag(
        "auto", "cpu, cuda, mps, xpu, npu, or one card such as cuda:1 (default: auto, the best present)", "NAME"
    )
    prompt_file: Path | None = flag(
        None,
        ".txt with a prompt a line, as a pipe may give too; or .csv, .tsv or .jsonl with id and prompt (and "
        "image_name, prompt_index or prompt_schedule for interactive videos, lora and lora_scale); writes NAME.mp4 "
        "each, skips those that exist, and shares the work with other calls on the same file and folder",
        "FILE",
        group="many videos",
    )
    image_folder: Path | None = flag(None, "where image_name is looked up (default: beside the .csv)", "DIR")
    interpolate_time: int | None = flag(
        None, "how long each prompt of an interactive .csv holds (default: 7)", "CHUNKS", least=1
    )
    prompt_schedule_file: Path | None = flag(
        None,
        "JSON: a list of objects with prompt, chunks and, if wanted, transition, the chunks within which the prompt "
        "takes over; or an object with that as prompt_schedule and other fields of the request, as a live session "
        "leaves it; flags that are given win",
        "FILE",
        group="prompts that change",
    )
    layout: AskedLayout = field(default_factory=AskedLayout)
    request: Mapping[str, Any] = field(default_factory=dict)
    execution: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        for each in (cls, Request, AskedLayout, Execution):
            add_flags(parser, each)

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Call:
        """Raises `RequestError` for values that no call may have."""
        call = cls(
            **given(cls, arguments),
            layout=AskedLayout(**given(AskedLayout, arguments)),
            request=given(Request, arguments),
            execution=given(Execution, arguments),
        )
        call.check()
        return call

    def check(self) -> None:
        """What can be refused of a call by itself. Raises `RequestError`."""
        check_bounds(self)
        check_bounds(self.layout)
