"""Unit: whole videos against diffusers' pipelines (`tests/reference.py` states how those are repaired).

Tolerance: 1e-4 of the range, for latents and frames. In fp32 the two differ by rounding only (a few 1e-6 after three
chunks); a wrong random draw, frame index or step differs by more than 1e-2, as `test_parity_can_fail` shows.
"""

from __future__ import annotations

import functools
import gc

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from benchmarks.models.repaired_diffusers import load_reference, run_reference
from helios_cp.config.errors import RequestError
from helios_cp.config.request import Request, ScheduledPrompt
from helios_cp.model.vae.autoencoder import Autoencoder
from helios_cp.pipeline.pipeline import Pipeline
from helios_cp.pipeline.start import Inputs

NAMES = ("random-base", "random-mid", "random-distilled")
SETTINGS = {
    "random-base": {"num_inference_steps": 4, "guidance_scale": 4.0},
    "random-mid": {"pyramid_num_inference_steps_list": (3, 2, 2), "guidance_scale": 4.0},
    "random-distilled": {"pyramid_num_inference_steps_list": (2, 2, 2), "guidance_scale": 1.0},
}
SIZE = {"height": 64, "width": 64}
OBLONG = {"height": 64, "width": 128}
PROMPT, NEGATIVE = "a red fox in the snow", "blurred"


@pytest.fixture(scope="module")
def ours(presets):
    return {name: Pipeline.from_pretrained(str(presets[name]), dtype=torch.float32) for name in NAMES}


@pytest.fixture(scope="module")
def theirs(presets):
    return {name: load_reference(presets[name]) for name in NAMES}


@pytest.fixture(scope="module")
def media(astronaut, clip):
    return {"t2v": {}, "i2v": {"image": astronaut}, "v2v": {"video": clip}}


def run_ours(pipeline, media=None, output_type="float", prompt=(PROMPT,), **fields):
    fields = {"negative_prompt": NEGATIVE, "seed": (5,), **SIZE, "num_frames": 66, **fields}
    request = Request(prompt=prompt, **fields)
    chunks = list(pipeline.stream(request, Inputs(**(media or {})), output_type=output_type))
    frames = None if output_type == "latent" else torch.cat([chunk.frames for chunk in chunks], 1)
    return torch.cat([chunk.latents for chunk in chunks], 2), frames


def run_theirs(pipeline, monkeypatch, media=None, with_frames=True, **fields):
    fields = {"prompt": PROMPT, "negative_prompt": NEGATIVE, **SIZE, "num_frames": 66, **fields}
    steps = "pyramid_num_inference_steps_list"
    fields |= {name: list(fields[name]) for name in (steps, "history_sizes") if name in fields}
    if "sigmas" in fields:
        fields["sigmas"] = np.array(fields["sigmas"])
    return run_reference(pipeline, fields.pop("seed", 5), monkeypatch, with_frames, **fields, **(media or {}))


def assert_close(result, reference, tolerance=1e-4):
    for mine, other in zip(result, reference, strict=True):
        assert mine.shape == other.shape
        assert (mine - other).abs().max() <= tolerance * (other.max() - other.min())


@pytest.mark.parametrize("task", ["t2v", "i2v", "v2v"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_diffusers(ours, theirs, media, monkeypatch, name, task):
    """From text three chunks: the history fills up from its short end and is all generated at last."""
    fields = {**SETTINGS[name], **OBLONG, "num_frames": 99 if task == "t2v" else 66}
    amplify = {"is_amplify_first_chunk": True} if name == "random-distilled" else {}
    reference = run_theirs(theirs[name], monkeypatch, media[task], **fields, **amplify)
    assert_close(run_ours(ours[name], media[task], **fields, **amplify), reference)


KNOBS = [
    ("random-base", "t2v", {"is_skip_first_chunk": True, "num_frames": 99}),
    ("random-base", "t2v", {"guidance_scale": 1.0}),
    ("random-base", "t2v", {"sigmas": (0.9, 0.5, 0.2), "num_inference_steps": 3}),
    ("random-base", "i2v", {"is_skip_first_chunk": True, "num_frames": 99}),
    ("random-base", "i2v", {"image_noise_sigma_min": 0.3, "image_noise_sigma_max": 0.4}),
    ("random-base", "t2v", {"num_latent_frames_per_chunk": 5, "num_frames": 51}),
    ("random-base", "t2v", {"max_sequence_length": 12}),
    ("random-base", "t2v", {"height": 80, "width": 48}),
    ("random-mid", "t2v", {"use_zero_init": False}),
    ("random-mid", "t2v", {"zero_steps": 0}),
    ("random-mid", "t2v", {"history_sizes": (8, 2, 1)}),
    ("random-mid", "t2v", {"height": 128, "width": 64, "num_frames": 1}),
    ("random-mid", "i2v", {"add_noise_to_image_latents": False}),
    ("random-distilled", "t2v", {"is_amplify_first_chunk": False}),
    ("random-distilled", "t2v", {"pyramid_num_inference_steps_list": (1, 1, 1), "is_amplify_first_chunk": True}),
    ("random-distilled", "v2v", {"add_noise_to_video_latents": False, "is_amplify_first_chunk": False}),
    ("random-distilled", "v2v", {"video_noise_sigma_min": 0.0, "video_noise_sigma_max": 0.9}),
    ("random-distilled", "v2v", {"history_sizes": (4, 2, 1)}),
]


DECODED_OTHERWISE = {"height", "num_latent_frames_per_chunk"}
"""Knobs that change what is decoded; for the others latents are enough."""


@pytest.mark.parametrize(("name", "task", "knobs"), KNOBS, ids=str)
def test_every_knob_equals_diffusers(ours, theirs, media, monkeypatch, name, task, knobs):
    fields = {**SETTINGS[name], **knobs}
    if name == "random-distilled":
        fields.setdefault("is_amplify_first_chunk", False)
    with_frames = bool(knobs.keys() & DECODED_OTHERWISE)
    output_type = "float" if with_frames else "latent"
    reference = run_theirs(theirs[name], monkeypatch, media[task], with_frames, **fields)
    result = run_ours(ours[name], media[task], output_type, **fields)
    compared = 2 if with_frames else 1
    assert_close(result[:compared], reference[:compared])
    if knobs.keys() - {"num_frames", "is_amplify_first_chunk", "height", "width", "num_latent_frames_per_chunk"}:
        default = {key: value for key, value in fields.items() if key not in knobs or key == "num_frames"}
        plain = run_ours(ours[name], media[task], output_type="latent", **{**SETTINGS[name], **default})[0]
        assert (plain - reference[0]).abs().max() > 1e-3, "the knob changes nothing, so this case shows nothing"


@pytest.mark.parametrize(("name", "task"), list(zip(NAMES, ("i2v", "t2v", "i2v"), strict=True)))
def test_bfloat16_no_further_than_diffusers(presets, ours, media, monkeypatch, name, task):
    """Root mean square distance from the fp32 latents; 5 % covers the luck of which values round which way."""
    fields = SETTINGS[name] | ({"is_amplify_first_chunk": False} if name == "random-distilled" else {})
    exact = run_ours(ours[name], media[task], output_type="latent", **fields)[0]
    low = Pipeline.from_pretrained(str(presets[name]), dtype=torch.bfloat16)
    mine = run_ours(low, media[task], output_type="latent", **fields)[0]
    reference = load_reference(presets[name], torch.bfloat16)
    other = run_theirs(reference, monkeypatch, media[task], with_frames=False, **fields)[0]

    def distance(latents):
        return (latents - exact).square().mean().sqrt().item()

    assert 0 < distance(mine) <= 1.05 * distance(other)


@pytest.mark.parametrize("name", NAMES)
def test_parity_can_fail(ours, theirs, monkeypatch, name):
    """One more draw before the first chunk, and the last history frame lost: both are far outside the tolerance."""
    fields = SETTINGS[name] | ({"is_amplify_first_chunk": False} if name == "random-distilled" else {})
    reference = run_theirs(theirs[name], monkeypatch, with_frames=False, **fields)[0]
    assert (run_ours(ours[name], output_type="latent", seed=(6,), **fields)[0] - reference).abs().max() > 0.01
    from helios_cp.pipeline import pipeline as module

    split = module.split_history

    def shifted(state, request):
        history, noisy = split(state, request)
        return history, tuple(index + 1 for index in noisy)

    monkeypatch.setattr(module, "split_history", shifted)
    assert (run_ours(ours[name], output_type="latent", **fields)[0] - reference).abs().max() > 0.01


@pytest.mark.parametrize(("name", "task"), list(zip(NAMES, ("i2v", "t2v", "v2v"), strict=True)))
def test_batch_equals_one_by_one(ours, media, name, task):
    """Each video of a batch has its own seed; diffusers raises for pictures and shares block noise (SPEC)."""
    prompts, seeds = ("a red fox", "an owl at night"), (5, 11)
    output_type = "float" if name == "random-distilled" else "latent"  # decoding is the same for all
    together = run_ours(ours[name], media[task], output_type, prompt=prompts, seed=seeds, **SETTINGS[name])
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = run_ours(ours[name], media[task], output_type, prompt=(prompt,), seed=(seed,), **SETTINGS[name])
        assert_close([part[index : index + 1] for part in together if part is not None], filter(torch.is_tensor, alone))
    assert (together[0][0] - together[0][1]).abs().max() > 0.1


def test_seed_counts_upwards():
    assert Request(prompt=("a", "b", "c"), seed=(7,)).seeds == (7, 8, 9)


def test_interactive_schedule(ours):
    """The blend of each chunk by hand; after the last entry its prompt holds, and no other comes back."""
    pipeline = ours["random-distilled"]
    schedule = (ScheduledPrompt("a fox", 1), ScheduledPrompt("an owl", 3))
    fields = {**SETTINGS["random-distilled"], "seed": (5,), **SIZE}
    request = Request(prompt_schedule=schedule, num_frames=33 * 5, interpolation_steps=3, **fields)
    chunks = list(pipeline.stream(request, output_type="latent"))
    assert len(chunks) == 5
    fox, owl = (_embed(pipeline, text) for text in ("a fox", "an owl"))
    expected = [fox, fox, torch.lerp(fox, owl, 0.5), owl, owl]
    state = None
    for chunk, embeds in zip(chunks, expected, strict=True):
        by_hand = Request(num_frames=33 * 5, **fields)
        again = next(pipeline.stream(by_hand, Inputs(prompt_embeds=embeds), state=state, output_type="latent"))
        torch.testing.assert_close(again.latents, chunk.latents, rtol=0, atol=1e-5)
        state = again.state


def _embed(pipeline, text):
    request = Request(prompt=(text,)).resolve(pipeline.checkpoint)
    return pipeline.encode_prompts(request).embeds


def test_schedule_runs_at_least_as_long_as_its_entries():
    assert Request(prompt_schedule=(ScheduledPrompt("a", 4), ScheduledPrompt("b", 3)), num_frames=33).num_chunks == 7


def test_given_embeddings_and_noise(ours):
    """What a caller computed beforehand gives the same video as computing it here."""
    pipeline = ours["random-mid"]
    fields = {**SETTINGS["random-mid"], "output_type": "latent"}
    reference = run_ours(pipeline, **fields)[0]
    embeds = {"prompt_embeds": _embed(pipeline, PROMPT), "negative_prompt_embeds": _embed(pipeline, NEGATIVE)}
    torch.testing.assert_close(run_ours(pipeline, embeds, prompt=(), **fields)[0], reference)
    noise = torch.randn(1, 16, 18, 8, 8)
    first = run_ours(pipeline, {"latents": noise}, **fields)[0]
    assert (first - reference).abs().max() > 0.1
    torch.testing.assert_close(run_ours(pipeline, {"latents": noise}, **fields)[0], first)


def test_given_media_latents(ours, media):
    """Encoded outside, pictures and clips start the same video, for the noise is drawn in the same order."""
    pipeline = ours["random-base"]
    fields = {**SETTINGS["random-base"], "add_noise_to_image_latents": False, "add_noise_to_video_latents": False}
    for task in ("i2v", "v2v"):
        request = Request(prompt=(PROMPT,), **SIZE, **fields).resolve(pipeline.checkpoint)
        state = pipeline.initial_state(request, Inputs(**media[task]))
        given = {"image_latents": state.anchor}
        given |= {"fake_image_latents": state.history[:, :, -1:]} if task == "i2v" else {}
        given |= {"video_latents": state.history[:, :, 1:]} if task == "v2v" else {}
        restored = pipeline.initial_state(request, Inputs(**given))
        assert torch.equal(restored.anchor, state.anchor)
        assert torch.equal(restored.history[:, :, 1:], state.history[:, :, 1:])
    with pytest.raises(RequestError, match="fake_image_latents"):
        next(pipeline.stream(request, Inputs(image_latents=state.anchor)))


def test_without_first_frame(ours, media):
    """`keep_first_frame=False` raises in diffusers; here the anchor's place goes to one more short frame."""
    for name in NAMES:
        fields = {**SETTINGS[name], "keep_first_frame": False}
        latents, _ = run_ours(ours[name], media["i2v"], "latent", **fields)
        assert latents.isfinite().all()
        assert (latents - run_ours(ours[name], media["i2v"], "latent", **SETTINGS[name])[0]).abs().max() > 1e-3


def noting(encode, encoded: list[int]):
    """The same, with the frames of each call noted."""

    def noted(vae, video, *arguments, **options):
        encoded.append(video.shape[2])
        return encode(vae, video, *arguments, **options)

    return noted


def test_only_visible_clips_are_encoded(ours, theirs, astronaut, monkeypatch):
    """Of five chunks of video three reach into 19 frames of history; the result is that of encoding all."""
    frames = [astronaut.crop((i, 2 * i, i + 90, 2 * i + 90)).resize((32, 32)) for i in range(170)]
    encoded = []
    for kind in (Autoencoder, AutoencoderKLWan):
        monkeypatch.setattr(kind, "encode", noting(kind.encode, encoded))
    fields = {**SETTINGS["random-base"], "height": 32, "width": 32, "num_frames": 33}
    result = run_ours(ours["random-base"], {"video": frames}, **fields)
    assert encoded == [1, 33, 33, 33]
    encoded.clear()
    reference = run_theirs(theirs["random-base"], monkeypatch, {"video": frames}, **fields)
    assert encoded == [1, 33, 33, 33, 33, 33]
    assert_close(result, reference)


def test_chunks_come_as_they_are_ready(ours):
    """The first chunk is decoded and handed over before the second is denoised."""
    pipeline = ours["random-distilled"]
    steps = []
    request = Request(prompt=(PROMPT,), **SIZE, num_frames=99)
    stream = pipeline.stream(request, on_step=steps.append)
    chunk = next(stream)
    assert {step.chunk for step in steps} == {0} and len(steps) == 12
    assert chunk.frames.shape == (1, 33, 64, 64, 3) and chunk.frames.dtype == torch.uint8
    assert chunk.latents.shape == (1, 16, 9, 8, 8) and chunk.latents.dtype == torch.float32
    assert {"text", "media", "denoise_1", "denoise_2", "denoise_3", "decode"} <= chunk.seconds.keys()
    stream.close()


def test_two_streams_at_once_do_not_disturb_each_other(ours):
    pipeline = ours["random-mid"]
    requests = [
        Request(prompt=(text,), **SIZE, **SETTINGS["random-mid"], num_frames=66) for text in ("a fox", "an owl")
    ]
    streams = [functools.partial(pipeline.stream, request, output_type="latent") for request in requests]
    alone = [torch.cat([chunk.latents for chunk in stream()], 2) for stream in streams]
    pairs = zip(*(stream() for stream in streams), strict=True)
    mixed = [torch.cat([chunk.latents for chunk in chunks], 2) for chunks in zip(*pairs, strict=True)]
    assert all(torch.equal(one, other) for one, other in zip(alone, mixed, strict=True))


def live_tensor_bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_memory_does_not_grow_with_length(ours):
    """Live tensors after chunk 3 and after chunk 30 of one video, counted to the byte."""
    pipeline = ours["random-distilled"]
    request = Request(
        prompt=(PROMPT,),
        **SIZE,
        num_frames=9 * 30,
        num_latent_frames_per_chunk=3,
        pyramid_num_inference_steps_list=(1, 1, 1),
    )
    counts = {}
    for chunk in pipeline.stream(request):
        if chunk.index + 1 in (3, 30):
            counts[chunk.index + 1] = live_tensor_bytes()
    assert counts[3] == counts[30]


def test_bad_output_type(ours):
    with pytest.raises(RequestError, match="output_type"):
        next(ours["random-base"].stream(Request(prompt=("a",)), output_type="pil"))
