"""Unit: what a forward of Helios-14B costs, counted on meta tensors; nothing here depends on the machine.

FLOPs are exact. Those of diffusers must round to the figures of the cost model, which were worked out apart from this
code, and its bytes come within 0.5 % of them, half a unit in their last digit. Ours must equal `expected_counts.json`
exactly: a change of one kernel or one byte is a regression, or a gain to be written down with the command below.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import HeliosTransformer3DModel

from benchmarks.guard.__main__ import UPDATE, compare, read_expected
from benchmarks.models.forward_counts import COST_MODEL, SIZE, count_every_layer, count_forward
from benchmarks.models.models import STAGES, TEXT_TOKENS
from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.model import layers, transformer
from helios_cp.model.transformer import HeliosTransformer

CONFIG = TransformerConfig()
NOISY = {1: 540, 2: 2160, 3: 8640}
HISTORY = {"short": 1920, "mid": 240, "long": 240}
PATCH_VOLUME = {"short": 4, "mid": 32, "long": 256}
MOST_OF_DIFFUSERS_BYTES = 0.37


@pytest.fixture(scope="module")
def counts():
    return count_forward(CONFIG)


@pytest.mark.parametrize("stage", STAGES)
def test_diffusers_costs_what_the_cost_model_says(counts, stage):
    theirs, model = counts.theirs[stage], COST_MODEL[stage]
    assert round(theirs.flops / 1e12, 1) == model.teraflops
    assert theirs.elementwise_bytes / 1e9 == pytest.approx(model.eager_gigabytes, rel=5e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_ours_is_diffusers_without_the_repeated_work(counts, stage):
    """Text, history, the t = 0 rows, and the history rows of the last block, which nothing reads."""
    dim, ffn, layers = CONFIG.dim, CONFIG.ffn_dim, CONFIG.num_layers
    text = 2 * TEXT_TOKENS * (CONFIG.text_dim * dim + dim * dim) + layers * 4 * TEXT_TOKENS * dim * dim
    patches = 2 * dim * CONFIG.in_channels * sum(HISTORY[name] * PATCH_VOLUME[name] for name in HISTORY)
    zero_timestep = 2 * (CONFIG.freq_dim * dim + dim * dim + 6 * dim * dim)
    old = sum(HISTORY.values())
    last_block = old * (4 * dim * dim + 4 * dim * ffn) + 4 * old * (old + NOISY[stage]) * dim
    assert (counts.per_prompt.flops, counts.per_chunk.flops, counts.first_use.flops) == (text, patches, zero_timestep)
    saved = counts.theirs[stage].flops - counts.ours[stage].flops
    assert saved == text + patches + zero_timestep + last_block


@pytest.mark.parametrize("stage", STAGES)
def test_ours_moves_less(counts, stage):
    ours, theirs = counts.ours[stage], counts.theirs[stage]
    assert ours.elementwise_bytes <= MOST_OF_DIFFUSERS_BYTES * theirs.elementwise_bytes
    assert ours.matrix_bytes < theirs.matrix_bytes and ours.kernels < theirs.kernels
    assert ours.elementwise_bytes / 1e9 > COST_MODEL[stage].fused_gigabytes, (
        "less than can be: something is not counted"
    )


def test_ours_is_as_expected(counts):
    assert compare(counts.ours_to_json(), read_expected()["forward"]) == [], f"if it is meant: {UPDATE}"


def test_depth_is_extrapolated_exactly():
    config = dataclasses.replace(CONFIG, num_layers=6)
    assert count_forward(config, SIZE, (2,)) == count_every_layer(config, SIZE, (2,))


def test_parameters():
    with torch.device("meta"):
        models = HeliosTransformer(CONFIG), HeliosTransformer3DModel(**dataclasses.asdict(CONFIG))
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [14_312_427_584] * 2


def test_one_more_copy_shows(monkeypatch):
    """A modulated norm that copies its input first, as a careless edit might: in two blocks and at the output."""
    config = dataclasses.replace(CONFIG, num_layers=2)
    before = count_forward(config, SIZE, (1,)).ours[1]
    norm = layers.modulated_norm
    for module in (layers, transformer):
        monkeypatch.setattr(module, "modulated_norm", lambda states, *rest: norm(states.clone(), *rest))
    excess = count_forward(config, SIZE, (1,)).ours[1] - before
    tokens, noisy = sum(HISTORY.values()) + NOISY[1], NOISY[1]
    assert excess.kernels == 5 and excess.flops == 0
    assert excess.elementwise_bytes == (3 * tokens + 2 * noisy) * CONFIG.dim * (2 + 2)
