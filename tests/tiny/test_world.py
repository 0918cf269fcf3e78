"""Unit: scenes, captions and rendered clips of the embedded models' world."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from helios_cp.tiny.captions import GROUND_WORDS, NOUNS, TIME_WORDS, caption
from helios_cp.tiny.clips import render
from helios_cp.tiny.latents import subject_mask
from helios_cp.tiny.subjects import COLOURS, PERIOD
from helios_cp.tiny.world import SUBJECTS, Scene, draw_scene, grounds_of

SCENE = Scene("meadow", "day", "car", "red", "right", mirrored=False, x=0.0, size=1.0)


def scenes(count: int = 200, held_out: bool = False) -> list[Scene]:
    generator = random.Random(0)
    return [draw_scene(generator, held_out) for _ in range(count)]


@pytest.mark.parametrize("held_out", [False, True])
def test_held_out_combinations_are_kept_apart(held_out):
    assert {scene.is_held_out for scene in scenes(held_out=held_out)} == {held_out}


def test_scenes_are_possible():
    assert all(scene.ground in grounds_of(scene.subject) for scene in scenes())


def test_captions_say_what_they_are_said_to_say():
    generator = random.Random(1)
    for scene in scenes():
        text, named = caption(scene, generator)
        words = {"ground": GROUND_WORDS, "time": TIME_WORDS, "subject": {**NOUNS, "none": ("",)}}
        for label, synonyms in words.items():
            if named[label] is not None:
                assert any(word in text.lower() for word in synonyms[named[label]]), (label, text)
        for label in ("colour", "direction"):
            assert named[label] is None or named[label] in text.lower()


def test_clips_repeat_after_two_chunks_and_not_after_one():
    first, one, two = (render(SCENE, [start], 64, 96) for start in (3, 3 + PERIOD // 2, 3 + PERIOD))
    np.testing.assert_allclose(first, two, atol=2e-4)  # sines of larger angles, in fp32
    assert np.abs(first - one).max() > 0.2


@pytest.mark.parametrize(("direction", "shift"), [("right", 1), ("left", -1)])
def test_hills_pass_against_the_direction(direction, shift):
    """At 66 pixels of height they move by one pixel a frame."""
    scene = dataclasses.replace(SCENE, direction=direction)
    before, after = (picture[30:39, 2:24] for picture in render(scene, [0, 1], PERIOD, 132))
    moved = np.abs(np.roll(before, -shift, 1) - after)[:, 1:-1].max()
    assert moved < 0.02 < np.abs(np.roll(before, shift, 1) - after)[:, 1:-1].max()


@pytest.mark.parametrize("subject", [name for name in SUBJECTS if name != "none"])
@pytest.mark.parametrize("colour", COLOURS)
def test_subjects_have_their_colour(subject, colour):
    """By day, the mean colour where the subject is lies nearest to the colour that was asked for."""
    scene = dataclasses.replace(SCENE, ground=grounds_of(subject)[0], subject=subject, colour=colour)
    picture = (render(scene, [0], 64, 128)[0] + 1) / 2
    other = dataclasses.replace(scene, colour="blue" if colour == "white" else "white")
    painted = np.abs(picture - (render(other, [0], 64, 128)[0] + 1) / 2).max(-1) > 0.1
    mean = picture[painted].mean(0)
    assert min(COLOURS, key=lambda name: np.abs(mean - COLOURS[name]).sum()) == colour


def test_the_mask_is_where_the_subject_is():
    mask = subject_mask(SCENE, 64, 128)
    assert mask.shape == (2, 1, 9, 8, 16)
    assert mask[..., :4, :].sum() == 0, "a car is in the lower half"
    assert mask[..., 5:7, 6:10].mean() > 0.9
    assert subject_mask(dataclasses.replace(SCENE, subject="none"), 64, 128).sum() == 0
