"""Progress on stderr: a bar for chunks and steps on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from helios_cp.config.console import say
from helios_cp.pipeline.decoding import Chunk
from helios_cp.sampling.denoise import Step


class ProgressReporter:
    """Shows how far one video is; a context manager."""

    def __init__(self, name: str, chunks: int, finished: int = 0) -> None:
        self.name = name
        self.chunks = chunks
        text = TextColumn("{task.description}", markup=False)  # a file's name may look like markup
        columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bars = Progress(*columns, console=Console(file=sys.stderr), disable=not sys.stderr.isatty())
        self.chunk_bar = self.bars.add_task(f"{name}: chunks", total=chunks, completed=finished)
        self.step_bar = self.bars.add_task("steps", total=None)

    def __enter__(self) -> ProgressReporter:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def step(self, step: Step) -> None:
        stage = f"steps, stage {step.stage + 1} of {step.stages}"
        self.bars.update(self.step_bar, description=stage, completed=step.index, total=step.total)

    def chunk(self, chunk: Chunk) -> None:
        self.bars.update(self.chunk_bar, completed=chunk.index + 1)
        if self.bars.disable:
            stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in chunk.seconds.items())
            say(f"{self.name}: chunk {chunk.index + 1} of {self.chunks}: {stages}")
