"""Ray: changes of the prompt while a session runs: which chunk shows them, and what is told of them."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from tests.launchers.serve.client import FRAMES
from tests.launchers.serve.media.test_fragments import pixels

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_change_is_received_applied_and_shown(controller):
    controller.start()
    controller.play_until(1)
    receipt = controller.change("e1", "a dog", transition_chunks=3)
    first = receipt["chunk"]
    assert first >= 1
    assert receipt["media_time"] == pytest.approx(first * FRAMES / 24)
    assert receipt["seconds"] >= 0
    controller.play_until(first + 3)
    told = {metadata["chunk"]: metadata for metadata, _ in controller.chunks}
    assert [chunk for chunk in told if "e1" in told[chunk]["started"]] == [first]
    assert [chunk for chunk in told if "e1" in told[chunk]["active"]] == [first, first + 1, first + 2]
    assert [chunk for chunk in told if "e1" in told[chunk]["completed"]] == [first + 2]
    assert told[first]["started_event_ids"] == ["e1"]
    assert told[first - 1]["prompt"] == "a red fox"
    assert told[first]["prompt"] == "a dog"


def test_a_change_changes_the_pictures_from_its_chunk_on(running_server):
    made = []
    for prompt in ("a dog", None):
        with running_server.connect() as client:
            client.start_at_rest(seed=4, num_frames=4 * FRAMES)
            if prompt:
                assert client.change("e", prompt)["chunk"] == 2
            client.play_until(3)
            client.until("session.done")
            made.append([pixels(client.init + media) for _, media in client.chunks])
    same = [np.array_equal(one, other) for one, other in zip(*made, strict=True)]
    assert same == [True, True, False, False]


def test_the_latest_change_wins_and_the_other_is_named(controller):
    controller.start_at_rest()
    first = controller.change("e1", "a dog")
    second = controller.change("e2", "a cat")
    assert first["chunk"] == second["chunk"] == 2
    assert second["supersedes"] == ["e1"]
    metadata = controller.play_until(2)
    assert metadata["started"] == ["e2"]
    assert metadata["superseded"] == ["e1"]
    assert metadata["prompt"] == "a cat"


def test_an_event_sent_again_is_answered_again_and_another_one_of_its_id_is_refused(controller):
    controller.start()
    controller.until_chunk(0)
    first = controller.change("e1", "a dog")
    again = controller.change("e1", "a dog")
    assert (again["chunk"], again["supersedes"]) == (first["chunk"], [])
    interaction = {"event_id": "e1", "event": {"prompt": "a cat"}}
    error = controller.ask("session.interaction", interaction=interaction)
    assert (error["code"], error["event_id"]) == ("event_id_conflict", "e1")


def test_a_change_that_no_chunk_can_show_is_refused(running_server):
    with running_server.connect() as client:
        client.start(num_frames=FRAMES)
        client.until_chunk(0)
        try:
            client.send("session.interaction", interaction={"event_id": "late", "event": {"prompt": "a dog"}})
            error = client.until("error")
            assert error["event_id"] == "late"
            assert error["code"] in ("limit", "not_started")
        except ConnectionClosed:  # the session has ended meanwhile, and has told so
            with suppress(ConnectionClosed):
                client.until("session.done")
            told = [message["type"] for message in client.messages]
            assert "session.done" in told and "session.interaction.queued" not in told
