"""Ray: sessions outlive their server, however it ends, and what they made can be made again to the same bits."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed

from helios_cp.generate.__main__ import main as generate
from launchers.serve.sessions.sessions import LOOK_SECONDS
from tests.launchers.conftest import write_adapter
from tests.launchers.serve.client import PATIENCE, Client
from tests.launchers.serve.media.test_fragments import times
from tests.launchers.serve.running import RunningServer
from tests.launchers.serve.test_live import FRAMES, change, get, play_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

KEY = "a-key-of-this-test-0123456789"


def attached(server: RunningServer, begun: dict, first: int = -1) -> Client:
    client = Client(f"{server.url}/v1/realtime/video")
    client.send("session.attach", session_id=begun["session_id"], token=begun["control_token"], from_chunk=first)
    client.until("video.start")
    return client


def made_again(schedule: str, model: str, folder: Path) -> bytes:
    """The MP4 of a take, made by the command on one rank, without a server and without Ray, by its schedule alone."""
    file, output = folder / "schedule.json", folder / "again.mp4"
    file.write_text(schedule)
    flags = ["--model", model, "--device", "cpu", "--prompt-schedule-file", str(file), "--output", str(output)]
    assert generate(flags) == 0
    return output.read_bytes()


def downloaded(server: RunningServer, begun: dict, name: str) -> bytes:
    code, content = get(server, f"/v1/sessions/{begun['session_id']}/{name}", begun["view_token"])
    assert code == 200
    return content


@pytest.fixture
def model(presets) -> str:
    return str(presets["random-distilled"])


def test_after_kill_9_a_session_goes_on_at_the_next_chunk(tmp_path, model, monkeypatch):
    """With its adapter, and with every change at the chunk that was promised for it, though the chunk that was in hand
    has to be made again."""
    (tmp_path / "loras").mkdir()
    write_adapter(tmp_path / "loras" / "ink.safetensors")
    monkeypatch.chdir(tmp_path / "loras")  # where the schedule says that the adapter is
    with RunningServer(tmp_path, model, "--lora-folder", str(tmp_path / "loras")) as server:
        _kill_and_go_on(server, model)


def _kill_and_go_on(server: RunningServer, model: str) -> None:
    with Client(f"{server.url}/v1/realtime/video") as client:
        begun = client.start(seed=6, lora="ink")
        client.send("session.position", media_time=0)  # a player that stands: from here on, each step is one chunk
        client.until_chunk(0)
        client.ask("session.pause")
        promised = {"e1": change(client, "e1", "a dog", transition_chunks=2)["chunk"]}
        for chunk in (1, 2):
            client.send("session.step")
            client.until_chunk(chunk)
        server.signal_worker("DenoiserRank", signal.SIGSTOP)
        promised["e2"] = change(client, "e2", "a cat", transition_chunks=3)["chunk"]
        client.send("session.step")
        while max(promised.values()) == 3:  # until the chunk is with the rank that stands still
            time.sleep(0.1)
            event = f"e{len(promised) + 1}"
            promised[event] = change(client, event, f"a cow and {event}", transition_chunks=2)["chunk"]
        server.end(signal.SIGKILL)
        with pytest.raises(ConnectionClosed):
            while True:
                client.receive()
    server.start()
    with attached(server, begun, first=len(client.chunks)) as back:
        assert back.until("session.state")["state"] == "paused"
        back.send("session.resume")
        play_until(back, 6)
        chunks = [*client.chunks, *back.chunks]
        assert [metadata["chunk"] for metadata, _ in chunks] == list(range(len(chunks)))
        shown = times(client.init + b"".join(media for _, media in chunks))
        assert [round(float(time) * 24) for time in shown] == list(range(FRAMES * len(chunks)))
        told = {metadata["chunk"]: metadata for metadata, _ in chunks}
        started = {event: chunk for chunk in told for event in told[chunk]["started"]}
        latest = {chunk: event for event, chunk in promised.items()}  # of those for a chunk, the last one wins
        assert started == {event: chunk for chunk, event in latest.items()} and latest.keys() == {1, 3, 4}
        back.send("session.stop")
        back.until("session.done")
    schedule = downloaded(server, begun, "schedule.json").decode()
    prompts = [told[chunk]["prompt"] for chunk in (1, 3, 4)]
    assert [entry["prompt"] for entry in json.loads(schedule)["prompt_schedule"]] == ["a red fox", *prompts]
    assert made_again(schedule, model, server.folder) == downloaded(server, begun, "video.mp4")


def test_a_server_that_is_told_to_end_leaves_its_sessions_to_the_next(tmp_path, model):
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    keys.chmod(0o600)
    flags = ["--api-key-file", str(keys), "--idle", "10", "--keep", "0.0001"]
    with RunningServer(tmp_path, model, *flags) as server:
        _stop_and_go_on(server)
        text = server.log.read_text()
        assert KEY not in text


def _stop_and_go_on(server: RunningServer) -> None:
    with Client(f"{server.url}/v1/realtime/video") as stranger:
        stranger.send("session.start", prompt="a fox")
        assert stranger.until("error")["code"] == "unauthorized"
        with pytest.raises(ConnectionClosed):
            stranger.receive()
        assert stranger.socket.close_code == 1008
        assert get(server, "/v1/sessions")[0] == 401
        assert get(server, "/v1/sessions", "wrong")[0] == 401
        with Client(f"{server.url}/v1/realtime/video") as client:
            begun = client.start(api_key=KEY)
            client.send("session.position", media_time=0)
            client.until_chunk(0)
            assert server.end(signal.SIGTERM) == 0
            with pytest.raises(ConnectionClosed):
                while True:
                    client.receive()
            assert client.socket.close_code == 1012
        assert begun["control_token"] not in server.log.read_text()
    server.start()
    time.sleep(2 * LOOK_SECONDS)  # the time of loading, in which nobody could watch it, does not count as idle
    with attached(server, begun, first=len(client.chunks)) as back:
        play_until(back, 2)
    folder = server.data / "sessions" / begun["session_id"]
    wait_until(lambda: not folder.exists())  # nobody watches it, so it ends; ended ones are kept for a moment here
    assert json.loads(get(server, "/v1/sessions", KEY)[1])["data"] == []


def wait_until(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happens():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.1)
