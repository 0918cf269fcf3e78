"""Ray: a live server on a cluster that was there before, with two groups, each of which serves a session and decodes
its chunks."""

from __future__ import annotations

import signal
from contextlib import suppress

import psutil
import pytest

from tests.launchers.serve.client import PATIENCE
from tests.launchers.serve.running import RunningServer

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def ranks() -> list[psutil.Process]:
    """The processes that denoise for this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::DenoiserRank"):
                found.append(process)
    return found


def test_two_sessions_on_two_groups_one_of_which_is_lost(cluster, tmp_path, presets):
    others = ranks()  # of a server that other tests share
    flags = ["--address", cluster.address, "--groups", "2", "--decoders", "0", "--longest", "2000"]
    with RunningServer(tmp_path, str(presets["random-distilled"]), *flags) as server:
        with server.connect() as first, server.connect() as second:
            for seed, client in enumerate((first, second)):
                client.start_at_rest(seed=seed)
            states = [each["state"] for each in server.sessions()]
            assert states == ["running", "running"], "neither waits for the other"
            mine = [each for each in ranks() if each not in others]
            assert len(mine) == 2
            mine[0].send_signal(signal.SIGKILL)
            for client in (first, second):
                client.play_until(4)
                client.send("session.stop")
                done = client.until("session.done")
                assert [metadata["chunk"] for metadata, _ in client.chunks] == list(range(done["chunks"]))
        assert server.end(signal.SIGTERM) == 0
    _, left = psutil.wait_procs([each for each in ranks() if each not in others], timeout=PATIENCE)
    assert not left, "the server takes its workers along, and leaves the cluster"
