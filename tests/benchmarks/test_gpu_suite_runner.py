"""Unit and processes of its own: the phases of the GPU suite, which must neither stop nor outlive each other."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.gpu_suite.runner import Phase, Record, budget, run_phases
from benchmarks.measuring.machine import describe


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())["results"]


def quick(scope, record: Record) -> None:
    record.update(figure=scope)


def failing(scope, record: Record) -> None:
    record.update(figure=1)
    raise ValueError("what a phase\nmay raise")


def crashing(scope, record: Record) -> None:
    os._exit(7)


def hanging(scope, record: Record) -> None:
    record.update(figure=2, child=subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid)
    time.sleep(600)


def is_running(pid: int) -> bool:
    """Whether the process exists and has not ended; one that nobody has waited for yet has ended too."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the second if it goes while it is read
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


LONG = 1200.0
"""Seconds after which something hangs, on a machine however busy."""


def wait_until(condition) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_phases_neither_stop_nor_outlive_each_other(tmp_path, monkeypatch):
    """The one that hangs has an hour, which is said to be over as soon as it has written something."""
    join = BaseProcess.join

    def join_or_cut(process: BaseProcess, timeout: float | None = None) -> None:
        if process.name == "hanging" and timeout is not None:
            wait_until(lambda: "child" in Record.read(tmp_path, "hanging").values)
        else:
            join(process, timeout)

    monkeypatch.setattr(BaseProcess, "join", join_or_cut)
    phases = [Phase("failing", 0, failing), Phase("crashing", 0, crashing), Phase("hanging", 0, hanging)]
    (tmp_path / "hanging.json").write_text("of an earlier run")
    statuses = run_phases(phases[:2], 5, tmp_path)
    statuses |= run_phases([phases[2], Phase("quick", 300, quick)], 5, tmp_path, time.monotonic() + 3900)
    assert statuses == {"failing": "failed", "crashing": "failed", "hanging": "cut", "quick": "finished"}
    failed = read(tmp_path, "failing")
    assert failed["error"] == "ValueError: what a phase may raise" and failed["figure"] == 1
    assert json.loads((tmp_path / "failing.json").read_text())["command"] == describe()["command"]
    assert "exit code 7" in read(tmp_path, "crashing")["error"]
    cut = read(tmp_path, "hanging")
    assert 0 < cut["budget_seconds"] <= 3600, "what is kept for the last is not taken"
    assert cut["figure"] == 2 and re.fullmatch(r"after \d+ s, its budget", cut["error"])
    wait_until(lambda: not is_running(cut["child"]))
    assert read(tmp_path, "quick")["figure"] == 5


def test_without_time_a_phase_is_skipped_and_says_so(tmp_path):
    assert run_phases([Phase("quick", 60, quick)], 5, tmp_path, time.monotonic() + 1) == {"quick": "skipped"}
    assert "s were left" in read(tmp_path, "quick")["error"]


def test_without_a_package_that_it_needs_a_phase_is_not_begun(tmp_path, capsys):
    phases = [Phase("failing", 60, failing, needs=("torch", "no_such_wheel")), Phase("quick", 60, quick, ("torch",))]
    assert run_phases(phases, 5, tmp_path) == {"failing": "skipped", "quick": "finished"}
    assert read(tmp_path, "failing") == {"status": "skipped", "error": "no_such_wheel is not installed"}
    assert "failing: skipped: no_such_wheel is not installed" in capsys.readouterr().out


def test_a_phase_that_will_be_skipped_keeps_no_time(tmp_path):
    phases = [Phase("quick", 10, quick), Phase("failing", 300, failing, needs=("no_such_wheel",))]
    assert run_phases(phases, 5, tmp_path, time.monotonic() + 250) == {"quick": "finished", "failing": "skipped"}
    assert read(tmp_path, "quick")["budget_seconds"] > 10


def test_a_phase_may_take_what_those_before_it_left():
    phases = [Phase("one", 30, quick), Phase("two", 20, quick), Phase("three", 10, quick)]
    assert budget(phases, 60) == 30
    assert budget(phases, 75) == 45, "15 s more than all of them need"
    assert budget(phases[1:], 50) == 40 and budget(phases[2:], 50) == 50
    assert budget(phases, 40) == 30 and budget(phases, 20) == 20, "too little is left for all"


def test_a_share_of_a_phase_is_counted_from_its_start(tmp_path):
    record = Record(tmp_path, "any")
    record.deadline = record.begun + 100
    assert record.latest_start(0.25) == record.begun + 25
    assert Record(tmp_path, "any").latest_start(0.25) == math.inf
