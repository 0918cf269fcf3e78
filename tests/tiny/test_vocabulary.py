"""Unit: what the embedded models are said to know is what their captions say."""

from __future__ import annotations

import random

import pytest

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.request import Request, ScheduledPrompt
from helios_cp.generate.remarks import request_remarks
from helios_cp.tiny import demo
from helios_cp.tiny.captions import caption
from helios_cp.tiny.judging import test_prompts
from helios_cp.tiny.vocabulary import KNOWN, outside, unknown_words
from helios_cp.tiny.world import COLOURS, GROUNDS, SUBJECTS, draw_scene
from helios_cp.weights.presets import preset_folder


def test_captions_are_inside():
    generator = random.Random(0)
    texts = [caption(draw_scene(generator), generator)[0] for _ in range(500)]
    texts += [text for text, _ in test_prompts(30)] + [demo.PROMPT, *demo.CHANGE, demo.FROM_PICTURE]
    assert [text for text in texts if outside(text)] == []


def test_other_words_are_outside():
    prompt = "A red fox, running through fresh snow: a FOX!"
    assert unknown_words(prompt) == ["fox", "running"]
    line = outside(prompt)
    assert "fox, running: outside of the world" in line and KNOWN in line and "\n" not in line
    assert outside("eine Katze läuft über den großen See am Morgen").count("…") == 1


def test_all_that_scenes_show_is_named():
    for word in (*COLOURS, *GROUNDS, *(subject for subject in SUBJECTS if subject != "none")):
        assert word in KNOWN and not outside(word)


@pytest.mark.parametrize(("name", "count"), [("tiny-distilled", 4), ("random-distilled", 0)])
def test_it_is_said_of_embedded_models_alone(name, count, cache, tmp_path):
    """Of a prompt, of a scheduled one, of a picture, and of a size."""
    from PIL import Image

    Image.new("RGB", (128, 64)).save(tmp_path / "a.png")
    checkpoint = Checkpoint.read(preset_folder(name, cache))
    size = {"height": 64, "width": 128}
    requests = [
        Request(prompt=("a red ball",), height=128, width=192),
        Request(prompt=("a fox",), image=str(tmp_path / "a.png"), **size),
        Request(prompt_schedule=(ScheduledPrompt("a red ball", 1), ScheduledPrompt("a lamp", 1)), **size),
    ]
    remarks = request_remarks([request.resolve(checkpoint) for request in requests], checkpoint)
    assert len(remarks) == count
    assert not [line for line in remarks if "red ball" in line]
