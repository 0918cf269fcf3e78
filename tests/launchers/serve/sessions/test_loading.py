"""Unit: a session of an earlier server, whose workers are not loaded again yet."""

from __future__ import annotations

import pytest

from helios_cp.config.request import Request
from launchers.generate import checks
from launchers.serve.access import digest
from launchers.serve.run import with_example
from launchers.serve.server import Server
from launchers.serve.sessions import session as sessions
from launchers.serve.sessions.recording import Recording, Take
from tests.launchers.serve.conftest import WS, call_of, client_of


@pytest.fixture
def server(tmp_path, presets):
    call = call_of(tmp_path, model=str(presets["random-distilled"]), device="cpu")
    checked = checks.check_session(with_example(call), None, 1, "cpu")
    request = Request(prompt=("a fox",), height=64, width=64).resolve(checked.checkpoint)
    kept = Recording(
        "1", call.data / "sessions" / "1", request, digest("control"), digest("view"), 1.0, state="running"
    )
    kept.takes = [Take(0, 42, "a fox")]
    kept.write(kept.to_json())
    server = Server(call, checked)
    server.restore()
    return server


def test_its_controller_comes_back_and_is_answered(server, monkeypatch):
    """What has to wait is refused before the controller would take its unanswered ping for a lost connection."""
    monkeypatch.setattr(sessions, "BEGIN_SECONDS", 0.05)
    with client_of(server) as client, client.websocket_connect(f"{WS}/v1/realtime/video") as socket:
        socket.send_json({"type": "session.attach", "session_id": "1", "token": "control"})
        assert socket.receive_json()["type"] == "video.start"
        assert socket.receive_bytes()
        assert socket.receive_json()["state"] == "running"
        for kind in ("session.pause", "session.step", "session.reset"):
            socket.send_json({"type": kind})
            error = socket.receive_json()
            assert (error["type"], error["code"]) == ("error", "busy") and "does not run yet" in error["message"]
        socket.send_json({"type": "session.ping"})
        assert socket.receive_json()["type"] == "session.pong"
        socket.send_json({"type": "session.stop"})
        assert socket.receive_json()["state"] == "done"
        assert socket.receive_json()["reason"] == "stopped"
    assert Recording.load(server.call.data / "sessions" / "1").why == "stopped"
