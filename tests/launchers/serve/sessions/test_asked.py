"""Unit: from a client's fields to a request."""

from __future__ import annotations

import pytest

from helios_cp.config.execution import Adapter
from helios_cp.weights.load import resolve
from launchers.serve.flags import ServeCall
from launchers.serve.loras import Loras
from launchers.serve.problems import Refusal
from launchers.serve.sessions.asked import request_of

CALL = ServeCall(longest=10.0, pixels=128 * 128, request={"height": 64, "width": 128, "seed": (5,), "fps": 24})
LORAS = Loras({"ink": "/loras/ink.safetensors", "motion": "/loras/motion"})


@pytest.fixture(scope="module")
def checkpoint(presets):
    return resolve(str(presets["random-distilled"]), None, weights=())


@pytest.fixture(scope="module")
def base(presets):
    return resolve(str(presets["random-base"]), None, weights=())


def test_what_a_client_does_not_say_is_the_servers(checkpoint):
    asked = request_of({"prompt": "a fox"}, CALL, checkpoint, LORAS)
    assert asked.request.prompt == ("a fox",)
    assert (asked.request.height, asked.request.width, asked.request.seed) == (64, 128, (5,))
    assert asked.request.pyramid_num_inference_steps_list == (2, 2, 2)


def test_without_a_length_it_goes_on_as_long_as_the_server_allows(checkpoint):
    asked = request_of({"prompt": "a fox"}, CALL, checkpoint, LORAS)
    assert asked.is_endless
    assert asked.request.num_frames == 33 * 7  # of 10 s at 24 frames a second


def test_what_a_client_says_counts(checkpoint):
    fields = {"height": 128, "width": 64, "seed": 9, "num_frames": 40, "fps": 16, "negative_prompt": None}
    asked = request_of(
        {"prompt": "a fox", "pyramid_num_inference_steps_list": [1, 2, 1], **fields}, CALL, checkpoint, LORAS
    )
    request = asked.request
    assert not asked.is_endless
    assert (request.height, request.width, request.seed, request.num_frames, request.fps) == (128, 64, (9,), 40, 16)
    assert request.pyramid_num_inference_steps_list == (1, 2, 1)


def test_fields_of_other_servers_are_passed_over_and_named(checkpoint):
    asked = request_of({"prompt": "a fox", "flow_shift": 5, "extra_params": {}}, CALL, checkpoint, LORAS)
    assert asked.ignored == ("extra_params", "flow_shift")


def test_adapters_are_chosen_by_name(checkpoint):
    def chosen(lora):
        return request_of({"prompt": "a fox", "lora": lora}, CALL, checkpoint, LORAS).request.lora

    ink, motion = Adapter("/loras/ink.safetensors"), Adapter("/loras/motion", -0.5)
    assert chosen("ink") == chosen(["ink"]) == chosen({"name": "ink"}) == (ink,)
    assert chosen([{"name": "motion", "scale": -0.5}, "ink"]) == (motion, ink)
    assert chosen({"name": "motion", "scale": 2}) == (Adapter("/loras/motion", 2.0),)
    assert chosen(None) is None, "the server's own"
    assert chosen([]) == (), "not even the server's own"


REFUSED = [
    ({"lora": "none"}, "invalid_request", "lora: 'none' is unknown; allowed are ink, motion"),
    ({"lora": "/loras/ink.safetensors"}, "invalid_request", "unknown"),
    ({"lora": "../loras/ink"}, "invalid_request", "unknown"),
    ({"lora": ""}, "invalid_request", "unknown"),
    ({"lora": "x" * 1000}, "invalid_request", "unknown"),
    ({"lora": 7}, "invalid_request", "lora: a name"),
    ({"lora": True}, "invalid_request", "lora: a name"),
    ({"lora": {}}, "invalid_request", "lora: a name"),
    ({"lora": {"path": "/etc/passwd"}}, "invalid_request", "lora: a name"),
    ({"lora": {"name": "ink", "path": "/etc/passwd"}}, "invalid_request", "lora: a name"),
    ({"lora": {"name": "ink", "weight": 1}}, "invalid_request", "lora: a name"),
    ({"lora": {"name": ["ink"]}}, "invalid_request", "unknown"),
    ({"lora": [["ink"]]}, "invalid_request", "lora: a name"),
    ({"lora": ["ink", "ink"]}, "invalid_request", "twice"),
    ({"lora": ["ink"] * 9}, "invalid_request", "8 at most"),
    *(
        ({"lora": {"name": "ink", "scale": scale}}, "invalid_request", "scale")
        for scale in (float("nan"), float("inf"), -float("inf"), 10.01, -11, 10**400, "1", True, None, [])
    ),
    ({"colour": 1}, "invalid_request", "colour"),
    ({"x" * 1000: 1}, "invalid_request", "x"),
    ({"prompt_schedule": []}, "invalid_request", "prompt_schedule"),
    ({"height": 63}, "invalid_request", "height 63"),
    ({"height": -64}, "invalid_request", "height"),
    ({"height": "64"}, "invalid_request", "height"),
    ({"height": 64.5}, "invalid_request", "height"),
    ({"height": True}, "invalid_request", "height"),
    ({"height": 10**30}, "invalid_request", "height"),
    ({"height": 640, "width": 640}, "invalid_request", "pixels"),
    ({"num_frames": 0}, "invalid_request", "num_frames"),
    ({"num_frames": 10**9}, "invalid_request", "10 at most"),
    ({"fps": 0}, "invalid_request", "fps"),
    ({"fps": float("nan")}, "invalid_request", "fps"),
    ({"fps": float("inf")}, "invalid_request", "fps"),
    ({"fps": []}, "invalid_request", "fps"),
    ({"seed": -1}, "invalid_request", "seed"),
    ({"seed": [1, 2]}, "invalid_request", "seed"),
    ({"seed": 2**64}, "invalid_request", "seed"),
    ({"seed": "7"}, "invalid_request", "seed"),
    ({"num_inference_steps": 4}, "invalid_request", "num_inference_steps"),
    ({"pyramid_num_inference_steps_list": [1]}, "invalid_request", "pyramid"),
    ({"pyramid_num_inference_steps_list": "1"}, "invalid_request", "pyramid"),
    ({"history_sizes": [1]}, "invalid_request", "history"),
    ({"num_latent_frames_per_chunk": 0}, "invalid_request", "num_latent"),
    ({"num_latent_frames_per_chunk": 10**12}, "invalid_request", "num_latent"),
    ({"negative_prompt": 7}, "invalid_request", "negative_prompt"),
    ({"resize_mode": "up"}, "invalid_request", "resize"),
    ({"guidance_scale": "much"}, "invalid_request", "guidance_scale"),
]


@pytest.mark.parametrize(("fields", "code", "named"), REFUSED)
def test_what_no_session_may_have_is_refused_in_one_line(checkpoint, fields, code, named):
    with pytest.raises(Refusal) as refused:
        request_of({"prompt": "a fox", **fields}, CALL, checkpoint, LORAS)
    assert refused.value.code == code
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_a_checkpoint_decides_what_may_be_given(base):
    assert request_of({"prompt": "a fox", "num_inference_steps": 4}, CALL, base, LORAS).request.num_inference_steps == 4
    with pytest.raises(Refusal, match="pyramid"):
        request_of({"prompt": "a fox", "pyramid_num_inference_steps_list": [1, 1, 1]}, CALL, base, LORAS)
