"""Unit: figures as Prometheus reads them, read by its own parser."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from launchers.serve.access import Access
from launchers.serve.metrics import MOST_WAITING, Metrics, Now
from launchers.serve.server import Server
from tests.launchers.serve.conftest import call_of, client_of


def read(text: bytes | str) -> dict[tuple[str, ...], float]:
    """By name and values of labels."""
    text = text if isinstance(text, str) else text.decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_is_counted():
    metrics = Metrics()
    metrics.made({"denoise": 0.6, "decode": 0.02}, fps=40.0)
    metrics.made({"denoise": 3.0})
    found = read(metrics.text())
    assert found["helios_chunk_seconds_count", "denoise"] == 2
    assert found["helios_chunk_seconds_sum", "denoise"] == pytest.approx(3.6)
    assert found["helios_chunk_seconds_bucket", "1.0", "denoise"] == 1
    assert found["helios_chunk_seconds_count", "decode"] == 1
    assert found["helios_generation_fps",] == 40.0


def test_from_prompt_to_picture():
    metrics = Metrics()
    metrics.received("a", "1", 10.0)
    metrics.received("b", "1", 11.0)
    metrics.shown("a", ["1", "unknown"], 13.0)
    metrics.shown("a", ["1"], 20.0)  # counts once
    found = read(metrics.text())
    assert found["helios_prompt_to_picture_seconds_count",] == 1
    assert found["helios_prompt_to_picture_seconds_sum",] == 3.0


def test_changes_that_are_never_shown_take_no_memory_without_end():
    metrics = Metrics()
    for number in range(MOST_WAITING + 10):
        metrics.received("a", str(number), 0.0)
    assert len(metrics._waiting) == MOST_WAITING


def test_what_is_looked_at():
    now = Now({"running": 2, "queued": 0}, {"completed": 5}, 7, 1, 1.4, 3, {"group-0": 2}, True)
    found = read(Metrics(lambda: now).text())
    assert found["helios_sessions", "running"] == 2
    assert found["helios_sessions", "queued"] == 0
    assert found["helios_videos", "completed"] == 5
    assert (found["helios_viewers",], found["helios_queue_length",], found["helios_lag_chunks",]) == (7, 1, 3)
    assert found["helios_lead_seconds",] == 1.4
    assert found["helios_worker_restarts_total", "group-0"] == 2
    assert found["helios_ready",] == 1


def test_two_servers_have_figures_of_their_own():
    first, second = Metrics(), Metrics()
    first.made({"denoise": 1.0})
    assert ("helios_chunk_seconds_count", "denoise") not in read(second.text())


def test_metrics_by_http(tmp_path, key_file):
    client = client_of(Server(call_of(tmp_path), None, Access.of(key_file)))
    assert client.get("/metrics").status_code == 401
    answer = client.get("/metrics", headers={"Authorization": "Bearer first-key-0123456789"})
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = read(answer.text)
    assert {("helios_sessions", state) for state in ("queued", "running", "paused", "done")} <= set(found)
    assert {("helios_videos", state) for state in ("queued", "in_progress", "completed", "failed")} <= set(found)
    assert found["helios_ready",] == 0


def test_health_and_ready_need_no_key(tmp_path, key_file):
    client = client_of(Server(call_of(tmp_path), None, Access.of(key_file)))
    assert client.get("/health").json() == {"status": "ok"}
    loading = client.get("/ready")
    assert (loading.status_code, loading.json()) == (503, {"status": "loading weights"})
    assert int(loading.headers["retry-after"]) > 0
