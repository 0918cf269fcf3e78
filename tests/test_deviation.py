"""Unit: the benchmark of deviations, on a tiny model. Deviations of made-up videos are known by hand, and exact."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks.deviation import Video, deviation, main, parse_variant
from helios_cp.execution import Execution


def test_a_known_deviation():
    plain = Video(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0]), 1.0)
    other = Video(torch.tensor([3.0, 4.5]), torch.tensor([0.2, 1.0]), 2.0)
    found = deviation(other, plain)
    assert found.latents == 0.1
    assert math.isclose(found.frames, 0.2, rel_tol=1e-6)
    assert math.isclose(found.mean_grey_levels, 25.5, rel_tol=1e-6)
    assert deviation(plain, plain) == type(found)(0.0, 0.0, 0.0)


def test_variants_are_flags_of_the_execution():
    assert parse_variant("--quantize int4 --vae-dtype float16") == Execution(quantize="int4", vae_dtype="float16")
    assert parse_variant("") == Execution()


def test_a_run(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("helios_cp.weights.DEFAULT_CACHE", cache)
    monkeypatch.setattr("helios_cp.presets.DEFAULT_CACHE", cache)
    file = tmp_path / "deviation.json"
    variants = ("--quantize int8", "--quantize int4", "--block-cache 0.1", "--offload model")
    flags = [text for variant in variants for text in ("--variant", variant)]
    assert main([*flags, "--num-frames", "33", "--pyramid-steps", "1", "1", "1", "--output", str(file)]) == 0
    found = json.loads(file.read_text())["results"]["variants"]
    assert list(found) == ["", *variants]
    latents = {name: values["deviation"]["latents"] for name, values in found.items() if "deviation" in values}
    assert latents[""] == latents["--offload model"] == 0
    assert 0 < latents["--quantize int8"] < latents["--quantize int4"] < 1
    sizes = [found[name]["transformer_bytes"] for name in ("", "--quantize int8", "--quantize int4")]
    assert sizes == sorted(sizes, reverse=True)
    assert "too few steps" in found["--block-cache 0.1"]["refused"]
    assert "int8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--variant", "--quantize int3"], "invalid choice: 'int3'"),
        (["--output", "deviation.txt"], "allowed is .json"),
        (["--height", "100"], "--height 100"),
        (["--device", "abacus"], "--device abacus"),
    ],
)
def test_refused_in_one_line(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and expected in lines[0]
