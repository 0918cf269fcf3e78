"""Ray: a live server on a cluster that was there before, with two groups that serve two sessions at once."""

from __future__ import annotations

import json
import signal
import urllib.request
from contextlib import suppress

import psutil
import pytest

from tests.launchers.serve.client import Client
from tests.launchers.serve.running import RunningServer

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def ranks() -> list[psutil.Process]:
    """The processes that denoise on the nodes of the cluster."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::DenoiserRank"):
                found.append(process)
    return [each for each in found if psutil.Process().pid in [parent.pid for parent in each.parents()]]


def seen(client: Client, count: int) -> None:
    """Play until there are so many chunks, each once and in order."""
    while len(client.chunks) < count:
        client.receive()
        if client.chunks:
            metadata = client.chunks[-1][0]
            client.send("session.position", media_time=metadata["media_time"] + metadata["duration"])
    assert [metadata["chunk"] for metadata, _ in client.chunks] == list(range(len(client.chunks)))


def test_two_sessions_on_two_groups_one_of_which_is_lost(cluster, tmp_path, presets):
    flags = ["--address", cluster.address, "--groups", "2", "--longest", "2000"]
    with RunningServer(tmp_path, str(presets["random-distilled"]), *flags) as server:
        url = f"{server.url}/v1/realtime/video"
        with Client(url) as first, Client(url) as second:
            first.start(seed=1)
            second.start(seed=2)
            seen(first, 2)
            seen(second, 2)
            with urllib.request.urlopen(f"{server.url}/v1/sessions") as answer:
                states = [each["state"] for each in json.load(answer)["data"]]
            assert states == ["running", "running"], "neither waits for the other"
            before = ranks()
            assert len(before) == 2
            before[0].send_signal(signal.SIGKILL)
            for _ in range(3):
                seen(first, len(first.chunks) + 1)
                seen(second, len(second.chunks) + 1)
            for client in (first, second):
                client.send("session.stop")
                done = client.until("session.done")
                assert done["chunks"] == len(client.chunks)
        assert server.end(signal.SIGTERM) == 0
    _, left = psutil.wait_procs(ranks(), timeout=60)
    assert not left, "the server takes its workers along, and leaves the cluster"
