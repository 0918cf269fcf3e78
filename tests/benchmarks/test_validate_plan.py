"""Unit and multi-rank gloo: predicted against measured chunks, on a tiny model.

Errors are exact arithmetic on what was measured; how large they are on a busy machine is not tested.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from benchmarks.ranks.pool import RankError, shared_pool
from benchmarks.validate_plan import __main__ as validate_plan
from benchmarks.validate_plan.__main__ import RANKS, cases, compare, main
from benchmarks.validate_plan.errors import (
    Comparison,
    best_layouts,
    by_kind,
    kind_of,
    layout_name,
    median_error,
    relative_error,
)
from benchmarks.validate_plan.ranks import WARM_UP, ChunkTimes, Model, make_request, time_chunks
from helios_cp.config.checkpoint import Checkpoint, TransformerConfig
from helios_cp.config.layout import Layout, segment_lengths
from helios_cp.plan.choose import make_plan
from helios_cp.plan.hardware import CPU
from helios_cp.plan.predict import Candidate, predict
from helios_cp.plan.vae_cost import VaeConfig
from helios_cp.plan.workload import Workload, part_configs
from parallel.mesh import Degrees

TINY = Model(
    "distilled",
    TransformerConfig(
        num_attention_heads=2, attention_head_dim=16, rope_dim=(8, 4, 4), ffn_dim=64, num_layers=2, text_dim=32
    ),
    VaeConfig(8, 16, (1, 1, 1, 1), 0),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    TINY.write(path)
    return path


@pytest.fixture
def tiny_case(monkeypatch):
    case = next(cases(quick=True))
    tiny = dataclasses.replace(case, model=TINY, layouts=(Layout(), Layout(Degrees(ring=2))))
    monkeypatch.setattr(validate_plan, "cases", lambda quick: iter([tiny]))
    return tiny


def comparison(folder, measured: float, modelled: float | None = None) -> Comparison:
    checkpoint = Checkpoint.read(folder)
    request = make_request((64, 64), (1, 1, 1), "distilled", 2).resolve(checkpoint)
    workload = Workload.of(checkpoint, request, torch.float32)
    prediction = predict(workload, Candidate(Layout()), CPU)
    prediction = dataclasses.replace(prediction, interval=modelled or prediction.interval)
    return Comparison("tiny", Layout(), prediction, ChunkTimes((measured,), ({"decode": measured / 2},)))


def test_errors():
    assert relative_error(1.1, 1.0) == pytest.approx(0.1)
    assert relative_error(0.5, 2.0) == pytest.approx(-0.75)
    for nothing in (0.0, float("nan")):
        with pytest.raises(ValueError, match="more than 0 is needed"):
            relative_error(1.0, nothing)


def test_the_median_is_of_sizes(folder):
    """Errors of −20 %, +10 % and +40 %: the signs do not cancel."""
    found = [comparison(folder, 1.0, modelled) for modelled in (0.8, 1.1, 1.4)]
    assert median_error(found) == pytest.approx(0.2)


def test_a_wrong_prediction_is_seen(folder):
    right = comparison(folder, 1.0)
    honest = dataclasses.replace(right, measured=ChunkTimes((right.modelled.interval,), right.measured.stages))
    wrong = dataclasses.replace(honest.modelled, interval=2 * honest.modelled.interval)
    assert honest.error == 0 and dataclasses.replace(honest, modelled=wrong).error == pytest.approx(1)


def test_kinds_and_choices(folder):
    """The planner takes the ring, where Ulysses was faster by a quarter."""
    times = {Layout(): (4.0, 4.0), Layout(Degrees(ring=2)): (2.0, 2.5), Layout(Degrees(ulysses=2)): (2.2, 2.0)}
    found = [
        dataclasses.replace(comparison(folder, measured, modelled), layout=layout)
        for layout, (modelled, measured) in times.items()
    ]
    kinds = {kind: median_error(each) for kind, each in by_kind(found).items()}
    assert kinds == pytest.approx({"1 rank": 0, "ring": 0.2, "ulysses": 0.1})
    (choice,) = best_layouts(found)
    assert (choice.taken, choice.best) == (Layout(Degrees(ring=2)), Layout(Degrees(ulysses=2)))
    assert (
        choice.lost == pytest.approx(0.25)
        and "ring 2 is taken, ulysses 2 was the best; it costs 25.0%" in choice.sentence
    )
    assert [kind_of(each.layout) for each in found] == ["1 rank", "ring", "ulysses"]


@pytest.mark.parametrize(("factor", "flags", "code"), [(1.0, [], 0), (2.0, [], 1), (2.0, ["--quick"], 0)])
def test_a_missed_goal_is_an_exit_code(folder, tmp_path, monkeypatch, factor, flags, code):
    right = comparison(folder, 1.0)
    seconds = right.modelled.interval / factor
    made = dataclasses.replace(right, measured=ChunkTimes((seconds,), ({"decode": seconds / 2},)))
    monkeypatch.setattr(validate_plan, "compare", lambda *_: iter([made]))
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(CPU.to_json()))
    flags = ["--hardware", str(profile), "--output", str(tmp_path / "validation.json"), *flags]
    assert main(flags, shared_pool()) == code


def test_the_model_is_the_one_that_was_meant(folder):
    checkpoint = Checkpoint.read(folder)
    assert checkpoint.variant == "distilled" and checkpoint.random_weights
    assert dataclasses.replace(checkpoint.transformer, rope_theta=TINY.transformer.rope_theta) == TINY.transformer
    assert part_configs(checkpoint)[0] == TINY.vae
    request = make_request((64, 128), (1, 2, 1), "distilled", 4).resolve(checkpoint)
    workload = Workload.of(checkpoint, request, torch.float32)
    assert [stage.lengths for stage in workload.stages] == segment_lengths(request, checkpoint)
    assert [stage.forwards for stage in workload.stages] == [1, 2, 1] and request.num_chunks == 4


def test_chunks_are_timed_by_the_engine(folder):
    request = make_request((64, 64), (1, 1, 1), "distilled", WARM_UP + 2).resolve(Checkpoint.read(folder))
    for layout in (Layout(), Layout(Degrees(ulysses=2, vae=2)), Layout(Degrees(ulysses=2), shard_weights=True)):
        ranks = layout.degrees.world
        first, *_ = shared_pool().run(time_chunks, str(folder), layout, request, torch.float32, ranks=ranks)
        assert len(first.seconds) == len(first.stages) == 2 and min(first.seconds) > 0
        for seconds, stages in zip(first.seconds, first.stages, strict=True):
            assert {"denoise_1", "denoise_3", "decode"} <= stages.keys() and sum(stages.values()) <= seconds


def test_a_video_of_nothing_is_refused(folder, tmp_path):
    """Weights that are no numbers, whose time says nothing."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    TINY.write(broken)
    (path,) = (broken / "transformer").glob("*.safetensors")
    weights = load_file(path)
    weights["proj_out.bias"] = weights["proj_out.bias"] * float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    request = make_request((64, 64), (1, 1, 1), "distilled", 1).resolve(Checkpoint.read(broken))
    with pytest.raises(RankError, match="is not finite"):
        shared_pool().run(time_chunks, str(broken), Layout(), request, torch.float32, ranks=1)


def test_every_case_is_a_layout_that_the_engine_takes(folder):
    names = set()
    for case in cases(quick=False):
        checkpoint = dataclasses.replace(
            Checkpoint.read(folder), variant=case.model.variant, transformer=case.model.transformer
        )
        request = make_request(case.size, case.steps, case.model.variant, 2).resolve(checkpoint)
        workload = dataclasses.replace(Workload.of(checkpoint, request, case.dtype), vae=case.model.vae)
        for layout in case.layouts:
            names.add(layout_name(layout))
            degrees = layout.degrees
            assert degrees.world <= RANKS
            given = {**vars(degrees), "shard_weights": layout.shard_weights, "decoders": 0}
            plan = make_plan([workload], CPU, degrees.world, given)
            assert [each.candidate.layout for each in plan.fitting] == [layout], (case.name, layout, plan.refused)
    assert names == {
        "1 rank",
        "ulysses 2",
        "ring 2",
        "cfg 2",
        "cfg 2, shard-weights",
        "ulysses 2, ffn-tp 2",
        "ulysses 2, vae 2",
        "ulysses 2, shard-weights",
    }


def test_comparisons_keep_what_was_measured(tiny_case):
    found = list(compare(shared_pool(), CPU, [tiny_case], 1))
    assert [each.layout for each in found] == list(tiny_case.layouts)
    for each in found:
        assert each.error == each.modelled.interval / each.measured.seconds[0] - 1
        assert 0 < each.decode < each.seconds


def test_the_result_is_whole(tiny_case, tmp_path, capsys):
    profile, output = tmp_path / "profile.json", tmp_path / "validation.json"
    profile.write_text(json.dumps(CPU.to_json()))
    flags = ["--hardware", str(profile), "--chunks", "2", "--output", str(output)]
    code = main(flags, shared_pool())
    results = json.loads(output.read_text())["results"]
    errors = [abs(each["modelled_seconds"] / each["measured_seconds"] - 1) for each in results["comparisons"]]
    assert results["median_error"] == pytest.approx(sum(errors) / 2)
    assert results["met"] == (results["median_error"] <= results["goal"]) == (code == 0)
    assert set(results["median_error_by_kind"]) == {"1 rank", "ring"}
    assert [each["case"] for each in results["best_layouts"]] == [tiny_case.name]
    assert results["hardware"] == json.loads(profile.read_text()) and results["calibration"] is None
    assert all(len(each["measured"]["seconds"]) == 2 for each in results["comparisons"])
    printed = capsys.readouterr().out
    for text in ("1 rank", "ring 2", "modelled", "measured", "median error", "by kind of layout", "is taken"):
        assert text in printed


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--hardware", "tpu"], "--hardware tpu: allowed are"),
        (["--hardware", "nowhere.json"], "cannot be read"),
        (["--chunks", "0"], "--chunks 0: must be 1 or more"),
        (["--chunks", "few"], "no whole number"),
        (["--output", "result.txt"], "allowed is .json"),
        (["--layouts"], "unrecognized"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(flags, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(flags, shared_pool())
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
