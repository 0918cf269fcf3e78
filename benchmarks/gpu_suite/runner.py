"""Phases one after the other, each in a process of its own with a time budget, each writing its results as it goes.

A phase that raises, crashes or hangs costs itself alone, and what a killed run has written stays: a file is replaced
whole, never half.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
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

from benchmarks.measuring.machine import describe
from helios_cp.files.whole_files import write_json

LEAST_SECONDS = 2.0
"""A phase with less time than this is not begun."""


@dataclass(frozen=True)
class Phase:
    """`run(scope, record)` in a process of its own, unless one of the packages that it `needs` is missing.

    `seconds` are kept for it; it may take besides what earlier phases left of theirs.
    """

    name: str
    seconds: float
    run: Callable[[Any, Record], None]
    needs: tuple[str, ...] = ()


class Record:
    """The result file of one phase: `results` hold its `status` (running, finished, failed, cut, skipped) and figures.

    Written whole by every `update`. Names are those of `measuring.machine.write_result`. The phase begins now and is
    cut at `deadline`, a time of `time.monotonic`.
    """

    def __init__(self, folder: Path, name: str, deadline: float = math.inf) -> None:
        self.path = folder / f"{name}.json"
        self.begun, self.deadline = time.monotonic(), deadline
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

    def latest_start(self, share: float) -> float:
        """When so large a share of the phase's time has gone by."""
        return self.begun + share * (self.deadline - self.begun)

    def update(self, **values: Any) -> None:
        self.values |= values
        if self._about is None:
            self._about = describe()
        write_json(self.path, {**self._about, "results": self.values})


def run_phases(
    phases: Sequence[Phase], scope: Any, folder: Path, deadline: float = math.inf, device: str = "cpu"
) -> dict[str, str]:
    """The status of each phase, in order; `device` is what they use.

    All have ended a few seconds after `deadline`, a time of `time.monotonic`. Without one no phase is ever cut.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for phase in phases:  # a file from another run would pass for one of this
        Record(folder, phase.name).path.unlink(missing_ok=True)
    context = multiprocessing.get_context(start_method(device))
    statuses = {}
    for index, phase in enumerate(phases):
        left = deadline - time.monotonic()
        if missing := _missing(phase):
            _skip(phase, folder, f"{', '.join(missing)} is not installed")
        elif left < LEAST_SECONDS:
            _skip(phase, folder, f"{max(left, 0):.0f} s were left")
        else:
            to_come = [each for each in phases[index:] if not _missing(each)]
            _run_one(context, phase, scope, folder, time.monotonic() + budget(to_come, left))
        statuses[phase.name] = Record.read(folder, phase.name).values["status"]
    return statuses


def budget(phases: Sequence[Phase], left: float) -> float:
    """Seconds of the first of the phases to come: its own, and what all of them together do not need."""
    spare = left - sum(phase.seconds for phase in phases)
    return min(left, phases[0].seconds + max(spare, 0.0))


def _missing(phase: Phase) -> list[str]:
    """Packages that it needs and that are not there."""
    return [name for name in phase.needs if importlib.util.find_spec(name) is None]


def _skip(phase: Phase, folder: Path, reason: str) -> None:
    Record(folder, phase.name).update(status="skipped", error=reason)
    print(f"{phase.name}: skipped: {reason}", flush=True)


def _run_one(context: Any, phase: Phase, scope: Any, folder: Path, deadline: float) -> None:
    start = time.monotonic()
    seconds = None if deadline == math.inf else deadline - start
    print(phase.name if seconds is None else f"{phase.name}: up to {seconds:.0f} s", flush=True)
    arguments = (phase, scope, folder, deadline, sys.orig_argv)
    process = context.Process(target=_child, args=arguments, name=phase.name)
    process.start()
    try:
        process.join(seconds)
    finally:
        is_cut = process.is_alive()
        if is_cut:
            _kill_group(process.pid)
        process.join()
    record = Record.read(folder, phase.name)
    if record.values.get("status", "running") == "running":
        died = f"the process ended with exit code {process.exitcode}"
        status = ("cut", f"after {seconds:.0f} s, its budget") if is_cut else ("failed", died)
        record.update(status=status[0], error=status[1])
    record.update(seconds=time.monotonic() - start)


def _child(phase: Phase, scope: Any, folder: Path, deadline: float, command: list[str]) -> None:
    sys.orig_argv = command  # results tell the command that was typed, and not how this process was started
    os.setsid()  # so that it can be killed with all that it starts
    threading.Thread(target=_die_with_parent, daemon=True).start()
    record = Record(folder, phase.name, deadline)
    seconds = None if deadline == math.inf else deadline - record.begun
    record.update(status="running", budget_seconds=seconds, process=os.getpid())
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
    for kill in (os.killpg, os.kill):  # the second where it has no group of its own yet
        with contextlib.suppress(ProcessLookupError):  # it may have ended just now
            kill(pid, signal.SIGKILL)


def start_method(device: str) -> str:
    """A server that has imported everything is forked for each phase, unless an import has touched CUDA.

    A forked process cannot use the card then; a spawned one always can, after importing everything again.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.gpu_suite.phases"])
    probe = context.Process(target=_use_device, args=(device,))
    probe.start()
    probe.join()
    return "forkserver" if probe.exitcode == 0 else "spawn"


def _use_device(device: str) -> None:
    import torch

    torch.zeros(1, device=device)
