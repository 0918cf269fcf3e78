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
from helios_cp.tiny import components, decoder, forward, initial, text, vae
from helios_cp.tiny.clips import render
from helios_cp.tiny.forward import Past, embed_text, velocity
from helios_cp.tiny.loop import Learner, Rates
from helios_cp.tiny.world import draw_scene


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    model = initial.make_transformer()
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
@pytest.mark.parametrize("layer", range(3))
def test_fresh_weights_copy_the_last_frame(monkeypatch, layer):
    """One head of a layer looks where its token is, one frame before the chunk, and at no other frame."""
    torch.manual_seed(0)
    model, shares = initial.make_transformer(), []

    def look(query, key, value, bias=None):
        if bias is None:
            scores = torch.einsum("bshd,bthd->bhst", query, key) / query.shape[-1] ** 0.5
            shares.append(scores.softmax(-1)[:, initial.COPYING_HEAD])
        return torch.zeros_like(query).flatten(2)

    monkeypatch.setattr(forward, "_attend", look)
    past = Past(torch.randn(1, 16, 19, 8, 16), torch.randn(1, 16, 1, 8, 16))
    text = embed_text(model, torch.randn(1, 4, 64), torch.ones(1, 4))
    velocity(model, torch.randn(1, 16, 9, 8, 16), torch.tensor([500.0]), text, past)
    noisy, tokens = 9 * 32, shares[layer].shape[-1]
    last = shares[layer][0, -noisy:, tokens - noisy - 32 : tokens - noisy].unflatten(0, (9, 32))
    assert last.sum(-1).min() > 0.9
    assert last.diagonal(dim1=1, dim2=2).min() > 0.5


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
def basis():
    """Components and what they are divided by."""
    found, deviations = components.principal_components(16, seed=0, scenes=20)
    return found, components.scales_of(deviations)


@pytest.fixture
def codec(basis):
    torch.manual_seed(0)
    made = vae.make_vae()
    components.set_encoder(made, *basis)
    return made


def clip(frames: int) -> torch.Tensor:
    """`[1, 3, T, 64, 128]`"""
    return torch.from_numpy(render(draw_scene(random.Random(1)), range(frames), 64, 128)).permute(3, 0, 1, 2)[None]


@torch.no_grad()
def test_the_vae_in_training_is_the_vae_of_diffusers(codec):
    """Left out while training are only products with zeros."""
    plain = AutoencoderKLWan(**vae.CONFIG)
    plain.load_state_dict(codec.state_dict())
    latents = codec.encode(clip(9)).latent_dist.mean
    assert latents.shape == (1, 16, 3, 8, 16)
    torch.testing.assert_close(latents, plain.encode(clip(9)).latent_dist.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        vae.decode(codec, latents).clamp(-1, 1), plain.decode(latents).sample, atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_latents_are_principal_components(codec, basis):
    """Of squares of 8 × 8 pixels, in the mean over a latent's frames. The activation bends them by a hundredth."""
    found, scales = basis
    flat = found.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(16), atol=1e-5, rtol=0)
    squares = clip(9)[0].unfold(2, 8, 8).unfold(3, 8, 8)
    expected = torch.einsum("kcab,cthwab->kthw", found, squares) / scales.view(-1, 1, 1, 1)
    expected = torch.stack([frames.mean(1) for frames in expected.split([1, 4, 4], 1)], 1)
    latents = codec.encode(clip(9)).latent_dist.mean[0]
    assert latents.std() > 0.5
    torch.testing.assert_close(latents, expected, atol=5e-3, rtol=0.02)


@torch.no_grad()
def test_a_still_clip_has_still_latents(codec):
    """Else the first frame of every chunk would be coded otherwise than the rest; unequal taps show what that is."""
    still = clip(1).expand(-1, -1, 9, -1, -1)
    latents = codec.encode(still).latent_dist.mean
    torch.testing.assert_close(latents, latents[:, :, :1].expand_as(latents), atol=1e-4, rtol=1e-4)
    codec.encoder.down_blocks[1].time_conv.weight[:16, :, 1] *= 0.5
    latents = codec.encode(still).latent_dist.mean
    assert (latents - latents[:, :, :1]).abs().max() > 0.05


def test_the_vae_stays_local_as_it_learns(codec):
    """What 3×3×3 convolutions would take from earlier frames is 0 before and after a step of either optimiser."""
    codec.requires_grad_(False)
    codec.decoder.requires_grad_(True)
    learner = Learner(codec, vae.is_matrix, Rates())
    before = codec.decoder.mid_block.resnets[0].conv1.weight.clone()
    learner.update((vae.decode(codec, torch.randn(1, 16, 2, 4, 8)) - 1).square().mean(), steps=100)
    cubes = [layer for layer in codec.modules() if getattr(layer, "kernel_size", None) == (3, 3, 3)]
    assert len(cubes) > 5
    assert all(not layer.weight[:, :, :2].any() for layer in cubes)
    assert not torch.equal(before, codec.decoder.mid_block.resnets[0].conv1.weight)


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


def test_the_decoder_is_trained_alone_and_on_what_follows(codec):
    generator = random.Random(0)
    before, after = decoder.draw_neighbours(generator, pixels=1)
    assert before.shape[2] in (9, 13) and after.shape[2] == 5
    codec.requires_grad_(False)
    codec.decoder.requires_grad_(True)
    loss, figures = decoder.training_loss(codec, generator)
    loss.backward()
    assert all(parameter.grad is None for parameter in codec.encoder.parameters())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in codec.decoder.parameters())
    assert set(figures) == {"psnr", "psnr_first", "border"}
