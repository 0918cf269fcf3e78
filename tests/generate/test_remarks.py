"""Unit: what is told before a video is made, on stderr and in the report, once."""

from __future__ import annotations

import json
from fractions import Fraction

import av
import pytest
from PIL import Image

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.request import Request, ScheduledPrompt
from helios_cp.generate.__main__ import main
from helios_cp.generate.remarks import request_remarks


@pytest.fixture
def checkpoint(presets):
    return Checkpoint.read(presets["random-mid"])


def remarks(checkpoint, **fields) -> list[str]:
    fields = {"prompt": ("a fox",), "height": 64, "width": 64, **fields}
    if "prompt_schedule" in fields:
        del fields["prompt"]
    return request_remarks([Request(**fields).resolve(checkpoint)], checkpoint)


def test_a_prompt_that_is_cut(checkpoint):
    """A word of these is at least one token of the tiny tokenizer."""
    long = "fox " * 600
    assert not remarks(checkpoint)
    (remark,) = remarks(checkpoint, prompt=(long, long))
    assert remark.startswith("prompt 'fox fox") and "cut after 512" in remark
    assert "cut after 8" in remarks(checkpoint, max_sequence_length=8, negative_prompt="blurred " * 9)[0]
    assert remarks(checkpoint, prompt_schedule=(ScheduledPrompt("a fox", 1), ScheduledPrompt(long, 1)))
    assert not remarks(checkpoint, prompt=(long,), max_sequence_length=5000)


def test_a_long_prompt_of_few_tokens_is_no_remark(checkpoint):
    """Its bytes are more than its tokens may be, so it is counted."""
    from transformers import AutoTokenizer

    text = "the fox runs"
    tokens = len(AutoTokenizer.from_pretrained(checkpoint.folder / "tokenizer")(text).input_ids)
    assert not remarks(checkpoint, prompt=(text,), max_sequence_length=tokens)
    assert remarks(checkpoint, prompt=(text,), max_sequence_length=tokens - 1)


def test_a_picture_that_is_stretched(checkpoint, tmp_path):
    Image.new("RGB", (70, 20)).save(tmp_path / "a.png")
    (remark,) = remarks(checkpoint, image=str(tmp_path / "a.png"))
    assert "is stretched to 64 × 64, 3.5 times as high" in remark
    assert not remarks(checkpoint, image=str(tmp_path / "a.png"), resize_mode="crop")


@pytest.mark.parametrize(("text", "rate"), [("30000/1001", "30000/1001"), ("29.97", "2997/100"), ("25", "25")])
def test_frame_rates_of_cameras(cache, tmp_path, monkeypatch, text, rate):
    monkeypatch.setenv("HELIOS_CP_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    request = ["--prompt", "a fox", "--height", "64", "--width", "64", "--num-frames", "33", "--pyramid-steps", "1"]
    assert main([*request, "1", "1", "--fps", text]) == 0
    with av.open("out.mp4") as file:
        assert file.streams.video[0].average_rate == Fraction(rate)


def test_remarks_are_told_once_and_reported(cache, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HELIOS_CP_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (70, 20)).save("wide.png")
    request = [
        "--prompt",
        "a fox",
        "--height",
        "64",
        "--width",
        "64",
        "--num-frames",
        "33",
        "--pyramid-steps",
        "1",
        "1",
    ]
    assert main([*request, "1", "--image", "wide.png", "--report", "report.json"]) == 0
    told = capfd.readouterr().err
    assert told.count("is stretched to 64 × 64") == 1
    assert any("is stretched" in remark for remark in json.loads((tmp_path / "report.json").read_text())["remarks"])
