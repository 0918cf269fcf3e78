"""Ray: `benchmarks.live` on a live server of its own; and unit: its figures, from numbers that are known.

The pipeline alone that it compares the server with is measured in launchers/test_pipeline.py.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from benchmarks.live import __main__ as program
from benchmarks.live.clients import Arrival
from benchmarks.live.measures import WARM_UP, percentiles, seconds_a_chunk
from benchmarks.report.data import read_results
from benchmarks.report.sections import live_section
from helios_cp.config.request import Request
from helios_cp.generate.run_folder import RunFolder
from helios_cp.weights.load import resolve
from tests.launchers.conftest import UNHURRIED


def test_percentiles():
    found = percentiles([5.0, *range(1, 100), 100.0])
    assert found == {"p50": 50, "p95": 95, "most": 100, "count": 101}
    assert percentiles([2.0]) == {"p50": 2, "p95": 2, "most": 2, "count": 1}


def test_what_comes_before_the_steady_state_is_left_out():
    starting = [100.0 * number for number in range(WARM_UP)]
    assert seconds_a_chunk([*starting, 1000.0, 1000.5, 1001.5, 1003.0]) == 1.0


def test_a_chunk_is_late_from_when_it_was_ready():
    assert Arrival({"ready_at": 10.0}, b"", 10.25).seconds_after_ready == 0.25


class Alone:
    """Stands for the pipeline alone."""

    def __init__(self, model: str) -> None:
        self.checkpoint = resolve(model, weights=())

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *_: object) -> None: ...

    def wait_until_ready(self) -> None: ...

    def submit(self, request: Request, folder: RunFolder, output: list[Path], on_chunk) -> Alone:
        self._chunks, self._on_chunk = request.num_frames // 33, on_chunk
        return self

    def result(self) -> None:
        for chunk in range(self._chunks):
            self._on_chunk(chunk)


@pytest.mark.ray
def test_a_run(tmp_path, capsys, monkeypatch):
    for name, value in UNHURRIED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(program, "connected", lambda address, cpus: nullcontext())
    monkeypatch.setattr(program, "ChunkPipeline", Alone)
    flags = [
        "--changes",
        "2",
        "--chunks",
        "6",
        "--turns",
        "1",
        "--viewers",
        "1",
        "3",
        "--height",
        "64",
        "--width",
        "64",
    ]
    assert program.main([*flags, "--queued", "2", "--output", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "from a prompt to the screen: p50 " in told and "3 viewers: a chunk comes after " in told
    results = json.loads((tmp_path / "live.json").read_text())["results"]
    shown = results["prompt_to_picture"]
    assert shown["to_bytes"]["count"] == 2
    assert 0 < shown["to_receipt"]["p50"] < shown["to_bytes"]["p50"] < shown["to_frame"]["p50"]
    assert shown["to_bytes"]["p50"] <= shown["to_screen"]["p50"]
    assert [row["viewers"] for row in results["viewers"]] == [1, 3]
    assert all(row["late"]["count"] and not row["chunks_missing"] for row in results["viewers"])
    load = results["load"]
    assert (load["viewers"], load["queued"], load["chunks"]) == (3, 2, 6)
    assert load["most_behind"] >= 0 and load["memory_begin"] > 0 and load["memory_end"] > 0
    assert results["added"]["from_ready_to_received"]["p50"] > 0
    found, problems = read_results(tmp_path)
    section = live_section(found["live"])
    assert (
        not problems and "from a prompt to its receipt" in section and "3 viewers and 2 sessions that wait" in section
    )
