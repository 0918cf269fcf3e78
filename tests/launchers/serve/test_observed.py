"""Ray: what is seen of a running server from outside: figures for Prometheus, and log lines without secrets."""

from __future__ import annotations

import httpx
import pytest

from tests.launchers.serve.client import Client
from tests.launchers.serve.conftest import KEY
from tests.launchers.serve.test_metrics import read

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPTS = ("a walrus that is in no log", "an okapi that is in no log")


@pytest.fixture(scope="module")
def before(running_server):
    return figures(running_server)


@pytest.fixture(scope="module")
def session(running_server, before):
    """Of four chunks, changed once, and watched in every way; `video.start` of its controller."""
    url = running_server.url
    with Client(f"{url}/v1/realtime/video") as client:  # the key in the message, as browsers send it
        client.send("session.start", prompt=PROMPTS[0], height=64, width=64, num_frames=132, api_key=KEY)
        start = client.until("video.start")
        client.until("session.state", state="running")  # before, it takes no change
        client.send("session.interaction", interaction={"event_id": "e", "event": {"prompt": PROMPTS[1]}})
        client.until("session.interaction.queued")
        address = f"{url}/v1/sessions/{start['session_id']}"
        with Client(f"{address}/watch?token={start['view_token']}") as viewer:
            viewer.until("video.start")
            seen = figures(running_server)
        with Client(f"{address}/watch") as viewer:
            viewer.send("watch", token=start["view_token"])
            viewer.until("video.start")
        client.until("session.done")
        assert "e" in [event for metadata, _ in client.chunks for event in metadata["started"]]
    for path in ("/hls/live.m3u8", "/hls/00000.m4s", "/video.mp4", "/schedule.json"):
        assert httpx.get(f"{address}{path}", params={"token": start["view_token"]}).status_code == 200
        assert httpx.get(f"{address}{path}", params={"token": "wrong-token"}).status_code == 401
    return start, seen


def figures(server) -> dict[tuple[str, ...], float]:
    return read(server.ask("/metrics", KEY)[1])


def test_figures_of_a_session(running_server, before, session):
    _, seen = session
    after = figures(running_server)

    def more(*name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more("helios_sessions", "done") == 1
    for stage in ("denoise", "decode", "write"):
        assert more("helios_chunk_seconds_count", stage) == 4
        assert more("helios_chunk_seconds_sum", stage) > 0
    assert more("helios_prompt_to_picture_seconds_count") == 1
    assert after["helios_generation_fps",] > 0
    assert after["helios_ready",] == 1
    assert seen["helios_viewers",] == 2
    assert seen["helios_sessions", "running"] == 1
    assert after["helios_viewers",] == 0
    assert {name[1] for name in after if name[0] == "helios_worker_restarts_total"} >= {"text", "group-0", "writer"}


def test_the_log_has_no_token_no_key_and_no_prompt(running_server, session):
    start, _ = session
    text = running_server.log.read_text()
    for secret in (KEY, start["control_token"], start["view_token"], "wrong-token", *PROMPTS):
        assert secret not in text
    of_session = [line for line in running_server.events() if line.get("session") == start["session_id"]]
    assert [line["event"] for line in of_session] == ["session.created", "session.ended"]
    assert (of_session[1]["why"], of_session[1]["chunks"]) == ("finished", 4)
