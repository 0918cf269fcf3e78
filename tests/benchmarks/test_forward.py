"""Unit: the tools around a benchmark (machine, timing) and the command line of `benchmarks.forward` on a tiny model.

No time is compared with another: clocks of a busy machine prove nothing. The two models' outputs agree within 1e-5 of
their range in fp32, the tolerance of `test_transformer`.
"""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.forward import __main__ as forward
from benchmarks.forward.times import pick_case
from benchmarks.measuring import timing
from benchmarks.measuring.machine import CHECKOUT, commit, write_result
from benchmarks.measuring.timing import Timing, interleave, ratio

CPU = torch.device("cpu")


def test_results_say_where_they_come_from(tmp_path):
    path = write_result("speed", {"answer": 42}, tmp_path / "new")
    assert path == tmp_path / "new" / "speed.json" and [path] == list(path.parent.iterdir())
    content = json.loads(path.read_text())
    assert content["results"] == {"answer": 42} and content["command"].startswith("python ")
    assert content["versions"]["torch"] == torch.__version__ and content["machine"]["cores"] >= 1
    assert content["date"].endswith("+00:00") and str(CHECKOUT) not in content["command"].split()[0]


def test_no_commit_outside_a_checkout(tmp_path):
    assert commit(tmp_path) is None


def test_turns_alternate_and_the_warm_up_is_dropped(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    calls = []
    times = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, CPU, warmup=1)
    assert calls == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert times == {"a": Timing((1, 1, 1)), "b": Timing((1, 1, 1))}
    with pytest.raises(ValueError, match="two or more"):
        interleave({}, 1, CPU)


def test_medians_quartiles_and_ratios():
    slow, fast = Timing((4.0, 2.0, 30.0, 6.0, 8.0)), Timing((2.0, 1.0, 10.0, 3.0, 4.0))
    assert slow.median == 6 and slow.quartiles == (4, 8)
    assert ratio(slow, fast).median == 2 and ratio(slow, fast).quartiles == (2, 2)  # the slow spell hit both


def test_width_and_depth_of_the_timed_model():
    config = pick_case(CPU, layers=2, heads=4).config
    assert (config.num_layers, config.dim, config.ffn_dim) == (2, 256, 1024)
    full = pick_case(torch.device("cuda"))
    assert (full.config.dim, full.config.num_layers, full.size, full.stages) == (5120, 40, (384, 640), (1, 2, 3))


def test_command_line(tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.json"
    assert forward.main(["--layers", "1", "--heads", "1", "--repeats", "2", "--output", str(output)]) == 0
    results = json.loads(output.read_text())["results"]
    stage = results["times"]["stage 3"]
    assert stage["difference"] <= 1e-5 and len(stage["ours"]["seconds"]) == 2
    assert 0 < stage["flops"]["ours"] < stage["flops"]["diffusers"]
    assert results["counts"]["ours"].keys() > results["counts"]["diffusers"].keys() == {"stage 1", "stage 2", "stage 3"}
    printed = capsys.readouterr().out
    assert "stage 3: ours" in printed and "speedup" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeats", "1"], "--repeats: 1: must be a whole number, 2 or more"),
        (["--layers", "many"], "--layers: many: must be a whole number, 1 or more"),
        (["--output", "out.txt"], "--output out.txt"),
        (["--device", "nonsense"], "--device nonsense"),
    ],
)
def test_bad_arguments_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        forward.main(flags)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
