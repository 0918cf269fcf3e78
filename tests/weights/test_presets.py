"""Unit: the embedded tiny checkpoints.

Timesteps are compared to the three decimals at which they are known. Other numbers are bounds on statistics of random
activations, with a factor of two or more to spare, or exact.
"""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, HeliosTransformer3DModel

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.model.codec import denormalise
from helios_cp.weights import presets
from helios_cp.weights.presets import PRESETS, RANDOM, main, preset_folder, write_preset


@pytest.fixture(scope="module", params=RANDOM)
def folder(request, cache) -> Path:
    return preset_folder(request.param, cache)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_diffusers_loads_it(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    checkpoint = Checkpoint.read(folder)
    assert type(pipeline).__name__ == ("HeliosPyramidPipeline" if checkpoint.is_pyramid else "HeliosPipeline")
    assert type(pipeline.scheduler).__name__ == ("HeliosDMDScheduler" if checkpoint.is_distilled else "HeliosScheduler")
    assert pipeline.scheduler.config.stages == (3 if checkpoint.is_pyramid else 1)
    assert pipeline.tokenizer("ab").input_ids == [100, 101, 1]


def test_variants_are_told_apart(cache):
    read = {name: Checkpoint.read(preset_folder(name, cache)) for name in RANDOM}
    assert {name: c.variant for name, c in read.items()} == {
        "random-base": "base",
        "random-mid": "mid",
        "random-distilled": "distilled",
    }
    assert [name for name, c in read.items() if c.is_cfg_zero_star] == ["random-mid"]
    assert all(c.random_weights for c in read.values())


def test_every_switch_is_on(folder):
    config = Checkpoint.read(folder).transformer
    assert config.dim == 96
    switches = [field.name for field in dataclasses.fields(config) if field.type == "bool"]
    assert len(switches) == 5
    assert all(getattr(config, name) for name in switches)
    assert config.history_scale_mode == "per_head"


def test_weights_are_sharded_safetensors(folder):
    names = contents(folder).keys()
    shards = [name for name in names if name.startswith("transformer/") and name.endswith(".safetensors")]
    assert len(shards) >= 3
    assert "transformer/diffusion_pytorch_model.safetensors.index.json" in names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".ckpt"))]


def test_same_bytes_every_time_and_other_weights_for_each(cache, tmp_path):
    torch.seed()  # the global generator must play no part
    write_preset("random-mid", tmp_path / "again")
    again = contents(tmp_path / "again")
    assert again == contents(preset_folder("random-mid", cache))
    other = contents(preset_folder("random-base", cache))
    weights = [name for name in again if name.endswith(".safetensors")]
    assert all(again[name] != other[name] for name in weights)


def test_distilled_timesteps_at_384x640(cache):
    scheduler = DiffusionPipeline.from_pretrained(preset_folder("random-distilled", cache)).scheduler
    slope = 0.65 / 3840  # of the shift mu over the number of tokens, which is 0.5 at 256
    found = []
    for stage, tokens in enumerate((540, 540, 2160)):
        scheduler.set_timesteps(2, stage, mu=0.5 + slope * (tokens - 256))
        found.append([round(float(t), 3) for t in scheduler.timesteps])
    assert found == [[998.534, 833.964], [742.605, 512.463], [385.147, 174.764]]


def test_timesteps_shift_with_resolution(folder):
    scheduler = DiffusionPipeline.from_pretrained(folder).scheduler
    found = []
    for mu in (0.6, 0.9):
        scheduler.set_timesteps(4, 0, mu=mu)
        found.append(scheduler.timesteps.clone())
    assert not torch.equal(*found)


def transformer_output(model: HeliosTransformer3DModel) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)

    def frames(count: int) -> torch.Tensor:
        return torch.randn(1, 16, count, 8, 8, generator=draw)

    with torch.no_grad():
        return model(
            hidden_states=frames(9),
            timestep=torch.tensor([700]),
            encoder_hidden_states=torch.randn(1, 12, 32, generator=draw),
            indices_hidden_states=torch.arange(20, 29)[None],
            indices_latents_history_short=torch.tensor([[0, 19]]),
            indices_latents_history_mid=torch.tensor([[17, 18]]),
            indices_latents_history_long=torch.arange(1, 17)[None],
            latents_history_short=frames(2),
            latents_history_mid=frames(2),
            latents_history_long=frames(16),
        ).sample


def vae_output(vae: AutoencoderKLWan) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        decoded = vae.decode(torch.randn(1, 16, 3, 2, 2, generator=draw)).sample
        encoded = vae.encode(torch.rand(1, 3, 9, 16, 16, generator=draw) * 2 - 1).latent_dist.parameters
    return torch.cat([decoded.flatten(), encoded.flatten()])


def influences(model, output) -> dict[str, float]:
    """By how much the output moves, relative to its spread, when a parameter is set to its neutral value."""
    reference = output(model)
    found = {}
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        is_scale = name.endswith("gamma") or ("norm" in name and name.endswith(".weight"))
        parameter.data.fill_(1.0 if is_scale else 0.0)
        found[name] = float((output(model) - reference).std() / reference.std())
        parameter.data.copy_(kept)
    return found


def test_every_weight_of_the_transformer_shows(folder):
    found = influences(HeliosTransformer3DModel.from_pretrained(folder / "transformer"), transformer_output)
    assert min(found.values()) > 5e-4, min(found, key=found.get)


def test_every_weight_of_the_vae_shows(folder):
    found = influences(AutoencoderKLWan.from_pretrained(folder / "vae"), vae_output)
    assert min(found.values()) > 5e-4, min(found, key=found.get)


def test_freshly_made_weights_would_not_all_show():
    torch.manual_seed(0)
    found = influences(HeliosTransformer3DModel(**presets.TRANSFORMER), transformer_output)
    assert [name for name, value in found.items() if value == 0]  # norms of exactly 1 and biases of exactly 0


def test_decoded_noise_has_colour_and_range(folder):
    vae = AutoencoderKLWan.from_pretrained(folder / "vae")
    with torch.no_grad():
        latents = denormalise(vae, torch.randn(1, 16, 9, 8, 8, generator=torch.Generator().manual_seed(0)))
        video = vae.decode(latents).sample
    assert video.shape == (1, 3, 33, 64, 64)
    assert 0.2 < video.std() < 0.4
    assert (video.abs() == 1).float().mean() < 0.03
    assert video.std(dim=(2, 3, 4)).min() > 0.1


def test_text_embeddings_tell_prompts_apart(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    (one, _), (other, _) = (pipeline.encode_prompt(text, None, False) for text in ("a cat", "the sea"))
    assert 0.5 < one[0, :5].std() < 2
    assert (one - other)[0, :5].std() > 0.1


def test_a_long_video_stays_finite(cache):
    pipeline = DiffusionPipeline.from_pretrained(preset_folder("random-base", cache))
    pipeline.set_progress_bar_config(disable=True)
    chunks = 6
    latents = pipeline(
        "a cat",
        height=32,
        width=32,
        num_frames=33 * chunks,
        num_inference_steps=2,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(0),
        max_sequence_length=16,
        output_type="latent",
    ).frames
    spreads = [float(chunk.std()) for chunk in latents.chunk(chunks, dim=2)]
    assert len(spreads) == chunks
    assert all(0.5 < spread < 4 for spread in spreads), spreads


def test_a_changed_definition_gets_its_own_folder(cache, monkeypatch):
    before = preset_folder("random-base", cache)
    monkeypatch.setattr(presets, "LAYOUT", presets.LAYOUT + 1)
    after = preset_folder("random-base", cache)
    assert before != after
    assert before.is_dir() and after.is_dir()


def test_digests_are_stable_and_distinct():
    assert len({preset.digest for preset in PRESETS.values()}) == len(PRESETS)
    preset = PRESETS["random-base"]
    assert preset.digest == dataclasses.replace(preset).digest
    assert preset.digest != dataclasses.replace(preset, seed=99).digest


def test_second_use_writes_nothing(cache, monkeypatch):
    folder = preset_folder("random-base", cache)
    monkeypatch.setattr(presets, "write_preset", lambda *_: pytest.fail("written again"))
    assert preset_folder("random-base", cache) == folder


def test_losing_the_race_ends_well(tmp_path, monkeypatch):
    winners = []

    def slow_write(name, target):
        if not winners:  # another process starts later and finishes first
            winners.append(target)
            preset_folder(name, tmp_path)
        write_preset(name, target)

    monkeypatch.setattr(presets, "write_preset", slow_write)
    folder = preset_folder("random-base", tmp_path)
    assert winners
    assert Checkpoint.read(folder).variant == "base"
    assert list(tmp_path.iterdir()) == [folder]


def test_many_writers_at_once(tmp_path):
    barrier, found = threading.Barrier(4), []

    def work():
        barrier.wait()
        found.append(preset_folder("random-base", tmp_path))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert list(tmp_path.iterdir()) == [found[0]]
    assert Checkpoint.read(found[0]).variant == "base"


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def broken_write(_, target):
        target.mkdir()
        (target / "model_index.json").write_text("{")
        raise OSError("disk full")

    monkeypatch.setattr(presets, "write_preset", broken_write)
    with pytest.raises(OSError, match="disk full"):
        preset_folder("random-base", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_command_line_writes_and_lists(tmp_path, capsys):
    assert main(["--write", str(tmp_path / "out"), "--preset", "random-mid"]) == 0
    assert Checkpoint.read(tmp_path / "out").variant == "mid"
    listing = capsys.readouterr().out
    assert "random-mid" in listing
    assert "transformer/diffusion_pytorch_model.safetensors.index.json" in listing


@pytest.mark.parametrize("kind", ["folder with a file", "file"])
def test_command_line_refuses_what_is_there(tmp_path, capsys, kind):
    (tmp_path / "precious.txt").write_text("mine")
    target = tmp_path if kind == "folder with a file" else tmp_path / "precious.txt"
    assert main(["--write", str(target)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert str(target) in captured.err
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("variant", ["base", "mid", "distilled"])
def test_trained_models_are_complete(variant, cache):
    """Beside those of random weights, of which each has one: the same pipeline and scheduler, trained parts."""
    folder = preset_folder(f"tiny-{variant}", cache)
    checkpoint, random = Checkpoint.read(folder), Checkpoint.read(preset_folder(f"random-{variant}", cache))
    assert (checkpoint.variant, checkpoint.is_cfg_zero_star) == (random.variant, random.is_cfg_zero_star)
    assert not checkpoint.random_weights
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert pipeline.vae.config.patch_size == 2
    assert pipeline.transformer.config.num_layers == 4


def test_trained_weights_are_small():
    sizes = [path.stat().st_size for path in presets.EMBEDDED.glob("*.safetensors")]
    assert len(sizes) == 6
    assert sum(sizes) <= 16 * 2**20
