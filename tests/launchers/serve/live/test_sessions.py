"""Ray: clients that know the protocol alone start sessions, let them go on, pause, reset and end them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from helios_cp.generate.__main__ import main as generate
from tests.launchers.serve.client import FRAMES
from tests.launchers.serve.media.test_fragments import pixels, times
from tests.launchers.serve.uploads.files import data_url, picture

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_client_of_vllm_omnis_protocol_plays_a_video_to_its_end(running_server):
    """Ping, start, read pairs of metadata and bytes, and see the end; nothing of ours is used."""
    with running_server.connect() as client:
        client.send("session.ping")
        client.until("session.pong")
        begun = client.start(model="BestWishYsh/Helios-Distilled", format="m4s", fps=24, num_frames=99, seed=3)
        assert begun["format"] == "m4s"
        assert begun["config"]["width"] == 64
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
    controller.play_until(2)
    shown = times(controller.media())
    assert [round(float(time) * 24) for time in shown] == list(range(len(controller.chunks) * FRAMES))
    for number, (metadata, _) in enumerate(controller.chunks):
        assert (metadata["chunk"], metadata["first_frame"]) == (number, number * FRAMES)
        assert metadata["media_time"] == pytest.approx(number * FRAMES / 24)
        assert metadata["seconds"].keys() >= {"denoise", "decode", "write"}
        assert metadata["fps"] > 0


def test_the_same_session_again_has_the_same_bits(running_server):
    made = []
    for _ in range(2):
        with running_server.connect() as client:
            client.start(num_frames=66, seed=11)
            client.until("session.done")
            made.append(client.media())
    assert made[0] == made[1]


def test_stop_ends_a_session_after_what_has_begun(controller):
    controller.start()
    controller.play_until(1)
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


def test_a_picture_to_start_from_is_shown(controller):
    controller.start(image=data_url(picture()))
    controller.until_chunk(0)
    assert controller.messages[0]["configuration"]["image"] == "start.png"


@pytest.mark.parametrize("lead", [1, 2])
def test_the_maker_is_never_further_ahead_than_the_lead(controller, lead):
    """A player stands in the middle of a chunk. How many chunks have begun is told by the receipt of a change, which is
    for the first chunk that has not."""
    controller.start_at_rest(lead=lead)
    for chunk in range(4):
        controller.stand(chunk + 0.5)
        controller.until_chunk(chunk + lead)
        assert controller.change(f"e{chunk}", "a dog")["chunk"] == chunk + lead + 1


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
    controller.play_until(ready + 1)
    error = controller.ask("session.step")
    assert error["code"] == "invalid_request"


def test_reset_begins_again_in_the_same_session(running_server, controller):
    begun = controller.start(seed=21)
    controller.play_until(1)
    controller.send("session.reset", seed=22, prompt="a dog")
    state = controller.until("session.state", take=1)
    first = state["chunk"]
    controller.play_until(first + 1)
    told = [metadata for metadata, _ in controller.chunks]
    assert [each["chunk"] for each in told] == list(range(len(told)))
    assert [each["take"] for each in told] == [0] * first + [1] * (len(told) - first)
    assert [each["is_reset"] for each in told].index(True) == first
    assert told[first]["prompt"] == "a dog"
    shown = times(controller.media())
    assert [round(float(time) * 24) for time in shown] == list(range(len(told) * FRAMES))
    with running_server.connect() as alone:
        alone.start(seed=22, prompt="a dog", num_frames=FRAMES)
        alone.until("session.done")
        assert np.array_equal(
            pixels(alone.init + alone.chunks[0][1]), pixels(controller.init + controller.chunks[first][1])
        )
    assert json.loads(running_server.download(begun, "schedule.json?take=1"))["seed"] == [22]


def test_an_adapter_of_a_session_is_in_all_its_takes_and_in_its_schedule(
    running_server, presets, tmp_path, monkeypatch
):
    """In turns with a session without one, on the same group; and made again by one process, from the schedule."""
    assert json.loads(running_server.ask("/v1/server")[1])["loras"] == ["ink"]
    lora = {"name": "ink", "scale": 0.5}
    with running_server.connect() as plain, running_server.connect() as client:
        plain.start(seed=31, num_frames=2 * FRAMES)
        begun = client.start_at_rest(seed=31, num_frames=5 * FRAMES, lora=lora)
        assert begun["configuration"]["lora"] == [{"path": "ink.safetensors", "weight": 0.5}]
        plain.play_until(1)
        assert client.change("e1", "a dog", transition_chunks=2)["chunk"] == 2
        client.stand(1.5)
        client.until_chunk(2)
        client.send("session.reset", seed=31, prompt="a red fox")
        assert client.until("session.state", take=1)["chunk"] == 3
        client.play_until(4)
        client.until("session.done")
    shown = [pixels(each.init + each.chunks[chunk][1]) for each, chunk in ((plain, 0), (client, 0), (client, 3))]
    assert not np.array_equal(shown[0], shown[1])
    assert np.array_equal(shown[1], shown[2])
    monkeypatch.chdir(running_server.folder / "loras")  # where the adapter is
    for take in range(2):
        (tmp_path / "schedule.json").write_bytes(running_server.download(begun, f"schedule.json?take={take}"))
        run = tmp_path / str(take)
        flags = ["--prompt-schedule-file", str(tmp_path / "schedule.json"), "--checkpoint-dir", str(run)]
        flags += ["--model", str(presets["random-distilled"]), "--device", "cpu"]
        assert generate([*flags, "--output", str(tmp_path / f"{take}.mp4")]) == 0
        live = running_server.data / "sessions" / begun["session_id"] / f"take-{take:03d}"
        again = sorted(run.glob("chunk-*.mp4"))
        assert len(again) == (3, 2)[take]
        for each in again:  # a take that a reset ended may have a chunk more, which nobody saw
            assert each.read_bytes() == (live / each.name).read_bytes(), each.name


# Coming back


def test_a_controller_that_comes_back_misses_nothing(running_server, controller):
    begun = controller.start()
    controller.play_until(1)
    controller.socket.close()
    with running_server.attached(begun, len(controller.chunks)) as back:
        assert back.messages[-1]["view_token"] == begun["view_token"]
        back.play_until(len(controller.chunks) + 1)
        assert back.chunks[0][0]["chunk"] == len(controller.chunks)
        chunks = [*controller.chunks, *back.chunks]
        whole = controller.init + b"".join(media for _, media in chunks)
        assert [round(float(time) * 24) for time in times(whole)] == list(range(FRAMES * len(chunks)))
        receipt = back.change("e1", "a dog")
        back.play_until(receipt["chunk"])
        back.send("session.stop")
        back.until("session.done")


def test_the_newest_controller_takes_over(running_server, controller):
    begun = controller.start()
    controller.until_chunk(0)
    with running_server.attached(begun) as other:
        with pytest.raises(ConnectionClosed):
            while True:
                controller.receive()
        assert controller.socket.close_code == 1008
        other.send("session.stop")
        other.until("session.done")
