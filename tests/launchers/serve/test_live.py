"""Ray: one live server on the tiny model; clients that know its protocol alone start, steer and watch sessions."""

from __future__ import annotations

import io
import itertools
import json
import signal
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress

import av
import numpy as np
import pytest
from hypothesis import given, settings
from websockets.exceptions import ConnectionClosed

from helios_cp.generate.__main__ import main as generate
from tests.launchers.conftest import write_adapter
from tests.launchers.serve.client import PATIENCE, Client, narrow_socket
from tests.launchers.serve.media.test_fragments import pixels, times
from tests.launchers.serve.realtime.malformed import MALFORMED
from tests.launchers.serve.realtime.test_messages import LIKE_MESSAGES
from tests.launchers.serve.running import RunningServer

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FRAMES = 33
CHUNK = FRAMES / 24
MESSAGE_BYTES = 200_000
QUEUE = 20


@pytest.fixture(scope="module")
def server(tmp_path_factory, presets):
    flags = ["--sessions", "2", "--queue", str(QUEUE), "--message-bytes", str(MESSAGE_BYTES), "--requests", "1000000"]
    folder = tmp_path_factory.mktemp("live")
    (folder / "loras").mkdir()
    write_adapter(folder / "loras" / "ink.safetensors")
    flags += ["--lora-folder", str(folder / "loras")]
    with RunningServer(folder, str(presets["random-distilled"]), *flags) as started:
        yield started
        assert started.end(signal.SIGINT) == 0
        assert "server.fault" not in started.log.read_text()


@pytest.fixture
def controller(server):
    with Client(f"{server.url}/v1/realtime/video") as client:
        yield client
        with suppress(ConnectionClosed):
            client.send("session.stop")
            client.until("session.done")


def viewer(server, begun, first=None, token=None) -> Client:
    where = "" if first is None else f"?from={first}"
    headers = {"Authorization": f"Bearer {token or begun['view_token']}"}
    return Client(f"{server.url}/v1/sessions/{begun['session_id']}/watch{where}", additional_headers=headers)


def get(server, path, token=None, method="GET") -> tuple[int, bytes]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(server.url + path, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def play(client: Client, chunk: int) -> None:
    """As a player that has shown a chunk to its end would tell."""
    client.send("session.position", media_time=(chunk + 1) * CHUNK)


def play_until(client: Client, chunk: int) -> dict:
    """Play each chunk as it comes; returns the metadata of `chunk`."""
    while not client.chunks or client.chunks[-1][0]["chunk"] < chunk:
        newest = len(client.chunks)
        client.receive()
        if len(client.chunks) > newest:
            with suppress(ConnectionClosed):  # that was the last chunk
                play(client, client.chunks[-1][0]["chunk"])
    return client.chunks[-1][0]


def change(client: Client, event: str, prompt: str, **fields) -> dict:
    interaction = {"event_id": event, "event": {"prompt": prompt}, **fields}
    client.send("session.interaction", interaction=interaction)
    return client.until("session.interaction.queued", event_id=event)


# Start, play, end


def test_a_client_of_vllm_omnis_protocol_plays_a_video_to_its_end(server):
    """Start, change the prompt, read pairs of metadata and bytes, ping, and see the end; nothing of ours is used."""
    with Client(f"{server.url}/v1/realtime/video") as client:
        begun = client.start(model="BestWishYsh/Helios-Distilled", format="m4s", fps=24, num_frames=99, seed=3)
        assert begun["format"] == "m4s"
        assert begun["config"]["width"] == 64
        client.send("session.ping")
        client.until("session.pong")
        done = client.until("session.done")
        assert (done["chunks"], done["stopped"], done["request_id"]) == (3, False, begun["request_id"])
        for number, (metadata, media) in enumerate(client.chunks):
            assert metadata["kind"] == "media"
            assert metadata["generation_chunk_index"] == metadata["transport_chunk_index"] == number
            assert metadata["num_frames"] == FRAMES
            assert metadata["byte_length"] == len(media)
        assert len(times(client.media())) == 99
        with pytest.raises(ConnectionClosed):
            client.receive()
        assert client.socket.close_code == 1000


def test_chunks_are_one_continuous_video(controller):
    controller.start()
    play_until(controller, 2)
    shown = times(controller.media())
    assert [round(float(time) * 24) for time in shown] == list(range(len(controller.chunks) * FRAMES))
    for number, (metadata, _) in enumerate(controller.chunks):
        assert (metadata["chunk"], metadata["first_frame"]) == (number, number * FRAMES)
        assert metadata["media_time"] == pytest.approx(number * CHUNK)
        assert metadata["seconds"].keys() >= {"denoise", "decode", "write"}
        assert metadata["fps"] > 0


def test_the_same_session_again_has_the_same_bits(server):
    made = []
    for _ in range(2):
        with Client(f"{server.url}/v1/realtime/video") as client:
            client.start(num_frames=66, seed=11)
            client.until("session.done")
            made.append(client.media())
    assert made[0] == made[1]


def test_stop_ends_a_session_after_what_has_begun(controller):
    controller.start()
    play_until(controller, 1)
    controller.send("session.stop")
    done = controller.until("session.done")
    assert done["reason"] == "stopped"
    assert done["stopped"] is True
    assert done["chunks"] == len(controller.chunks)
    assert done["frames"] == FRAMES * len(controller.chunks)


def test_start_tells_the_configuration_and_what_it_passed_over(controller):
    begun = controller.start(seed=5, lead=2, model="another", flow_shift=1, transition_chunks=2)
    assert begun["configuration"]["seed"] == [5]
    assert begun["configuration"]["lead"] == 2
    assert begun["configuration"]["pyramid_num_inference_steps_list"] == [1, 1, 1]
    assert sorted(begun["ignored"]) == ["flow_shift", "model"]
    assert begun["mime"].startswith("video/mp4; codecs=")
    assert begun["control_token"] != begun["view_token"]


# Pacing


def test_without_a_position_the_next_chunk_waits_for_the_lead(controller):
    """A player that has told that it stands at 0 is believed: one chunk is made, and no other."""
    controller.start(lead=1)
    controller.send("session.position", media_time=0)
    controller.until_chunk(0)
    controller.send("session.position", media_time=0)
    controller.ask("session.pause")  # what had begun by then comes, nothing else does
    controller.ask("session.resume")
    controller.send("session.position", media_time=0)
    assert len(controller.chunks) <= 2
    play(controller, 0)
    controller.until_chunk(1)


@pytest.mark.parametrize("lead", [1, 2])
def test_the_maker_is_never_further_ahead_than_the_lead(controller, lead):
    controller.start(lead=lead)
    controller.send("session.position", media_time=0)
    for chunk in range(6):
        controller.until_chunk(chunk)
        ahead = controller.chunks[-1][0]["chunk"] - chunk
        assert ahead <= lead
        play(controller, chunk)


# Changes


def test_a_change_is_received_applied_and_shown(controller):
    controller.start()
    play_until(controller, 1)
    receipt = change(controller, "e1", "a dog", transition_chunks=3)
    first = receipt["chunk"]
    assert first >= 1
    assert receipt["media_time"] == pytest.approx(first * CHUNK)
    assert receipt["seconds"] >= 0
    play_until(controller, first + 3)
    told = {metadata["chunk"]: metadata for metadata, _ in controller.chunks}
    assert [chunk for chunk in told if "e1" in told[chunk]["started"]] == [first]
    assert [chunk for chunk in told if "e1" in told[chunk]["active"]] == [first, first + 1, first + 2]
    assert [chunk for chunk in told if "e1" in told[chunk]["completed"]] == [first + 2]
    assert told[first]["started_event_ids"] == ["e1"]
    assert told[first - 1]["prompt"] == "a red fox"
    assert told[first]["prompt"] == "a dog"


def test_a_change_changes_the_pictures_from_its_chunk_on(server):
    made, first = [], 0
    for prompt in ("a dog", None):
        with Client(f"{server.url}/v1/realtime/video") as client:
            client.start(seed=4, num_frames=5 * FRAMES)
            play_until(client, 0)
            if prompt:
                first = change(client, "e", prompt)["chunk"]
            play_until(client, 4)
            client.until("session.done")
            made.append([pixels(client.init + media) for _, media in client.chunks])
    same = [np.array_equal(one, other) for one, other in zip(*made, strict=True)]
    assert same == [chunk < first for chunk in range(5)]


def test_the_latest_change_wins_and_the_other_is_named(controller):
    controller.start()
    controller.until_chunk(0)
    controller.ask("session.pause")
    first = change(controller, "e1", "a dog")
    second = change(controller, "e2", "a cat")
    assert first["chunk"] == second["chunk"]
    assert second["supersedes"] == ["e1"]
    controller.ask("session.resume")
    metadata = play_until(controller, second["chunk"])
    assert metadata["started"] == ["e2"]
    assert metadata["superseded"] == ["e1"]
    assert metadata["prompt"] == "a cat"


def test_an_event_sent_again_is_answered_again_and_another_one_of_its_id_is_refused(controller):
    controller.start()
    controller.until_chunk(0)
    controller.ask("session.pause")
    first = change(controller, "e1", "a dog")
    again = change(controller, "e1", "a dog")
    assert (again["chunk"], again["supersedes"]) == (first["chunk"], [])
    interaction = {"event_id": "e1", "event": {"prompt": "a cat"}}
    error = controller.ask("session.interaction", interaction=interaction)
    assert (error["code"], error["event_id"]) == ("event_id_conflict", "e1")


def test_a_change_that_no_chunk_can_show_is_refused(server):
    with Client(f"{server.url}/v1/realtime/video") as client:
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


# Pause, step, reset


def test_pause_step_and_resume(controller):
    controller.start()
    controller.until_chunk(0)
    controller.send("session.pause")
    assert controller.until("session.state")["state"] == "paused"
    controller.send("session.step")
    controller.until("session.state", state="paused")
    controller.until_chunk(1)
    ready = len(controller.chunks)
    controller.send("session.step")
    controller.until_chunk(ready)
    assert controller.ask("session.pause")["type"] == "session.pong"  # already paused: nothing changes
    controller.send("session.resume")
    controller.until("session.state", state="running")
    play_until(controller, ready + 1)
    error = controller.ask("session.step")
    assert error["code"] == "invalid_request"


def test_reset_begins_again_in_the_same_session(server, controller):
    begun = controller.start(seed=21)
    play_until(controller, 1)
    controller.send("session.reset", seed=22, prompt="a dog")
    state = controller.until("session.state", take=1)
    first = state["chunk"]
    play_until(controller, first + 1)
    told = [metadata for metadata, _ in controller.chunks]
    assert [each["chunk"] for each in told] == list(range(len(told)))
    assert [each["take"] for each in told] == [0] * first + [1] * (len(told) - first)
    assert [each["is_reset"] for each in told].index(True) == first
    assert told[first]["prompt"] == "a dog"
    shown = times(controller.media())
    assert [round(float(time) * 24) for time in shown] == list(range(len(told) * FRAMES))
    with Client(f"{server.url}/v1/realtime/video") as alone:
        alone.start(seed=22, prompt="a dog", num_frames=FRAMES)
        alone.until("session.done")
        assert np.array_equal(
            pixels(alone.init + alone.chunks[0][1]), pixels(controller.init + controller.chunks[first][1])
        )
    code, text = get(server, f"/v1/sessions/{begun['session_id']}/schedule.json?take=1", begun["view_token"])
    assert code == 200
    assert json.loads(text)["seed"] == [22]


def test_an_adapter_of_a_session_is_in_all_its_takes_and_in_its_schedule(server, presets, tmp_path, monkeypatch):
    """In turns with a session without one, on the same group; and made again by one process, from the schedule."""
    assert json.loads(get(server, "/v1/server")[1])["loras"] == ["ink"]
    lora = {"name": "ink", "scale": 0.5}
    with Client(f"{server.url}/v1/realtime/video") as plain, Client(f"{server.url}/v1/realtime/video") as client:
        plain.start(seed=31, num_frames=2 * FRAMES)
        begun = client.start(seed=31, num_frames=4 * FRAMES, lora=lora)
        assert begun["configuration"]["lora"] == [{"path": "ink.safetensors", "weight": 0.5}]
        play_until(plain, 1)
        play_until(client, 0)
        change(client, "e1", "a dog", transition_chunks=2)
        client.send("session.reset", seed=31, prompt="a red fox")
        first = client.until("session.state", take=1)["chunk"]
        play_until(client, 3)
        client.until("session.done")
    shown = [pixels(each.init + each.chunks[chunk][1]) for each, chunk in ((plain, 0), (client, 0), (client, first))]
    assert not np.array_equal(shown[0], shown[1])
    assert np.array_equal(shown[1], shown[2])
    monkeypatch.chdir(server.folder / "loras")  # where the adapter is
    for take in range(2):
        path = f"/v1/sessions/{begun['session_id']}/schedule.json?take={take}"
        (tmp_path / "schedule.json").write_bytes(get(server, path, begun["view_token"])[1])
        run = tmp_path / str(take)
        flags = ["--prompt-schedule-file", str(tmp_path / "schedule.json"), "--checkpoint-dir", str(run)]
        flags += ["--model", str(presets["random-distilled"]), "--device", "cpu"]
        assert generate([*flags, "--output", str(tmp_path / f"{take}.mp4")]) == 0
        live = server.data / "sessions" / begun["session_id"] / f"take-{take:03d}"
        again = sorted(run.glob("chunk-*.mp4"))
        assert len(again) == (first, 4 - first)[take]
        for each in again:  # a take that a reset ended may have a chunk more, which nobody saw
            assert each.read_bytes() == (live / each.name).read_bytes(), each.name


# Viewers


def test_a_late_viewer_plays_from_the_newest_chunk(server, controller):
    begun = controller.start()
    play_until(controller, 2)
    with viewer(server, begun) as late:
        start = late.until("video.start")
        assert "control_token" not in start
        late.receive()
        assert late.messages[1]["type"] == "session.state"
        metadata = late.until_chunk(2)
        assert late.chunks[0][0]["chunk"] >= 2
        assert late.init == controller.init
        assert times(late.media())[0] == pytest.approx(late.chunks[0][0]["media_time"])
        play(controller, 2)
        late.until_chunk(metadata["chunk"] + 1)
        play_until(controller, 3)
        assert dict_of(late).items() <= dict_of(controller).items()


def dict_of(client: Client) -> dict[int, bytes]:
    return {metadata["chunk"]: media for metadata, media in client.chunks}


def test_a_viewer_may_go_back(server, controller):
    begun = controller.start()
    play_until(controller, 2)
    with viewer(server, begun, first=0) as back:
        back.until_chunk(2)
        assert [metadata["chunk"] for metadata, _ in back.chunks[:3]] == [0, 1, 2]
        assert len(times(back.media())) == FRAMES * len(back.chunks)


def test_a_viewer_sees_changes_and_the_end_and_steers_nothing(server, controller):
    begun = controller.start()
    controller.until_chunk(0)
    with viewer(server, begun) as watching:
        watching.until_chunk(0)
        for kind in ("session.pause", "session.stop", "session.reset", "session.position"):
            fields = {"media_time": 9.0} if kind == "session.position" else {}
            assert watching.ask(kind, **fields)["code"] == "forbidden"
        receipt = change(controller, "e1", "a dog")
        play_until(controller, receipt["chunk"])
        assert "e1" in watching.until_chunk(receipt["chunk"])["started"]
        controller.send("session.stop")
        assert watching.until("session.done") == controller.until("session.done")


def test_many_viewers_get_every_chunk_once_and_in_order(server, controller):
    begun = controller.start()
    controller.until_chunk(0)
    viewers = [viewer(server, begun, first=0) for _ in range(12)]
    play_until(controller, 4)
    for each in viewers:
        each.until_chunk(4)
        assert [metadata["chunk"] for metadata, _ in each.chunks] == list(range(len(each.chunks)))
        each.socket.close()


def test_a_viewer_may_send_its_token_as_a_message_or_in_the_address(server, controller):
    begun = controller.start()
    controller.until_chunk(0)
    path = f"{server.url}/v1/sessions/{begun['session_id']}/watch"
    with Client(path) as client:
        client.send("watch", token=begun["view_token"])
        client.until_chunk(0)
    with Client(f"{path}?token={begun['view_token']}") as client:
        client.until_chunk(0)


@pytest.mark.parametrize("token", ["wrong", "", "a" * 300, "é", "null"])
def test_a_wrong_token_opens_nothing(server, controller, token):
    begun = controller.start()
    controller.until_chunk(0)
    with Client(f"{server.url}/v1/sessions/{begun['session_id']}/watch") as client:
        client.send("watch", token=token)
        assert client.until("error")["code"] in ("unauthorized", "invalid_message")
        with pytest.raises(ConnectionClosed):
            client.receive()
        assert client.socket.close_code == 1008
    with Client(f"{server.url}/v1/realtime/video") as client:
        client.send("session.attach", session_id=begun["session_id"], token=token)
        assert client.until("error")["code"] in ("unauthorized", "invalid_message")
    assert get(server, f"/v1/sessions/{begun['session_id']}/hls/live.m3u8")[0] == 401
    assert play_until(controller, 1)["chunk"] >= 1


def test_a_view_token_does_not_steer(server, controller):
    begun = controller.start()
    with Client(f"{server.url}/v1/realtime/video") as client:
        client.send("session.attach", session_id=begun["session_id"], token=begun["view_token"])
        assert client.until("error")["code"] == "forbidden"
        with pytest.raises(ConnectionClosed):
            client.receive()
    assert get(server, f"/v1/sessions/{begun['session_id']}", begun["view_token"], "DELETE")[0] == 403


# Coming back


def test_a_controller_that_comes_back_misses_nothing(server, controller):
    begun = controller.start()
    play_until(controller, 1)
    controller.socket.close()
    with Client(f"{server.url}/v1/realtime/video") as back:
        back.send(
            "session.attach",
            session_id=begun["session_id"],
            token=begun["control_token"],
            from_chunk=len(controller.chunks),
        )
        again = back.until("video.start")
        assert again["view_token"] == begun["view_token"]
        play_until(back, len(controller.chunks) + 1)
        assert back.chunks[0][0]["chunk"] == len(controller.chunks)
        whole = controller.init + b"".join(media for _, media in [*controller.chunks, *back.chunks])
        assert [round(float(time) * 24) for time in times(whole)] == list(
            range(FRAMES * (len(controller.chunks) + len(back.chunks)))
        )
        receipt = change(back, "e1", "a dog")
        play_until(back, receipt["chunk"])
        back.send("session.stop")
        back.until("session.done")


def test_the_newest_controller_takes_over(server, controller):
    begun = controller.start()
    controller.until_chunk(0)
    with Client(f"{server.url}/v1/realtime/video") as other:
        other.send("session.attach", session_id=begun["session_id"], token=begun["control_token"])
        other.until("video.start")
        with pytest.raises(ConnectionClosed):
            while True:
                controller.receive()
        assert controller.socket.close_code == 1008
        other.send("session.stop")
        other.until("session.done")


# Files


def test_hls_is_the_same_video(server):
    with Client(f"{server.url}/v1/realtime/video") as client:
        begun = client.start(num_frames=99, seed=8)
        client.until("session.done")
    path = f"/v1/sessions/{begun['session_id']}/hls/live.m3u8?token={begun['view_token']}"
    code, text = get(server, path)
    assert code == 200
    assert text.decode().splitlines()[-1] == "#EXT-X-ENDLIST"
    with av.open(server.url + path) as container:
        shown = [(frame.time, frame.to_ndarray(format="yuv420p")) for frame in container.decode(video=0)]
    assert [round(time * 24) for time, _ in shown] == list(range(99))
    assert np.array_equal(np.stack([picture for _, picture in shown]), pixels(client.media()))


@pytest.mark.parametrize("name", ["00099.m4s", "1.m4s", "-0001.m4s", "..%2F..%2Fsession.json", "session.json", "٣.m4s"])
def test_no_other_file_is_handed_out(server, controller, name):
    begun = controller.start()
    controller.until_chunk(0)
    path = f"/v1/sessions/{begun['session_id']}/hls/{urllib.parse.quote(name, safe='%')}"
    assert get(server, path, begun["view_token"])[0] == 404


def test_the_video_can_be_had_while_it_is_made_and_after(server, controller):
    begun = controller.start()
    play_until(controller, 1)
    path = f"/v1/sessions/{begun['session_id']}/video.mp4"
    code, content = get(server, path, begun["view_token"])
    assert code == 200
    assert len(times(content)) % FRAMES == 0
    controller.send("session.stop")
    controller.until("session.done")
    code, content = get(server, path, begun["view_token"])
    assert np.array_equal(pixels(content), pixels(controller.media()))


def test_sessions_are_listed_without_prompts_and_deleted(server, controller):
    begun = controller.start(prompt="a very secret fox")
    controller.until_chunk(0)
    code, text = get(server, "/v1/sessions")
    assert code == 200
    assert b"secret" not in text
    mine = next(each for each in json.loads(text)["data"] if each["id"] == begun["session_id"])
    assert (mine["state"], mine["has_controller"]) == ("running", True)
    code, text = get(server, f"/v1/sessions/{begun['session_id']}", begun["view_token"])
    assert json.loads(text)["configuration"]["prompt"] == ["a very secret fox"]
    code, text = get(server, f"/v1/sessions/{begun['session_id']}/chunks?from=0", begun["view_token"])
    assert json.loads(text)["data"][0]["chunk"] == 0
    assert get(server, f"/v1/sessions/{begun['session_id']}", "wrong", "DELETE")[0] == 401
    assert get(server, f"/v1/sessions/{begun['session_id']}", begun["control_token"], "DELETE")[0] == 200
    assert controller.until("session.done")["reason"] == "deleted"
    assert get(server, f"/v1/sessions/{begun['session_id']}", begun["control_token"])[0] == 404
    assert "secret" not in server.log.read_text()


# The queue


def test_many_sessions_wait_in_order_and_one_too_many_is_refused(server):
    """Two have the places and rest, twenty wait; one of these is deleted, and the others are made one by one."""
    with ExitStack() as stack:
        placed, *waiting = clients = [
            stack.enter_context(Client(f"{server.url}/v1/realtime/video")) for _ in range(QUEUE + 2)
        ]
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
        with Client(f"{server.url}/v1/realtime/video") as late:
            late.send("session.start", prompt="a fox")
            assert late.until("error")["code"] == "busy"

        deleted, gone = waiting.pop(QUEUE // 2), begun.pop(QUEUE // 2)
        assert get(server, f"/v1/sessions/{gone['session_id']}", gone["control_token"], "DELETE")[0] == 200
        assert deleted.until("session.done")["reason"] == "deleted"
        for place, (client, each) in enumerate(zip(waiting, begun, strict=True), 1):
            client.until("session.queue", position=place, length=QUEUE - 1)
            about = json.loads(get(server, f"/v1/sessions/{each['session_id']}", each["view_token"])[1])
            assert (about["state"], about["position"]) == ("queued", place)

        placed.send("session.stop")
        for client in waiting:
            done = client.until("session.done")
            assert (done["reason"], done["chunks"], len(client.chunks)) == ("finished", 1, 1)
        for first, client in enumerate(clients[2:], 1):
            told = [each["position"] for each in client.messages if each["type"] == "session.queue"]
            moved = [place for place, _ in itertools.groupby(told)]
            assert moved == list(range(first, QUEUE // 2 if client is deleted else 0, -1)), (
                "it moves up by one each time"
            )
        events = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
        ended = [each["session"] for each in events if each["event"] == "session.ended"]
        ids = [each["session_id"] for each in begun]
        assert [each for each in ended if each in ids] == ids
        clients[1].send("session.stop")
        clients[1].until("session.done")


def test_a_session_that_waits_can_be_stopped(server):
    clients = [Client(f"{server.url}/v1/realtime/video") for _ in range(3)]
    for client in clients:
        client.start()
    clients[2].until("session.queue")
    for client in reversed(clients):
        client.send("session.stop")
        assert client.until("session.done")["reason"] == "stopped"
        client.socket.close()


# Those who do not read


def slow(url: str, **options) -> Client:
    """A client that takes no more than a few kilobytes before it reads."""
    return Client(url, sock=narrow_socket(url), max_queue=1, **options)


def test_a_controller_that_does_not_read_holds_up_its_session_and_no_other(server, controller):
    """At 1000 frames a second the clock is ahead of the maker, so nothing but reading holds it up."""
    with slow(f"{server.url}/v1/realtime/video") as client:
        begun = client.start(fps=1000)
        session = f"/v1/sessions/{begun['session_id']}"
        while not (told := json.loads(get(server, session, begun["view_token"])[1]))["waits_for_controller"]:
            controller.ask("session.ping")
        controller.start()
        play_until(controller, 1)
        again = json.loads(get(server, session, begun["view_token"])[1])
        assert again["chunks"] <= told["chunks"] + 4  # what had begun, and what the lead allows
        client.until_chunk(told["chunks"] + 4)
        assert [metadata["chunk"] for metadata, _ in client.chunks] == list(range(len(client.chunks)))
        client.send("session.stop")
        client.until("session.done")


def test_a_viewer_that_does_not_read_skips_to_the_newest_chunk_and_is_told(server, controller):
    begun = controller.start(fps=1000)
    controller.until_chunk(0)
    url = f"{server.url}/v1/sessions/{begun['session_id']}/watch"
    headers = {"Authorization": f"Bearer {begun['view_token']}"}
    with slow(url, additional_headers=headers) as watching, viewer(server, begun, first=0) as other:
        watching.until("video.start")
        controller.until_chunk(60)
        other.until_chunk(60)
        while not any(metadata["skipped"] for metadata, _ in watching.chunks):
            watching.receive()
        numbers = [metadata["chunk"] for metadata, _ in watching.chunks]
        skipped = watching.chunks[-1][0]["skipped"]
        assert numbers[-1] - numbers[-2] == skipped + 1
        assert skipped >= 8
        assert [metadata["chunk"] for metadata, _ in other.chunks] == list(range(len(other.chunks)))


# What is wrong


NOT_STARTED = ["session.pause", "session.resume", "session.step", "session.reset", "session.stop"]


def test_nothing_malformed_ends_a_connection_or_anybodys_session(server, controller):
    controller.start()
    controller.until_chunk(0)
    with Client(f"{server.url}/v1/realtime/video") as client:
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
    receipt = change(controller, "after", "a dog")
    assert "after" in play_until(controller, receipt["chunk"])["started"]


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
def test_what_no_session_may_have_is_refused(server, fields, code):
    before = len(json.loads(get(server, "/v1/sessions")[1])["data"])
    with Client(f"{server.url}/v1/realtime/video") as client:
        client.send("session.start", **{"prompt": "a fox", "height": 64, "width": 64, **fields})
        error = client.until("error")
        assert code is None or error["code"] == code
        assert "\n" not in error["message"]
    assert len(json.loads(get(server, "/v1/sessions")[1])["data"]) == before


def test_a_second_start_is_refused(controller):
    controller.start()
    assert controller.ask("session.start", prompt="a dog")["code"] == "already_started"
    assert controller.ask("session.attach", session_id="1", token="1")["code"] == "already_started"
    assert controller.ask("watch", token="1")["code"] == "invalid_message"
    assert play_until(controller, 1)["chunk"] >= 1


def test_a_message_that_is_too_large_closes_its_connection_alone(server, controller):
    controller.start()
    with Client(f"{server.url}/v1/realtime/video") as client:
        client.socket.send("a" * (MESSAGE_BYTES + 1))
        with pytest.raises(ConnectionClosed):
            client.receive()
        assert client.socket.close_code == 1009
    assert play_until(controller, 1)["chunk"] >= 1


@pytest.mark.parametrize(
    "path", ["/v1/sessions/none/watch", "/v1/sessions/%2e%2e/watch", "/v1/sessions/none/watch?from=x"]
)
def test_no_such_session(server, path):
    with pytest.raises(Exception) as failed, Client(server.url + path) as client:
        client.send("watch", token="a")
        client.until("error")
        client.receive()
    assert not isinstance(failed.value, TimeoutError)
    assert get(server, "/v1/sessions/none")[0] == 404


def test_whatever_is_sent_is_answered(server, controller):
    """Fuzz: messages of known types with any fields, before and after a start; the server stays, and so do others."""
    controller.start()
    controller.until_chunk(0)
    numbers = itertools.count()
    client = Client(f"{server.url}/v1/realtime/video")

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
            client = Client(f"{server.url}/v1/realtime/video")

    fuzz()
    with suppress(ConnectionClosed):
        client.send("session.stop")
        client.socket.close()
    receipt = change(controller, "after", "a dog")
    assert "after" in play_until(controller, receipt["chunk"])["started"]
    assert "server.fault" not in server.log.read_text()


def test_a_picture_to_start_from_is_shown(server, controller, astronaut):
    import base64

    buffer = io.BytesIO()
    astronaut.resize((64, 64)).save(buffer, "PNG")
    controller.start(image=f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}")
    controller.until_chunk(0)
    configuration = controller.messages[0]["configuration"]
    assert configuration["image"] == "start.png"
