"""Unit: the benchmark of quality. Figures of made-up videos are known by hand; a short run shows that all is there."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from benchmarks.quality import reconstruction
from benchmarks.quality.__main__ import main
from benchmarks.quality.cases import CASES, Case, parse
from benchmarks.quality.figures import contrast, drift, likeness, motion, sharpness
from benchmarks.report.data import read_results
from benchmarks.report.quality_section import quality_section
from helios_cp.tiny.clips import render
from helios_cp.tiny.judge import compare, embedded_judge, name
from helios_cp.tiny.judging import test_prompts
from helios_cp.tiny.world import draw_scene
from helios_cp.weights.load import load_vae, resolve


def grey(value: float, frames: int = 33) -> np.ndarray:
    return np.full((frames, 64, 128, 3), value, np.uint8)


def test_motion_is_inside_chunks():
    video = np.concatenate([grey(0), grey(100)])
    assert motion(video) == 0
    video[1:33:2] += 4  # every step of the first chunk is of 4 levels
    assert motion(video) == pytest.approx(2)


def test_drift_of_a_video_that_fades():
    stripes = grey(100)
    stripes[..., ::2, :] += 80
    faded = ((stripes.astype(float) - 140) / 2 + 120).astype(np.uint8)
    found = drift([np.concatenate([stripes, grey(0), faded])])
    assert found["colour"] == pytest.approx(20)
    assert found["contrast"] == pytest.approx(0.5) and found["sharpness"] == pytest.approx(0.5)
    assert contrast(stripes) == pytest.approx(40, rel=1e-3) and sharpness(stripes) == pytest.approx(80, rel=1e-3)


def test_likeness():
    noise = np.random.default_rng(0).integers(0, 200, (9, 64, 128, 3)).astype(np.uint8)
    assert likeness([noise], [noise]) == {"psnr": None, "ssim": pytest.approx(1)}
    other = likeness([noise + 10], [noise])
    assert other["psnr"] == pytest.approx(20 * np.log10(25.5), abs=1e-3) and 0.9 < other["ssim"] < 1


def test_the_vae_alone(cache, monkeypatch):
    """Against diffusers' class on the same weights, whose bytes differ by rounding alone; a VAE with another decoder
    is seen to be worse."""
    monkeypatch.setattr("helios_cp.weights.load.DEFAULT_CACHE", cache)
    monkeypatch.setattr("helios_cp.weights.presets.DEFAULT_CACHE", cache)
    found = reconstruction.reconstruction(1, torch.device("cpu"))
    scene = draw_scene(random.Random(reconstruction.SEED), held_out=True)
    clip = render(scene, range(66), 64, 128)
    vae = AutoencoderKLWan.from_pretrained(resolve(reconstruction.MODEL).folder / "vae")
    with torch.no_grad():
        chunks = torch.from_numpy(clip.reshape(2, 33, 64, 128, 3)).permute(0, 4, 1, 2, 3)
        decoded = vae.decode(vae.encode(chunks).latent_dist.mean).sample.permute(0, 2, 3, 4, 1).flatten(0, 1).numpy()
    expected = likeness([reconstruction.to_bytes(decoded)], [reconstruction.to_bytes(clip)])
    assert found["psnr"] == pytest.approx(expected["psnr"], abs=0.01)
    assert found["seam_rendered"] < found["seam"]

    def broken(*arguments):
        made = load_vae(*arguments)
        made.post_quant_conv.weight.mul_(0.5)
        return made

    monkeypatch.setattr(reconstruction, "load_vae", broken)
    assert reconstruction.reconstruction(1, torch.device("cpu"))["psnr"] < found["psnr"] - 3


def test_the_embedded_classifier_reads_rendered_clips():
    """It is above 90 % on single pairs of frames; of ten clips it may misread one."""
    judge = embedded_judge()
    right = []
    for _, scene in test_prompts(10):
        video = ((render(scene, range(33), 64, 128) + 1) * 127.5).round().astype(np.uint8)
        right.append(compare(name(judge, video), scene))
    for label in ("ground", "time", "subject", "colour"):
        assert np.mean([each[label] for each in right]) >= 0.9


def test_cases_are_flags_of_the_program():
    for case in CASES:
        parse(case)
    request, execution, dtype = parse(Case("tiny-mid", "--quantize int8 --dtype bfloat16 --match-seams"))
    assert (execution.quantize, str(dtype), request.match_seams) == ("int8", "torch.bfloat16", True)


def test_a_run(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("helios_cp.weights.load.DEFAULT_CACHE", cache)
    monkeypatch.setattr("helios_cp.weights.presets.DEFAULT_CACHE", cache)
    file = tmp_path / "quality.json"
    cases = ("tiny-distilled", "tiny-distilled --match-seams", "tiny-distilled --block-cache 0.1")
    flags = [text for case in cases for text in ("--case", case)]
    assert main([*flags, "--prompts", "2", "--drift", "1", "2", "--output", str(file)]) == 0
    results = json.loads(file.read_text())["results"]
    plain, matched, refused = results["cases"].values()
    assert set(plain["accuracy"]) == {"ground", "time", "subject", "colour", "direction"} and "psnr" not in plain
    assert matched["seam"] < plain["seam"] and matched["psnr"] > 20
    assert "refused" in refused
    long = results["drift"]["tiny-distilled"]
    assert long["1"]["colour"] == 0 < long["2"]["colour"] and long["1"]["seam"] is None
    assert (tmp_path / "quality.png").stat().st_size > 1000
    assert [path.name for path in sorted((tmp_path / "quality").iterdir())] == [
        "tiny-distilled-match-seams.jpg",
        "tiny-distilled.jpg",
    ]
    assert results["vae"]["clips"] == 2 and results["vae"]["psnr"] > 20
    section = quality_section(read_results(tmp_path)[0]["quality"])
    assert (
        "| `tiny-distilled --match-seams` | " in section
        and "| rendered clips | " in section
        and "(quality/tiny-distilled.jpg)" in section
        and f"PSNR {results['vae']['psnr']:.2f} dB" in section
    )
    more = ["--case", "tiny-distilled --pyramid-steps 1 1 1", "--prompts", "2", "--output", str(file)]
    assert main([*more, "--keep"]) == 0
    kept = json.loads(file.read_text())["results"]["cases"]
    assert list(kept) == [*cases, "tiny-distilled --pyramid-steps 1 1 1"]


def test_an_unknown_model_is_refused(capsys):
    with pytest.raises(SystemExit) as refusal:
        main(["--case", "BestWishYsh/Helios-Base"])
    assert refusal.value.code == 2 and "--case BestWishYsh/Helios-Base" in capsys.readouterr().err
