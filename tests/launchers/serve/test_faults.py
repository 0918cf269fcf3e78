"""Ray: workers and the server itself are killed at random while a session is live; nobody misses a chunk, and what was
made can be made again to the same bits."""

from __future__ import annotations

import os
import random
import signal
from contextlib import suppress

import psutil
import pytest
from websockets.exceptions import ConnectionClosed

from tests.launchers.serve.client import Client
from tests.launchers.serve.running import RunningServer
from tests.launchers.serve.test_live import change, play_until, viewer
from tests.launchers.serve.test_restart import attached, downloaded, made_again

pytestmark = [pytest.mark.ray, pytest.mark.slow]

WORKERS = ("Denoiser", "Decoder", "Writer", "TextEncoder")
FAULTS = int(os.environ.get("HELIOS_CP_FAULTS", "3"))
"""Kills in a run, each third one of the server; HELIOS_CP_FAULTS asks for more."""


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


def test_nothing_is_lost_by_faults(tmp_path, presets):
    model = str(presets["random-distilled"])
    generator = random.Random(7)
    with RunningServer(tmp_path, model, "--longest", "2000") as server:
        with Client(f"{server.url}/v1/realtime/video") as client:
            begun = client.start(seed=9)
            play_until(client, 1)
            chunks = _taken(client)
        for fault in range(FAULTS):
            with attached(server, begun, first=len(chunks)) as client, viewer(server, begun, first=0) as watching:
                play_until(client, len(chunks))
                transition = {"transition_chunks": 1 + fault % 3}
                promised = change(client, f"change-{fault}", f"a dog number {fault}", **transition)["chunk"]
                is_server = fault % 3 == 2
                if is_server:
                    server.end(signal.SIGKILL)
                    with suppress(ConnectionClosed):
                        while True:
                            client.receive()
                    server.start()
                else:
                    victim = generator.choice(workers(server))
                    victim.kill()
                    play_until(client, len(chunks) + 3)
                    watching.until_chunk(len(chunks) + 3)
                    assert [metadata["chunk"] for metadata, _ in watching.chunks] == list(range(len(watching.chunks)))
                    assert [media for _, media in watching.chunks[: len(chunks)]] == [media for _, media in chunks]
                chunks += _taken(client)
        with attached(server, begun, first=len(chunks)) as client:
            play_until(client, max(len(chunks) + 1, promised))
            chunks += _taken(client)
            client.send("session.stop")
            client.until("session.done")
        assert [metadata["chunk"] for metadata, _ in chunks] == list(range(len(chunks)))
        # A change that no chunk has shown when the next one comes is told as superseded: none goes without a word.
        told = [event for metadata, _ in chunks for event in (*metadata["superseded"], *metadata["started"])]
        assert told == [f"change-{fault}" for fault in range(FAULTS)]
        schedule, video = (downloaded(server, begun, name) for name in ("schedule.json", "video.mp4"))
    assert made_again(schedule.decode(), model, tmp_path) == video


def _taken(client: Client) -> list:
    taken, client.chunks = client.chunks, []
    return taken
