"""Unit and multi-rank gloo: the attention benchmark on small shapes; its GPU test is skipped without a card.

No time is compared with another; rates and shares are checked on given times. Bytes and FLOPs are exact. Outputs agree
within 1e-5 of their range in fp32, where only the order of additions differs; the benchmark refuses to time others.
"""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import sdpa_flop_count

from benchmarks.attention import engines as attention_engines
from benchmarks.attention import ranks as attention_ranks
from benchmarks.attention.engines import Shape, absent_engines, time_engines
from benchmarks.attention.ranks import Case, RankTimes, algorithms, rows, time_algorithms
from benchmarks.measuring.timing import Timing
from benchmarks.ranks.pool import RankError, shared_pool
from benchmarks.report.data import read_results
from benchmarks.report.sections import attention_section
from parallel.mesh import Degrees
from parallel.ulysses import UlyssesAttention

attention = pytest.importorskip("benchmarks.attention.__main__")  # which prints with rich

SMALL = Shape(37, heads=6, head_dim=16)  # neither tokens nor heads divide over 4 ranks
CPU = torch.device("cpu")


def test_flops_are_those_of_torchs_counter():
    assert Shape(48, 3, 16).flops == sdpa_flop_count((1, 3, 48, 16), (1, 3, 48, 16), (1, 3, 48, 16))


def test_engines_are_timed_beside_a_product_and_give_the_same():
    found = list(time_engines([SMALL], CPU, repeats=2))
    assert [(each.engine, each.gives_lse, each.dtype) for each in found] == [
        ("native", gives_lse, dtype) for dtype in (torch.float32, torch.bfloat16) for gives_lse in (False, True)
    ]
    assert all(each.rate == SMALL.flops / each.timing.median > 0 and each.product_rate > 0 for each in found)
    assert found[1].difference < 1e-5 and found[2].difference < 2e-2
    assert set(absent_engines(CPU)) == {"cudnn", "flash"}


def test_every_grid_of_the_ranks():
    assert algorithms(4) == {
        "Ulysses 4": Degrees(ulysses=4),
        "unified 2 × 2": Degrees(ring=2, ulysses=2),
        "ring 4": Degrees(ring=4),
    }


def test_shares_of_the_limits():
    """One rank takes 8 s; halves 4 s without messages and 5 s with; products of 10 FLOPs 1 s, or two at once 2 s."""
    seconds = {"1 rank": 8.0, "2 shares at once": 4.0, "Ulysses 2": 5.0, "ring 2": 8.0}
    seconds |= {"product": 1.0, "product, 2 at once": 2.0}
    timings = {name: Timing((value, value)) for name, value in seconds.items()}
    ranks = [RankTimes(timings, {"Ulysses 2": (2, sent), "ring 2": (1, 10)}, product_flops=10) for sent in (100, 300)]
    shape = Shape(2, heads=1, head_dim=5)  # 80 FLOPs
    found = {row.name: row for row in rows(Case(shape, (2,), torch.float32), ranks)}
    one, split = found["1 rank"], found["Ulysses 2"]
    assert (one.rate, one.of_product, one.of_shares, one.speedup, one.calls) == (10.0, 1.0, 1.0, 1.0, 0)
    assert (split.rate, split.of_product, split.of_shares, split.speedup) == (16.0, 1.6, 0.8, 1.6)
    assert (split.calls, split.sent_bytes) == (2, 200.0)


def _time_wrongly(rank):
    def shuffled(self, out, heads):
        return torch.zeros(1, self.query_lengths[self.group.rank], 6, 16)

    with mock.patch.object(UlyssesAttention, "_to_tokens", shuffled):
        return time_algorithms(rank, Case(SMALL, (2,), torch.float32), 2)


def test_a_wrong_output_is_not_timed():
    with pytest.raises(RankError, match="Ulysses 2: the output differs from that of one rank"):
        shared_pool().run(_time_wrongly, ranks=2)


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention_engines, "ON_CPU", (SMALL,))
    monkeypatch.setattr(attention_ranks, "ON_CPU", Shape(32, heads=4, head_dim=16))
    output = tmp_path / "attention.json"
    assert attention.main(["--repeats", "2", "--ranks", "2", "4", "--output", str(output)], shared_pool()) == 0
    results = json.loads(output.read_text())["results"]
    programs = results["shared"]["programs"]
    elements = 32 * 4 * 16
    assert programs["Ulysses 2"]["collectives"] == 2 and programs["ring 4"]["collectives"] == 3
    assert programs["Ulysses 2"]["sent_bytes"] == 4 * elements // 2 // 2 * 4  # 4 SD/P · (U − 1)/U in fp32
    assert programs["ring 4"]["sent_bytes"] == 2 * elements // 4 * 3 * 4  # 2 SD/P · (R − 1)
    assert list(programs) == [
        *("1 rank", "2 shares at once", "Ulysses 2", "ring 2"),
        *("4 shares at once", "Ulysses 4", "unified 2 × 2", "ring 4"),
    ]
    assert len(results["engines"]) == 4 and "needs a CUDA device" in results["engines that cannot run"]["flash"]
    assert "unified 2 × 2" in capsys.readouterr().out
    found, problems = read_results(tmp_path)
    assert not problems and "| unified 2 × 2 |" in attention_section(found["attention"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path):
    """Every engine that is installed; several ranks share the card over gloo where there is only one."""
    output = tmp_path / "attention.json"
    flags = ["--device", "cuda", "--tokens", "256", "--repeats", "2", "--ranks", "2", "--output", str(output)]
    with mock.patch.object(attention_ranks, "ON_GPU", Shape(256, heads=4)):
        assert attention.main(flags, shared_pool()) == 0
    results = json.loads(output.read_text())["results"]
    assert {each["dtype"] for each in results["engines"]} == {"bfloat16", "float16", "float32"}
    assert max(each["difference"] for each in results["engines"]) < 2e-2
    assert "ring 2" in results["shared"]["programs"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeats", "1"], "--repeats 1: must be 2 or more"),
        (["--tokens", "0"], "--tokens 0: allowed is 1 to 1000000"),
        (["--ranks", "1"], "--ranks 1: allowed is 2 to 8"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--output", "out.txt"], "--output out.txt"),
    ],
)
def test_bad_arguments_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        attention.main(flags)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
