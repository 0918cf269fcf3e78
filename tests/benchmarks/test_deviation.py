"""Unit: the benchmark of deviations, on a tiny model. Deviations of made-up videos are known by hand, and exact."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks.deviation.__main__ import main
from benchmarks.deviation.videos import VARIANTS, Video, compare, default_variants, deviation, parse_variant
from benchmarks.report.data import read_results
from benchmarks.report.deviation_section import deviation_section
from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.execution import Execution
from helios_cp.config.request import Request
from helios_cp.pipeline.pipeline import Pipeline


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
    monkeypatch.setattr("helios_cp.weights.load.DEFAULT_CACHE", cache)
    monkeypatch.setattr("helios_cp.weights.presets.DEFAULT_CACHE", cache)
    file = tmp_path / "deviation.json"
    variants = ("--quantize int8", "--quantize int4", "--block-cache 0.1", "--offload model")
    flags = [text for variant in variants for text in ("--variant", variant)]
    steps = ["--pyramid-steps", "1", "1", "1"]
    assert main([*flags, "--model", "random-distilled", "--num-frames", "33", *steps, "--output", str(file)]) == 0
    (run,) = json.loads(file.read_text())["results"]["runs"]
    assert (run["model"], run["size"], run["chunks"], run["steps"]) == ("random-distilled", [64, 64], 1, [1, 1, 1])
    found = run["variants"]
    assert list(found) == ["", *variants]
    latents = {name: values["deviation"]["latents"] for name, values in found.items() if "deviation" in values}
    assert latents[""] == latents["--offload model"] == 0
    assert 0 < latents["--quantize int8"] < latents["--quantize int4"] < 1
    sizes = [found[name]["transformer_bytes"] for name in ("", "--quantize int8", "--quantize int4")]
    assert sizes == sorted(sizes, reverse=True)
    assert "too few steps" in found["--block-cache 0.1"]["refused"]
    assert "int8" in capsys.readouterr().out
    results, problems = read_results(tmp_path)
    section = deviation_section(results["deviation"])
    title = "random-distilled, random weights, 64 × 64, 1 chunk(s) of [1, 1, 1] steps, bfloat16:"
    assert not problems and title in section
    assert "| `--quantize int8` | " in section and "| `--block-cache 0.1`: refused, " in section


def test_a_variant_that_fails_costs_the_others_nothing(presets):
    """Its failure stands in place of its figures; that of the plain one is raised."""
    checkpoint = Checkpoint.read(presets["random-distilled"])
    request = Request(prompt=("a",), height=64, width=64, num_frames=33, pyramid_num_inference_steps_list=(1, 1, 1))
    fine, told = [Execution(), Execution(tf32=False)], []

    def build(execution: Execution) -> Pipeline:
        if execution not in fine:
            raise MemoryError("the card\nis full")
        return Pipeline.from_pretrained(checkpoint, execution=execution)

    variants = ["--compile", "--no-tf32"]
    found = compare(variants, build, request.resolve(checkpoint), on_result=lambda *each: told.append(each))
    assert told == list(found.items()) and found["--compile"] == {"failed": "MemoryError: the card is full"}
    assert found["--no-tf32"]["deviation"]["latents"] == 0
    fine.clear()
    with pytest.raises(MemoryError):
        compare(variants, build, request.resolve(checkpoint))


def test_each_checkpoint_has_the_flags_that_go_with_it(presets, cache, tmp_path, monkeypatch):
    """Distilled has no block cache; a CPU neither TF32 nor graphs. Nothing that is compared by default is refused."""
    distilled, mid = (Checkpoint.read(presets[name]) for name in ("random-distilled", "random-mid"))
    cpu = torch.device("cpu")
    cached = [variant for variant in VARIANTS if "block-cache" in variant]
    others = [variant for variant in VARIANTS if variant not in (*cached, "--no-tf32", "--cuda-graphs")]
    assert default_variants(distilled, cpu) == others
    assert set(default_variants(mid, cpu)) == {*others, *cached}
    for capability, added in (((7, 5), {"--cuda-graphs"}), ((9, 0), {"--cuda-graphs", "--no-tf32"})):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
        fp8 = {"--quantize fp8"} if capability < (9, 0) else set()
        assert set(default_variants(distilled, torch.device("cuda"))) == {*others, *added} - fp8


def test_steps_that_the_cache_shortens_are_counted(cache, tmp_path, monkeypatch):
    """A threshold that no change reaches: of 3 stages of 3 steps, the first of each is made in full."""
    monkeypatch.setattr("helios_cp.weights.load.DEFAULT_CACHE", cache)
    monkeypatch.setattr("helios_cp.weights.presets.DEFAULT_CACHE", cache)
    file = tmp_path / "deviation.json"
    flags = ["--model", "random-mid", "--variant=--block-cache 1e9", "--pyramid-steps", "3", "3", "3"]
    assert main([*flags, "--num-frames", "33", "--output", str(file)]) == 0
    found = json.loads(file.read_text())["results"]["runs"][0]["variants"]
    assert found[""]["skipped_steps"] is None and found[""]["steps"] == 9
    assert found["--block-cache 1e9"]["skipped_steps"] == 4  # CFG-Zero* leaves out the first two of the first stage
    assert found["--block-cache 1e9"]["deviation"]["latents"] > 0
    assert "| 4 of 9 |" in deviation_section(read_results(tmp_path)[0]["deviation"])


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
