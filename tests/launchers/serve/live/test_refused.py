"""Ray: whatever is wrong is answered, and ends neither the server nor anybody's session."""

from __future__ import annotations

import itertools
import json
from contextlib import suppress

import pytest
from hypothesis import given, settings
from websockets.exceptions import ConnectionClosed

from tests.launchers.serve.client import FRAMES
from tests.launchers.serve.conftest import KEY, MESSAGE_BYTES
from tests.launchers.serve.realtime.malformed import MALFORMED
from tests.launchers.serve.realtime.test_messages import LIKE_MESSAGES

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NOT_STARTED = ["session.pause", "session.resume", "session.step", "session.reset", "session.stop"]


def test_nothing_malformed_ends_a_connection_or_anybodys_session(running_server, controller):
    controller.start()
    controller.until_chunk(0)
    with running_server.connect() as client:
        for text in MALFORMED:
            if "\ud83d" in text:  # no client can send it
                continue
            client.socket.send(text)
            assert client.until("error")["code"] == "invalid_message"
        for kind in NOT_STARTED:
            assert client.ask(kind)["code"] == "not_started"
        client.socket.send(b"\0binary")
        assert client.until("error")["code"] == "invalid_message"
        client.start(num_frames=FRAMES)
        client.until("session.done")
    assert_goes_on(controller)


def assert_goes_on(controller) -> None:
    receipt = controller.change("after", "a dog")
    chunk = receipt["chunk"]
    controller.play_until(chunk)
    assert "after" in next(metadata for metadata, _ in controller.chunks if metadata["chunk"] == chunk)["started"]


REFUSED = [
    ({"height": 63}, "invalid_request"),
    ({"height": 64000, "width": 64000}, "invalid_request"),
    ({"num_frames": 10**9}, "invalid_request"),
    ({"format": "webm"}, "unsupported"),
    ({"colour": "red"}, "invalid_request"),
    ({"image": "file:///etc/passwd"}, None),
    ({"image": "data:image/png;base64,AAAA"}, None),
    ({"video": "http://127.0.0.1/"}, None),
    ({"lora": "style"}, "invalid_request"),
    ({"lora": "/etc/passwd"}, "invalid_request"),
    ({"lora": {"name": "ink", "scale": float("nan")}}, "invalid_message"),
    ({"lora": {"name": "ink", "scale": 11}}, "invalid_request"),
    ({"image": "data:image/png;base64,!!!", "video": "data:,"}, None),
]


@pytest.mark.parametrize(("fields", "code"), REFUSED)
def test_what_no_session_may_have_is_refused(running_server, fields, code):
    before = len(running_server.sessions())
    with running_server.connect() as client:
        client.send("session.start", **{"prompt": "a fox", "height": 64, "width": 64, **fields})
        error = client.until("error")
        assert code is None or error["code"] == code
        assert "\n" not in error["message"]
    assert len(running_server.sessions()) == before


def test_a_second_start_is_refused(controller):
    controller.start()
    assert controller.ask("session.start", prompt="a dog")["code"] == "already_started"
    assert controller.ask("session.attach", session_id="1", token="1")["code"] == "already_started"
    assert controller.ask("watch", token="1")["code"] == "invalid_message"
    assert controller.play_until(1)["chunk"] >= 1


def test_a_message_that_is_too_large_closes_its_connection_alone(running_server, controller):
    controller.start()
    with running_server.connect() as client:
        with pytest.raises(ConnectionClosed):  # while it is sent, or after
            client.socket.send("a" * (MESSAGE_BYTES + 1))
            client.receive()
        assert client.socket.close_code == 1009
    assert controller.play_until(1)["chunk"] >= 1


def test_whatever_is_sent_is_answered(running_server, controller):
    """Fuzz: messages of known types with any fields, before and after a start; the server stays, and so do others."""
    mine = controller.start()
    controller.until_chunk(0)
    numbers = itertools.count()
    client = running_server.connect()

    @settings(max_examples=150)
    @given(LIKE_MESSAGES)
    def fuzz(message):
        nonlocal client
        number = next(numbers)
        try:
            client.socket.send(json.dumps(message))
            client.send("session.ping", fuzz=number)
            client.until("session.pong", fuzz=number)
        except ConnectionClosed:  # an end with a code is an answer
            assert client.socket.close_code in (1000, 1008, 1009)
            client = running_server.connect()

    fuzz()
    with suppress(ConnectionClosed):
        client.socket.close()
    for session in running_server.sessions():  # what it has started
        if session["state"] != "done" and session["id"] != mine["session_id"]:
            running_server.ask(f"/v1/sessions/{session['id']}", KEY, "DELETE")
    assert_goes_on(controller)
    assert "server.fault" not in running_server.log.read_text()
