"""Unit: the training command from the first stage to a checkpoint that diffusers and the engine load, a step each."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from helios_cp.config.errors import RequestError
from helios_cp.config.request import Request
from helios_cp.pipeline.pipeline import Pipeline
from helios_cp.tiny import distill, latents, loop, sample
from helios_cp.tiny.loop import Learner, Rates, average_of
from helios_cp.tiny.train import main
from helios_cp.weights.presets import main as presets
from helios_cp.weights.presets import read_trained

VARIANTS = ("mid", "base", "distilled")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder in which every stage was at work for one step."""
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "SHARD", 2)
        patch.setattr(distill, "SHARD", 2)
        for variant, stages in (("base", 1), ("mid", 3), ("distilled", 3)):
            patch.setitem(sample.STEPS, variant, (1,) * stages)
        assert main(["all", "--output", str(folder), "--steps", "1", "--batch-scale", "0.15"]) == 0
    return folder


def test_every_stage_leaves_its_work(trained):
    for stage in ("text", "encoder", "decoder", "judge", "matched", *VARIANTS):
        assert (trained / stage / "state.safetensors").is_file()
    for variant in VARIANTS:
        assert (trained / f"{variant}.png").stat().st_size > 1000
        report = json.loads((trained / f"{variant}.json").read_text())
        assert set(report["accuracy"]) == {"ground", "time", "subject", "colour", "direction"}
    assert sum(path.stat().st_size for path in (trained / "embed").iterdir()) < 16 * 2**20


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_of_it_loads_and_runs(variant, trained, tmp_path):
    folder = tmp_path / variant
    assert presets(["--write", str(folder), "--preset", f"tiny-{variant}", "--weights", str(trained / "embed")]) == 0
    assert DiffusionPipeline.from_pretrained(folder).transformer.config.num_layers == 4
    assert "random_weights" not in json.loads((folder / "model_index.json").read_text())
    steps = {"num_inference_steps": 2} if variant == "base" else {"pyramid_num_inference_steps_list": (1, 1, 1)}
    request = Request(prompt=("a red ball",), height=64, width=128, num_frames=33, seed=(0,), **steps)
    (chunk,) = Pipeline.from_pretrained(str(folder), device="cpu").stream(request)
    assert chunk.frames.shape == (1, 33, 64, 128, 3)


def test_weights_that_are_no_weights_are_refused(trained, tmp_path, capsys):
    for name in ("mid", "vae", "text_encoder"):
        (tmp_path / f"{name}.safetensors").write_bytes((trained / "embed" / f"{name}.safetensors").read_bytes())
    read_trained(tmp_path, "mid")
    (tmp_path / "vae.safetensors").write_bytes(b"no tensors")
    with pytest.raises(RequestError, match="holds no weights of such a part"):
        read_trained(tmp_path, "mid")
    assert presets(["--write", str(tmp_path / "out"), "--preset", "tiny-base", "--weights", str(tmp_path)]) == 2
    assert "base.safetensors: the file is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mid"], "mid: text, latents must be in"),
        (["text", "--steps", "0"], "--steps 0: give at least 1"),
        (["latents", "--width", "100"], "--width 100: give a multiple of 64"),
        (["decoder", "--init", "nowhere.safetensors"], "--init nowhere.safetensors: give a file that exists"),
        (["paint"], "invalid choice: 'paint'"),
    ],
)
def test_bad_calls_are_refused(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--output", str(tmp_path)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def made_learner() -> Learner:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    return Learner(module, lambda name: name == "0.weight", Rates(0.02, 1e-2))


def run(learner: Learner, state: Path, steps: int) -> None:
    def loss(generator: random.Random):
        target = torch.randn(4, 6) * generator.random()
        return (learner.module(target) - target).square().mean(), {}

    loop.run(learner, loss, state, steps=steps, seed=3)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(Rates, "factor", lambda self, step, steps: 1.0)  # else it would depend on where a run ends
    whole, first, second = (made_learner() for _ in range(3))
    run(whole, tmp_path / "whole.safetensors", 8)
    run(first, tmp_path / "parts.safetensors", 5)
    run(second, tmp_path / "parts.safetensors", 8)
    for name, value in average_of(tmp_path / "whole.safetensors").items():
        assert torch.equal(value, second.average[name])
        assert torch.equal(whole.parameters[name], second.parameters[name])
    assert not torch.equal(whole.average["0.weight"], first.average["0.weight"])
