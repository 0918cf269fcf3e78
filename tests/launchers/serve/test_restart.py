"""Ray: what was under way outlives its server, however that ends, and can be made again to the same bits."""

from __future__ import annotations

import json
import signal
import time
from datetime import datetime
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed

from helios_cp.generate.__main__ import main as generate
from helios_cp.generate.run_folder import RunFolder
from tests.launchers.serve.client import FRAMES, Client
from tests.launchers.serve.conftest import KEY
from tests.launchers.serve.media.test_fragments import times
from tests.launchers.serve.running import RunningServer, wait_until
from tests.launchers.serve.videos.test_openai import SMALL, client_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

IDLE = 5.0
"""Seconds."""


def made_again(schedule: bytes, model: str, folder: Path) -> bytes:
    """The MP4 of a take, made by the command on one rank, without a server and without Ray, by its schedule alone."""
    file, output = folder / "schedule.json", folder / "again.mp4"
    file.write_bytes(schedule)
    flags = ["--model", model, "--device", "cpu", "--prompt-schedule-file", str(file), "--output", str(output)]
    assert generate(flags) == 0
    return output.read_bytes()


def until_closed(client: Client) -> None:
    with pytest.raises(ConnectionClosed):
        while True:
            client.receive()


def test_after_kill_9_a_session_keeps_what_was_promised(running_server, presets, tmp_path, monkeypatch):
    """Its adapter, and every change at the chunk that was promised for it, though the chunk that was in hand has to be
    made again."""
    server, model = running_server, str(presets["random-distilled"])
    monkeypatch.chdir(server.folder / "loras")  # where the schedule says that the adapter is
    with server.connect() as client:
        begun = client.start_at_rest(seed=6, lora="ink")
        client.ask("session.pause")  # from here on, each step is one chunk
        promised = {"e1": client.change("e1", "a dog", transition_chunks=2)["chunk"]}
        for chunk in (2, 3):
            client.send("session.step")
            client.until_chunk(chunk)
        server.signal_worker("DenoiserRank", signal.SIGSTOP)
        promised["e2"] = client.change("e2", "a cat", transition_chunks=3)["chunk"]
        client.send("session.step")
        while max(promised.values()) == 4:  # until the chunk is with the rank that stands still
            time.sleep(0.1 * len(promised))  # each change has its text encoded before, so it gets ever more time
            event = f"e{len(promised) + 1}"
            promised[event] = client.change(event, f"a cow and {event}", transition_chunks=2)["chunk"]
        server.end(signal.SIGKILL)
        until_closed(client)
    server.start()
    with server.attached(begun, first=len(client.chunks)) as back:
        assert back.until("session.state")["state"] == "paused"
        back.send("session.resume")
        back.play_until(7)
        back.send("session.stop")
        back.until("session.done")
    chunks = [*client.chunks, *back.chunks]
    assert [metadata["chunk"] for metadata, _ in chunks] == list(range(len(chunks)))
    shown = times(client.init + b"".join(media for _, media in chunks))
    assert [round(float(time)) for time in shown] == list(range(FRAMES * len(chunks)))
    told = {metadata["chunk"]: metadata for metadata, _ in chunks}
    started = {event: chunk for chunk in told for event in told[chunk]["started"]}
    latest = {chunk: event for event, chunk in promised.items()}  # of those for a chunk, the last one wins
    assert started == {event: chunk for chunk, event in latest.items()} and latest.keys() == {2, 4, 5}
    schedule = server.download(begun, "schedule.json")
    prompts = [told[chunk]["prompt"] for chunk in (2, 4, 5)]
    assert [entry["prompt"] for entry in json.loads(schedule)["prompt_schedule"]] == ["a red fox", *prompts]
    assert made_again(schedule, model, tmp_path) == server.download(begun, "video.mp4")


def test_after_kill_9_videos_and_a_session_that_runs_go_on_at_the_next_chunk(running_server):
    """The bits of the video are those of a run that was never killed."""
    server, extra = running_server, {"num_frames": 8 * FRAMES, "seed": 9}
    with client_of(server) as videos, server.connect() as client:
        begun = client.start_at_rest()
        whole = videos.videos.create_and_poll(**SMALL, extra_body=extra, poll_interval_ms=100)
        expected = videos.videos.download_content(whole.id).read()
        first = _stopped_video(server, videos, extra)
        second = videos.videos.create(**SMALL, extra_body={"num_frames": FRAMES}).id
        server.end(signal.SIGKILL)
        until_closed(client)
    assert 2 <= RunFolder.open(server.data / "videos" / first / "run").count() < 8
    server.start()
    with server.attached(begun, first=len(client.chunks)) as back:
        back.play_until(3)
        assert [metadata["chunk"] for metadata, _ in (*client.chunks, *back.chunks)] == [0, 1, 2, 3]
        back.send("session.stop")
        back.until("session.done")
    with client_of(server) as videos:
        assert [each.id for each in videos.videos.list()][:2] == [second, first]
        wait_until(lambda: videos.videos.retrieve(second).status == "completed")
        assert videos.videos.retrieve(first).status == "completed"
        assert videos.videos.download_content(first).read() == expected
        for each in videos.videos.list():
            videos.videos.delete(each.id)


def _stopped_video(server: RunningServer, videos, extra: dict) -> str:
    """A video of eight chunks, two of which are finished at least, and whose last one no rank has: it stands still."""
    while True:
        made = videos.videos.create(**SMALL, extra_body=extra).id
        wait_until(lambda made=made: videos.videos.retrieve(made).progress >= 25)
        server.signal_worker("DenoiserRank", signal.SIGSTOP)
        if videos.videos.retrieve(made).progress <= 50:  # so seven at most are denoised; see Limits.undelivered
            return made
        server.signal_worker("DenoiserRank", signal.SIGCONT)  # it was faster than this test
        videos.videos.delete(made)


def test_a_server_that_is_told_to_end_leaves_its_sessions_to_the_next(running_server):
    """One is watched from the beginning, and goes on. The other one ends, because nobody watches it; while the server
    loads, nobody could."""
    server = running_server
    with Client(f"{server.url}/v1/realtime/video") as stranger:
        stranger.send("session.start", prompt="a fox")
        assert stranger.until("error")["code"] == "unauthorized"
        until_closed(stranger)
        assert stranger.socket.close_code == 1008
    assert server.ask("/v1/sessions")[0] == server.ask("/v1/sessions", "wrong")[0] == 401
    with server.connect() as client, server.connect() as other:
        begun, left = client.start_at_rest(), other.start_at_rest()
        assert server.end(signal.SIGTERM) == 0
        until_closed(client)
        assert client.socket.close_code == 1012
    server.spawn("--idle", str(IDLE), "--keep", "0.0001")
    with server.attached(begun, first=len(client.chunks)) as back:
        server.wait_until_ready()
        back.play_until(3)
        assert [metadata["chunk"] for metadata, _ in (*client.chunks, *back.chunks)] == [0, 1, 2, 3]
    for each in (begun, left):
        folder = server.data / "sessions" / each["session_id"]
        wait_until(lambda folder=folder: not folder.exists())  # ended ones are kept for a moment here
    assert server.sessions() == []
    ready = [each for each in server.events() if each["event"] == "server.ready"][-1]
    ended = next(each for each in server.events() if each.get("session") == left["session_id"] and "why" in each)
    assert ended["why"] == "idle"
    waited = datetime.fromisoformat(ended["time"]) - datetime.fromisoformat(ready["time"])
    assert waited.total_seconds() > IDLE - 0.1
    text = server.log.read_text()
    assert KEY not in text and begun["control_token"] not in text
