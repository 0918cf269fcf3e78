"""Unit: the parts of the embedded models as training sees them, against diffusers' classes and the engine's model.

Equal arithmetic in fp32 in another order: differences of 1e-4 of values near 1.
"""

from __future__ import annotations

import random

import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import ByT5Tokenizer

from helios_cp.model.conditions import History
from helios_cp.tiny import decoder, forward, text, vae
from helios_cp.tiny.forward import Past, embed_text, velocity
from helios_cp.tiny.loop import Learner, Rates


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    model = forward.make_transformer()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def inputs():
    torch.manual_seed(1)
    past = Past(torch.randn(2, 16, 19, 8, 12), torch.randn(2, 16, 1, 8, 12))
    mask = torch.tensor([[1] * 20, [1] * 12 + [0] * 8])
    return torch.randn(2, 16, 9, 4, 6), torch.tensor([300.0, 700.0]), torch.randn(2, 20, 64), mask, past


def engine_velocity(model, noisy, timestep, states, mask, past):
    padded = torch.nn.functional.pad(states * mask[..., None], (0, 0, 0, forward.TEXT_LENGTH - states.shape[1]))
    long, mid, short = past.history.split([16, 2, 1], 2)
    indices = tuple(range(29))
    history = model.encode_history(
        History(torch.cat([past.anchor, short], 2), (0, 19), mid, indices[17:19], long, indices[1:17])
    )
    return model(noisy, timestep, model.encode_text(padded), history, indices[20:])


@torch.no_grad()
def test_velocity_is_that_of_the_engine(transformer):
    noisy, timestep, states, mask, past = inputs()
    ours = velocity(transformer, noisy, timestep, embed_text(transformer, states, mask), past)
    engines = engine_velocity(transformer, noisy, timestep, states, mask, past)
    assert engines.std() > 0.1
    torch.testing.assert_close(ours, engines, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_padding_of_the_text_counts(transformer):
    noisy, timestep, states, mask, past = inputs()
    tokens, bias = embed_text(transformer, states, mask)
    without = velocity(transformer, noisy, timestep, (tokens[:, :-1], bias[..., :-1]), past)
    engines = engine_velocity(transformer, noisy, timestep, states, mask, past)
    assert (without - engines).abs().max() > 1e-2


def test_gradients_reach_every_parameter(transformer):
    noisy, timestep, states, mask, past = inputs()
    velocity(transformer, noisy, timestep, embed_text(transformer, states, mask), past).square().mean().backward()
    assert [name for name, p in transformer.named_parameters() if p.grad is None or not p.grad.any()] == []
    transformer.zero_grad(set_to_none=True)


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    return vae.make_vae()


@torch.no_grad()
def test_the_vae_in_training_is_the_vae_of_diffusers(codec):
    """Left out while training are only products with zeros."""
    plain = AutoencoderKLWan(**vae.CONFIG)
    plain.load_state_dict(codec.state_dict())
    video = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    latents = codec.encode(video).latent_dist.mean
    assert latents.shape == (1, 16, 3, 4, 6)
    torch.testing.assert_close(latents, plain.encode(video).latent_dist.mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        vae.decode(codec, latents).clamp(-1, 1), plain.decode(latents).sample, atol=1e-5, rtol=1e-4
    )


def test_the_vae_stays_local_as_it_learns(codec):
    """What 3×3×3 convolutions would take from earlier frames is 0 before and after a step of either optimiser."""
    learner = Learner(codec, vae.is_matrix, Rates())
    loss, figures = vae.training_loss(codec, random.Random(0))
    before = codec.decoder.mid_block.resnets[0].conv1.weight.clone()
    learner.update(loss, steps=100)
    cubes = [layer for layer in codec.modules() if getattr(layer, "kernel_size", None) == (3, 3, 3)]
    assert len(cubes) > 5
    assert all(not layer.weight[:, :, :2].any() for layer in cubes)
    assert not torch.equal(before, codec.decoder.mid_block.resnets[0].conv1.weight)
    assert figures["psnr"] > 0


def test_still_latents_that_differ_in_time_cost(codec):
    still, moving = torch.randn(1, 16, 1, 4, 6).expand(-1, -1, 3, -1, -1), torch.randn(1, 16, 3, 40, 60)
    assert vae.still_loss(still) == pytest.approx(0, abs=1e-6)
    assert vae.still_loss(moving) == pytest.approx(2 / 3, abs=0.01)
    assert vae.still_loss(0.1 * moving) == pytest.approx(2 / 3, abs=0.01), "small latents are no way out"


def test_tokens_are_those_of_byt5():
    texts = ["a red balloon", "über", ""]
    expected = ByT5Tokenizer()(texts, return_tensors="pt", padding=True)
    ids, mask = text.tokenize(texts)
    assert torch.equal(ids, expected.input_ids)
    assert torch.equal(mask, expected.attention_mask)


def test_the_text_encoder_learns_to_name():
    """What few captions say is learned by heart in a few steps: the loss falls by a third."""
    torch.manual_seed(0)
    reader = text.Reader()
    learner = Learner(reader, text.is_matrix, Rates(0.02, 3e-3))
    losses = []
    for _ in range(20):
        torch.manual_seed(1)
        loss, _ = text.training_loss(reader, random.Random(0), count=6)
        learner.update(loss, steps=100)
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 2 / 3


def test_errors_of_latents_are_half_smooth():
    """As large as noise of variance 1, and alike in neighbours, which white noise is not."""
    torch.manual_seed(0)
    errors = decoder.errors_like(torch.zeros(64, 16, 3, 8, 16))
    assert errors.square().mean() == pytest.approx(1, abs=0.15)
    alike = (errors[..., 1:] * errors[..., :-1]).mean() / errors.square().mean()
    assert 0.3 < alike < 0.7


def test_the_decoder_is_trained_alone_and_on_what_follows():
    generator = random.Random(0)
    before, after = decoder.draw_neighbours(generator, pixels=1)
    assert before.shape[2] in (9, 13) and after.shape[2] == 5
    made = vae.make_vae()
    made.requires_grad_(False)
    made.decoder.requires_grad_(True)
    loss, figures = decoder.training_loss(made, torch.ones(16), generator)
    loss.backward()
    assert all(parameter.grad is None for parameter in made.encoder.parameters())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in made.decoder.parameters())
    assert set(figures) == {"psnr", "psnr_first", "border"}
