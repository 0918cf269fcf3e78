"""Unit: the counts of FLOPs, bytes, kernels and collectives of several layouts and of decoding, and what guards them.

All counts are exact and the same on any machine: one kernel, one message or one byte more is a failure. After a change
that is meant, `python -m benchmarks.guard --update` writes the file anew.
"""

from __future__ import annotations

import copy
import json
from unittest import mock

import pytest

from benchmarks.guard import __main__ as guard
from benchmarks.guard.__main__ import UPDATE, compare, read_expected
from benchmarks.guard.counts import DECODERS, LAYOUTS, STAGE, count_decode, count_layout, count_rank
from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.model import codec
from helios_cp.model.codec import to_frames
from parallel.collectives import Group
from parallel.mesh import Degrees

NARROW = TransformerConfig(
    num_attention_heads=4, attention_head_dim=8, rope_dim=(4, 2, 2), ffn_dim=64, text_dim=64, num_layers=5
)
SMALL = (64, 64)


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_layouts_are_as_expected(degrees):
    expected = read_expected()[f"forward at stage {STAGE}"][str(degrees)]
    assert compare(count_layout(TransformerConfig(), degrees), expected) == [], f"if it is meant: {UPDATE}"


@pytest.mark.parametrize("ranks", DECODERS)
def test_decoding_is_as_expected(ranks):
    expected = read_expected()["decoding of a chunk"][f"vae {ranks}"]
    assert compare(count_decode(ranks), expected) == [], f"if it is meant: {UPDATE}"


def test_deeper_models_are_extrapolated_exactly():
    degrees = Degrees(ring=2, ulysses=2, ffn_tp=2)
    for rank in (0, 3):
        every_block = count_rank(NARROW, degrees, rank, SMALL, 1)
        assert count_layout(NARROW, degrees, SMALL, 1)[f"rank {rank}"] == every_block


def test_a_message_too_many_shows():
    degrees = Degrees(ulysses=2)
    before = count_layout(NARROW, degrees, SMALL, 1)
    once = Group.all_to_all

    def twice(group, *pieces, **options):
        once(group, *pieces, **options)
        return once(group, *pieces, **options)

    with mock.patch.object(Group, "all_to_all", twice):
        changes = compare(count_layout(NARROW, degrees, SMALL, 1), before)
    assert "rank 0, ulysses, collectives: 20, expected 10: +10 (+100 %)" in changes
    assert any(change.startswith("rank 1, ulysses, sent_bytes: ") and "(+100 %)" in change for change in changes)
    assert not any("flops" in change for change in changes)


def test_a_copy_too_many_shows(monkeypatch):
    before = count_decode(2, SMALL)
    monkeypatch.setattr(codec, "to_frames", lambda video, **options: to_frames(video.clone(), **options))
    changes = compare(count_decode(2, SMALL), before)
    assert [change.split(":")[0] for change in changes] == [
        f"rank {rank}, {name}" for rank in (0, 1) for name in ("kernels", "elementwise_bytes")
    ]
    assert ": +1 (+0." in changes[0]


def test_what_is_new_or_gone_is_told():
    assert compare({"a": {"b": 1}, "c": 0}, {"a": {"b": 1}, "d": 2000}) == [
        "d: no longer counted, was 2,000",
        "c: 0, which is new",
    ]
    assert compare({"a": 1}, {"a": 0}) == ["a: 1, expected 0: +1"]


def test_command_line(tmp_path, monkeypatch, capsys):
    expected = read_expected()
    changed = copy.deepcopy(expected)
    changed["forward"]["stage 1"]["kernels"] += 1
    path = tmp_path / "expected.json"
    path.write_text(json.dumps(expected))
    monkeypatch.setattr(guard, "EXPECTED", path)
    monkeypatch.setattr(guard, "count_all", lambda: changed)
    kernels = expected["forward"]["stage 1"]["kernels"]
    assert guard.main([]) == 1
    printed = capsys.readouterr().out
    assert f"forward, stage 1, kernels: {kernels + 1:,}, expected {kernels:,}: +1" in printed and UPDATE in printed
    assert guard.main(["--update"]) == 0 and json.loads(path.read_text()) == changed
    assert guard.main([]) == 0
    assert "every count is as expected" in capsys.readouterr().out


def test_bad_arguments_are_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        guard.main(["--refresh"])
    assert capsys.readouterr().err.count("\n") == 1
