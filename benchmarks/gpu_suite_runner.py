"""Phases one after the other, each in a process of its own with a time budget, each writing its results as it goes.

A phase that raises, crashes or hangs costs itself alone, and what a killed run has written stays: a file is replaced
whole, never half.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from helios_cp.files import write_json

LEAST_SECONDS = 2.0
"""A phase with less time than this is not begun."""


@dataclass(frozen=True)
class Phase:
    """`run(scope, record)` in a process of its own; `seconds` is its budget, and with `None` all that is left."""

    name: str
    seconds: float | None
    run: Callable[[Any, Record], None]


class Record:
    """The result file of one phase: `results` hold its `status` (running, finished, failed, cut, skipped) and figures.

    Written whole by every `update`. Names are those of `benchmarks.machine.write_result`.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.json"
        self.values: dict[str, Any] = {}
        self._about: dict[str, Any] | None = None

    @classmethod
    def read(cls, folder: Path, name: str) -> Record:
        """What another process has written, to go on with; empty where there is nothing."""
        record = cls(folder, name)
        if record.path.exists():
            about = json.loads(record.path.read_text(encoding="utf-8"))
            record.values = about.pop("results")
            record._about = about
        return record

    def update(self, **values: Any) -> None:
        self.values |= values
        if self._about is None:
            self._about = describe()
        write_json(self.path, {**self._about, "results": self.values})


def run_phases(
    phases: Sequence[Phase], scope: Any, folder: Path, seconds: float, device: str = "cpu"
) -> dict[str, str]:
    """The status of each phase, in order; `device` is what they use. Together they take `seconds`, and a few to end."""
    folder.mkdir(parents=True, exist_ok=True)
    for phase in phases:  # a file from another run would pass for one of this
        Record(folder, phase.name).path.unlink(missing_ok=True)
    context = multiprocessing.get_context(start_method(device))
    deadline = time.monotonic() + seconds
    statuses = {}
    for phase in phases:
        left = deadline - time.monotonic()
        budget = left if phase.seconds is None else min(phase.seconds, left)
        if budget < LEAST_SECONDS:
            Record(folder, phase.name).update(status="skipped", error=f"{max(left, 0):.0f} s were left")
        else:
            print(f"{phase.name}: up to {budget:.0f} s", flush=True)
            _run_one(context, phase, scope, folder, budget)
        statuses[phase.name] = Record.read(folder, phase.name).values["status"]
    return statuses


def _run_one(context: Any, phase: Phase, scope: Any, folder: Path, budget: float) -> None:
    start = time.monotonic()
    process = context.Process(target=_child, args=(phase, scope, folder, budget), name=phase.name)
    process.start()
    try:
        process.join(budget)
    finally:
        if process.is_alive():
            _kill_group(process.pid)
        process.join()
    record = Record.read(folder, phase.name)
    seconds = time.monotonic() - start
    if record.values.get("status", "running") == "running":
        died = f"the process ended with exit code {process.exitcode}"
        status = ("cut", f"after {budget:.0f} s, its budget") if seconds >= budget else ("failed", died)
        record.update(status=status[0], error=status[1])
    record.update(seconds=seconds)


def _child(phase: Phase, scope: Any, folder: Path, budget: float) -> None:
    os.setsid()  # so that it can be killed with all that it starts
    threading.Thread(target=_die_with_parent, daemon=True).start()
    record = Record(folder, phase.name)
    record.update(status="running", budget_seconds=budget)
    try:
        phase.run(scope, record)
    except Exception as error:
        traceback.print_exc()
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        record.update(status="failed", error=reason[:1000], traceback=traceback.format_exc()[-4000:])
        sys.exit(1)
    record.update(status="finished")


def _die_with_parent() -> None:
    """A killed suite must not leave a phase behind that goes on to fill the card."""
    multiprocessing.parent_process().join()
    _kill_group(os.getpid())


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has ended, or has no group of its own yet
        os.kill(pid, signal.SIGKILL)


def start_method(device: str) -> str:
    """A server that has imported everything is forked for each phase, unless an import has touched CUDA.

    A forked process cannot use the card then; a spawned one always can, after importing everything again.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.gpu_suite_phases"])
    probe = context.Process(target=_use_device, args=(device,))
    probe.start()
    probe.join()
    return "forkserver" if probe.exitcode == 0 else "spawn"


def _use_device(device: str) -> None:
    import torch

    torch.zeros(1, device=device)
