"""Unit: which prompts' keys and values a rank makes and keeps."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.execution import Execution
from helios_cp.config.request import Request, ScheduledPrompt
from helios_cp.pipeline.parallelize import SplitBranches
from helios_cp.pipeline.pipeline import Pipeline

REQUEST = Request(
    prompt_schedule=tuple(ScheduledPrompt(text, 1) for text in ("a fox", "an owl", "a cat")),
    interpolation_steps=1,
    height=64,
    width=64,
    num_frames=99,  # a new prompt holds from its second chunk on, so only one change is seen
    pyramid_num_inference_steps_list=(2, 1, 1),
    guidance_scale=3.0,
)


@pytest.mark.parametrize("execution", [Execution(), Execution(block_cache=1e-9)], ids=["plain", "block cache"])
def test_old_keys_and_values_go_before_new_ones_are_made(presets, monkeypatch, execution):
    """At 14B they are 0.42 GB. Nobody holds them: no loop, no cache of blocks."""
    pipeline = Pipeline.from_pretrained(
        Checkpoint.read(presets["random-mid"]), dtype=torch.float32, execution=execution
    )
    encode, made = pipeline.transformer.encode_text, []

    def watched(embeds, number):
        assert not [earlier for earlier, key in made if earlier == number and key() is not None]
        text = encode(embeds, number)
        made.append((number, weakref.ref(text.keys_values[0][0])))
        return text

    monkeypatch.setattr(pipeline.transformer, "encode_text", watched)
    assert len(list(pipeline.stream(REQUEST, output_type="latent"))) == 3
    assert [number for number, _ in made] == [1, 0, 0]


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_encodes_both_branches_and_keeps_its_own(presets, monkeypatch, rank):
    pipeline = Pipeline.from_pretrained(Checkpoint.read(presets["random-mid"]), dtype=torch.float32)
    pipeline.branches = SplitBranches(SimpleNamespace(rank=rank))
    encode, made = pipeline.transformer.encode_text, []

    def watched(embeds, number):
        text = encode(embeds, number)
        made.append((number, weakref.ref(text.keys_values[0][0])))
        return text

    monkeypatch.setattr(pipeline.transformer, "encode_text", watched)
    with torch.no_grad():
        prompts = pipeline.encode_prompts(REQUEST.resolve(pipeline.checkpoint))
        for chunk in range(3):
            (text,) = prompts.at(chunk)
            assert text.number == rank
            assert prompts.at(chunk) == [text]
    del text
    assert [number for number, _ in made] == [1, 0, 0]
    assert [number for number, key in made if key() is not None] == [rank]
