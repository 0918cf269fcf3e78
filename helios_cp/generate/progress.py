"""Progress on stderr: a bar for chunks and steps on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from helios_cp.pipeline.chunk import Chunk
from helios_cp.sampling.denoise import Step


class ProgressReporter:
    """Shows how far one video is; a context manager."""

    def __init__(self, name: str, chunks: int, finished: int = 0, stream: TextIO | None = None) -> None:
        self.name = name
        self.chunks = chunks
        self.stream = stream or sys.stderr
        self.bars = None
        if self.stream.isatty():
            text = TextColumn("{task.description}", markup=False)  # a file's name may look like markup
            columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.bars = Progress(*columns, console=Console(file=self.stream))
            self.chunk_bar = self.bars.add_task(f"{name}: chunks", total=chunks, completed=finished)
            self.step_bar = self.bars.add_task("steps", total=None)

    def __enter__(self) -> ProgressReporter:
        if self.bars:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars:
            self.bars.stop()

    def step(self, step: Step) -> None:
        if self.bars:
            stage = f"steps, stage {step.stage + 1} of {step.stages}"
            self.bars.update(self.step_bar, description=stage, completed=step.index, total=step.total)

    def chunk(self, chunk: Chunk) -> None:
        if self.bars:
            self.bars.update(self.chunk_bar, completed=chunk.index + 1)
            return
        stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in chunk.seconds.items())
        print(f"{self.name}: chunk {chunk.index + 1} of {self.chunks}: {stages}", file=self.stream, flush=True)
