"""Ray: clients that do not read what they are sent hold up themselves alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.launchers.serve.client import Client, narrow_socket

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HURRIED = {"fps": 1000, "height": 128, "width": 128}
"""At 1000 frames a second the clock is ahead of the maker, so nothing but reading holds it up. Of larger pictures a few
chunks are more than the buffers on the way to a client take."""


def slow(url: str) -> dict[str, Any]:
    """Options of a client that takes no more than a few kilobytes before it reads."""
    return {"sock": narrow_socket(url), "max_queue": 1}


def test_a_controller_that_does_not_read_holds_up_its_session_and_no_other(running_server, controller):
    controller.start()

    def about(client: Client) -> dict[str, Any]:
        return next(each for each in running_server.sessions() if each["id"] == client.messages[0]["session_id"])

    with running_server.connect(**slow(running_server.url)) as client:
        client.start(**HURRIED)
        before = about(client)
        for chunk in range(1, 200):  # more than the buffers take, so one that is never held up fails
            controller.play_until(chunk)
            now = about(client)
            if now["waits_for_controller"] and now["chunks"] == before["chunks"]:
                break
            before = now
        assert now["waits_for_controller"] and now["chunks"] == before["chunks"]
        client.until_chunk(now["chunks"] + 4)
        assert [metadata["chunk"] for metadata, _ in client.chunks] == list(range(len(client.chunks)))
        client.send("session.stop")
        client.until("session.done")


def test_a_viewer_that_does_not_read_skips_to_the_newest_chunk_and_is_told(running_server, controller):
    begun = controller.start(**HURRIED)
    controller.until_chunk(0)
    with running_server.viewer(begun, **slow(running_server.url)) as watching:
        watching.until("video.start")
        with running_server.viewer(begun, first=0) as other:
            controller.until_chunk(20)
            other.until_chunk(20)
            assert [metadata["chunk"] for metadata, _ in other.chunks] == list(range(len(other.chunks)))
        while not any(metadata["skipped"] for metadata, _ in watching.chunks):
            watching.receive()
        numbers = [metadata["chunk"] for metadata, _ in watching.chunks]
        skipped = watching.chunks[-1][0]["skipped"]
        assert numbers[-1] - numbers[-2] == skipped + 1
        assert skipped >= 8
