"""Ray: sessions that wait for a place."""

from __future__ import annotations

import itertools
import json
from contextlib import ExitStack

import pytest

from tests.launchers.serve.client import FRAMES
from tests.launchers.serve.conftest import QUEUE

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_many_sessions_wait_in_order_and_one_too_many_is_refused(running_server):
    """Two have the places and rest, eight wait; one of these is deleted, and the others are made one by one."""
    with ExitStack() as stack:
        placed, *waiting = clients = [stack.enter_context(running_server.connect()) for _ in range(QUEUE + 2)]
        for client in (placed, waiting.pop(0)):
            client.start()
            client.until_chunk(0)
            client.send("session.pause")
            client.until("session.state", state="paused")
        begun = [client.start(num_frames=FRAMES) for client in waiting]
        for place, client in enumerate(waiting, 1):
            client.until("session.queue", position=place, length=QUEUE)
        error = waiting[0].ask("session.interaction", interaction={"event": {"prompt": "a dog"}})
        assert error["code"] == "busy"
        with running_server.connect() as late:
            late.send("session.start", prompt="a fox")
            assert late.until("error")["code"] == "busy"

        deleted, gone = waiting.pop(QUEUE // 2), begun.pop(QUEUE // 2)
        assert running_server.ask(f"/v1/sessions/{gone['session_id']}", gone["control_token"], "DELETE")[0] == 200
        assert deleted.until("session.done")["reason"] == "deleted"
        for place, (client, each) in enumerate(zip(waiting, begun, strict=True), 1):
            client.until("session.queue", position=place, length=QUEUE - 1)
            about = json.loads(running_server.ask(f"/v1/sessions/{each['session_id']}", each["view_token"])[1])
            assert (about["state"], about["position"]) == ("queued", place)

        placed.send("session.stop")
        for client in waiting:
            done = client.until("session.done")
            assert (done["reason"], done["chunks"], len(client.chunks)) == ("finished", 1, 1)
        for first, client in enumerate(clients[2:], 1):
            told = [each["position"] for each in client.messages if each["type"] == "session.queue"]
            moved = [place for place, _ in itertools.groupby(told)]
            last = QUEUE // 2 if client is deleted else 0
            assert moved == list(range(first, last, -1)), "it moves up by one each time"
        ended = [each["session"] for each in running_server.events() if each["event"] == "session.ended"]
        ids = [each["session_id"] for each in begun]
        assert [each for each in ended if each in ids] == ids
        clients[1].send("session.stop")
        clients[1].until("session.done")


def test_a_session_that_waits_can_be_stopped(running_server):
    with ExitStack() as stack:
        clients = [stack.enter_context(running_server.connect()) for _ in range(3)]
        for client in clients:
            client.start()
        clients[2].until("session.queue")
        for client in reversed(clients):
            client.send("session.stop")
            assert client.until("session.done")["reason"] == "stopped"
