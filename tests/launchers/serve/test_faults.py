"""Ray: workers are killed at random while a session is live; nobody misses a chunk, and what was made can be made again
to the same bits. See test_restart.py for the server itself."""

from __future__ import annotations

import os
import random
import signal
from contextlib import suppress

import psutil
import pytest

from tests.launchers.serve.client import Client
from tests.launchers.serve.running import RunningServer
from tests.launchers.serve.test_restart import made_again, until_closed

pytestmark = [pytest.mark.ray, pytest.mark.slow]

WORKERS = ("Denoiser", "Decoder", "Writer", "TextEncoder")
FAULTS = int(os.environ.get("HELIOS_CP_FAULTS", "2"))
"""Kills in a run; where HELIOS_CP_FAULTS asks for more, each third one is of the server."""


def workers(server: RunningServer) -> list[psutil.Process]:
    """Ray's actors of a server, without its helpers."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    found = []
    for child in children:
        with suppress(psutil.NoSuchProcess):
            title = " ".join(child.cmdline())
            if title.startswith("ray::") and any(name in title for name in WORKERS):
                found.append(child)
    return found


def test_nothing_is_lost_by_faults(running_server, presets, tmp_path):
    server, generator = running_server, random.Random(7)
    with server.connect() as client:
        begun = client.start(seed=9)
        client.play_until(1)
        chunks = _taken(client)
    for fault in range(FAULTS):
        with server.attached(begun, first=len(chunks)) as client, server.viewer(begun, first=0) as watching:
            client.play_until(len(chunks))
            transition = {"transition_chunks": 1 + fault % 3}
            promised = client.change(f"change-{fault}", f"a dog number {fault}", **transition)["chunk"]
            if fault % 3 == 2:
                server.end(signal.SIGKILL)
                until_closed(client)
                server.start()
            else:
                generator.choice(workers(server)).kill()
                client.play_until(len(chunks) + 3)
                watching.until_chunk(len(chunks) + 3)
                assert [metadata["chunk"] for metadata, _ in watching.chunks] == list(range(len(watching.chunks)))
                assert [media for _, media in watching.chunks[: len(chunks)]] == [media for _, media in chunks]
            chunks += _taken(client)
    with server.attached(begun, first=len(chunks)) as client:
        client.play_until(max(len(chunks) + 1, promised))
        client.send("session.stop")
        client.until("session.done")
        chunks += _taken(client)
    assert [metadata["chunk"] for metadata, _ in chunks] == list(range(len(chunks)))
    # A change that no chunk has shown when the next one comes is told as superseded: none goes without a word.
    told = [event for metadata, _ in chunks for event in (*metadata["superseded"], *metadata["started"])]
    assert told == [f"change-{fault}" for fault in range(FAULTS)]
    again = made_again(server.download(begun, "schedule.json"), str(presets["random-distilled"]), tmp_path)
    assert again == server.download(begun, "video.mp4")


def _taken(client: Client) -> list:
    taken, client.chunks = client.chunks, []
    return taken
