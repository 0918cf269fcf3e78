"""Unit: seams of chunks that are decoded alone, and the bits of a video that goes on.

Single values have a tolerance of 1e-6 for fp32, and of one grey level for rounding.
"""

from __future__ import annotations

import pytest
import torch

from helios_cp.config.request import Request
from helios_cp.model.seams import BLOCKS, FRAMES, match_seam
from helios_cp.pipeline.pipeline import Pipeline


@pytest.fixture(scope="module")
def pipeline(presets):
    return Pipeline.from_pretrained(str(presets["random-distilled"]), dtype=torch.float32)


def test_a_change_of_light_fades_in():
    """Frames of one grey after frames of another: the first is that of before, and the ninth is as it was."""
    before, frames = torch.full((1, 64, 128, 3), 0.25), torch.full((1, 33, 64, 128, 3), 0.75)
    values = match_seam(frames, before)[0, :, 0, 0, 0]
    expected = torch.cat([0.75 - 0.5 * (1 - torch.arange(FRAMES) / FRAMES), torch.full((33 - FRAMES,), 0.75)])
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)
    whole = match_seam((frames * 255).to(torch.uint8), (before * 255).to(torch.uint8))
    assert whole.dtype == torch.uint8
    torch.testing.assert_close(whole[0, :, 0, 0, 0].float(), 255 * expected, atol=1, rtol=0)


def test_a_first_frame_that_is_off_by_itself_is_all_that_changes():
    before, frames = torch.full((1, 64, 64, 3), 0.5), torch.full((1, 9, 64, 64, 3), 0.5)
    frames[:, 0] = 0.9
    torch.testing.assert_close(match_seam(frames, before), torch.full_like(frames, 0.5), atol=1e-6, rtol=0)


def test_details_stay():
    """A pattern that is finer than the blocks is not taken over."""
    before, frames = torch.full((1, 64, 64, 3), 0.5), torch.full((1, 9, 64, 64, 3), 0.5)
    before[:, ::2] += 0.2
    before[:, 1::2] -= 0.2
    assert BLOCKS <= 32
    torch.testing.assert_close(match_seam(frames, before), frames, atol=1e-6, rtol=0)


def test_pixels_stay_in_their_range():
    bright = torch.full((1, 5, 48, 80, 3), 250, dtype=torch.uint8)
    bright[:, :, :24] = 0
    matched = match_seam(bright, torch.full((1, 48, 80, 3), 255, dtype=torch.uint8))
    assert matched[0, 0].min() > 100 and matched[0, 0].max() == 255


@pytest.mark.parametrize("output_type", ["uint8", "float"])
def test_a_video_that_goes_on_has_the_same_bits(pipeline, output_type):
    """From the state between two chunks, which holds latents and no frames."""
    request = Request(
        prompt=("a fox", "an owl"), height=64, width=64, num_frames=99, pyramid_num_inference_steps_list=(1, 1, 1)
    )
    plain = [chunk.frames for chunk in pipeline.stream(request, output_type=output_type)]
    matching = Request(**{**request.__dict__, "match_seams": True})
    chunks = list(pipeline.stream(matching, output_type=output_type))
    assert torch.equal(chunks[0].frames, plain[0])
    for index in (1, 2):
        expected = match_seam(plain[index], plain[index - 1][:, -1])
        assert torch.equal(chunks[index].frames, expected) and not torch.equal(expected, plain[index])
    (last,) = pipeline.stream(matching, state=chunks[1].state, output_type=output_type)
    assert torch.equal(last.frames, chunks[2].frames)
    assert all(torch.equal(chunk.latents, other.latents) for chunk, other in zip(chunks[2:], [last], strict=True))
