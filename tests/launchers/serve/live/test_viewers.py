"""Ray: those who watch a session, by WebSocket and by its files, and those who may not."""

from __future__ import annotations

import json
from contextlib import ExitStack
from urllib.parse import quote

import av
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from tests.launchers.serve.client import FRAMES, Client
from tests.launchers.serve.conftest import KEY
from tests.launchers.serve.media.test_fragments import pixels, times

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_late_viewer_plays_from_the_newest_chunk(running_server, controller):
    begun = controller.start_at_rest()
    with running_server.viewer(begun) as late:
        start = late.until("video.start")
        assert "control_token" not in start
        late.receive()
        assert late.messages[1]["type"] == "session.state"
        late.until_chunk(1)
        assert [metadata["chunk"] for metadata, _ in late.chunks] == [1]
        assert late.init == controller.init
        assert times(late.media())[0] == pytest.approx(late.chunks[0][0]["media_time"])
        controller.play_until(2)
        late.until_chunk(2)
        assert late.chunks == controller.chunks[1:3]


def test_a_viewer_may_go_back(running_server, controller):
    begun = controller.start()
    controller.play_until(2)
    with running_server.viewer(begun, first=0) as back:
        back.until_chunk(2)
        assert [metadata["chunk"] for metadata, _ in back.chunks] == [0, 1, 2]
        assert len(times(back.media())) == FRAMES * 3


def test_a_viewer_sees_changes_and_the_end_and_steers_nothing(running_server, controller):
    begun = controller.start()
    controller.until_chunk(0)
    with running_server.viewer(begun) as watching:
        watching.until_chunk(0)
        for kind in ("session.pause", "session.stop", "session.reset", "session.position"):
            fields = {"media_time": 9.0} if kind == "session.position" else {}
            assert watching.ask(kind, **fields)["code"] == "forbidden"
        receipt = controller.change("e1", "a dog")
        controller.play_until(receipt["chunk"])
        assert "e1" in watching.until_chunk(receipt["chunk"])["started"]
        controller.send("session.stop")
        assert watching.until("session.done") == controller.until("session.done")


def test_many_viewers_get_every_chunk_once_and_in_order(running_server, controller):
    begun = controller.start_at_rest()
    with ExitStack() as stack:
        viewers = [stack.enter_context(running_server.viewer(begun, first)) for first in 6 * [0, 1]]
        controller.play_until(4)
        for number, each in enumerate(viewers):
            each.until_chunk(4)
            assert [metadata["chunk"] for metadata, _ in each.chunks] == list(range(number % 2, 5))


def test_a_viewer_may_send_its_token_as_a_message_or_in_the_address(running_server, controller):
    begun = controller.start()
    controller.until_chunk(0)
    path = f"{running_server.url}/v1/sessions/{begun['session_id']}/watch"
    with Client(path) as client:
        client.send("watch", token=begun["view_token"])
        client.until_chunk(0)
    with Client(f"{path}?token={begun['view_token']}") as client:
        client.until_chunk(0)


def test_a_wrong_token_opens_nothing_and_a_viewers_does_not_steer(running_server, controller):
    begun = controller.start()
    controller.until_chunk(0)
    session = f"/v1/sessions/{begun['session_id']}"
    for token in ("wrong", "", "a" * 300, "é", "null"):
        with Client(f"{running_server.url}{session}/watch") as client:
            client.send("watch", token=token)
            assert client.until("error")["code"] in ("unauthorized", "invalid_message")
            assert_closed(client)
        with running_server.connect() as client:
            client.send("session.attach", session_id=begun["session_id"], token=token)
            assert client.until("error")["code"] in ("unauthorized", "invalid_message")
    with running_server.connect() as client:
        client.send("session.attach", session_id=begun["session_id"], token=begun["view_token"])
        assert client.until("error")["code"] == "forbidden"
        assert_closed(client)
    assert running_server.ask(f"{session}/hls/live.m3u8")[0] == 401
    assert running_server.ask(session, begun["view_token"], "DELETE")[0] == 403
    assert controller.play_until(1)["chunk"] >= 1


def assert_closed(client: Client) -> None:
    with pytest.raises(ConnectionClosed):
        client.receive()
    assert client.socket.close_code == 1008


@pytest.mark.parametrize(
    "path", ["/v1/sessions/none/watch", "/v1/sessions/%2e%2e/watch", "/v1/sessions/none/watch?from=x"]
)
def test_no_such_session(running_server, path):
    with pytest.raises(Exception) as failed, Client(running_server.url + path) as client:
        client.send("watch", token="a")
        client.until("error")
        client.receive()
    assert not isinstance(failed.value, TimeoutError)
    assert running_server.ask("/v1/sessions/none")[0] == 404


# Files


def test_hls_is_the_same_video_and_no_other_file_is_handed_out(running_server):
    with running_server.connect() as client:
        begun = client.start(num_frames=99, seed=8)
        client.until("session.done")
    files = f"/v1/sessions/{begun['session_id']}/hls"
    path = f"{files}/live.m3u8?token={begun['view_token']}"
    code, text = running_server.ask(path)
    assert code == 200
    assert text.decode().splitlines()[-1] == "#EXT-X-ENDLIST"
    with av.open(running_server.url + path) as container:
        shown = [(frame.time, frame.to_ndarray(format="yuv420p")) for frame in container.decode(video=0)]
    assert [round(time * 24) for time, _ in shown] == list(range(99))
    assert np.array_equal(np.stack([picture for _, picture in shown]), pixels(client.media()))
    for name in ("00099.m4s", "1.m4s", "-0001.m4s", "..%2F..%2Fsession.json", "session.json", "٣.m4s"):
        assert running_server.ask(f"{files}/{quote(name, safe='%')}", begun["view_token"])[0] == 404, name


def test_the_video_can_be_had_while_it_is_made_and_after(running_server, controller):
    begun = controller.start()
    controller.play_until(1)
    assert len(times(running_server.download(begun, "video.mp4"))) % FRAMES == 0
    controller.send("session.stop")
    controller.until("session.done")
    assert np.array_equal(pixels(running_server.download(begun, "video.mp4")), pixels(controller.media()))


def test_sessions_are_listed_without_prompts_and_deleted(running_server, controller):
    begun = controller.start(prompt="a very secret fox")
    controller.until_chunk(0)
    session = f"/v1/sessions/{begun['session_id']}"
    code, text = running_server.ask("/v1/sessions", KEY)
    assert code == 200
    assert b"secret" not in text
    mine = next(each for each in json.loads(text)["data"] if each["id"] == begun["session_id"])
    assert (mine["state"], mine["has_controller"]) == ("running", True)
    code, text = running_server.ask(session, begun["view_token"])
    assert json.loads(text)["configuration"]["prompt"] == ["a very secret fox"]
    code, text = running_server.ask(f"{session}/chunks?from=0", begun["view_token"])
    assert json.loads(text)["data"][0]["chunk"] == 0
    assert running_server.ask(session, "wrong", "DELETE")[0] == 401
    assert running_server.ask(session, begun["control_token"], "DELETE")[0] == 200
    assert controller.until("session.done")["reason"] == "deleted"
    assert running_server.ask(session, begun["control_token"])[0] == 404
    assert "secret" not in running_server.log.read_text()
