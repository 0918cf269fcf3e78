"""Unit: prompts to embeddings, and the schedule of an interactive video.

Embeddings are compared bitwise to diffusers: the same operations run in the same order. Blend weights are compared to
`torch.linspace` within 1e-6, since that one counts in fp32.
"""

from __future__ import annotations

import html

import pytest
import regex
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.helios import pipeline_helios
from hypothesis import given
from hypothesis import strategies as st

from helios_cp.config.request import ScheduledPrompt
from helios_cp.model.text import clean, encode_prompts
from helios_cp.pipeline.prompts import prompt_mix

PROMPTS = [
    "a cat",
    "  two\tcats \n on   a mat ",
    "schön \N{SNOWMAN} \N{CJK UNIFIED IDEOGRAPH-732B} e\u0301",
    "l&#39;&eacute;t&eacute; &amp;amp; l&amp;#39;hiver",
    "caf\u00c3\u00a9, \u201cquoted\u201d \ufb01ne",  # UTF-8 read as Latin-1, curly quotes, a ligature
    "",
    "long " * 200,
]


@pytest.fixture(scope="module")
def pipeline(presets):
    return DiffusionPipeline.from_pretrained(presets["random-base"])


def encode(pipeline, prompts, length=64, dtype=torch.float32) -> torch.Tensor:
    return encode_prompts(pipeline.tokenizer, pipeline.text_encoder, prompts, length, dtype)


def reference(pipeline, prompts, length=64, dtype=torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=length, dtype=dtype)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_bitwise_equal_to_diffusers(pipeline, prompt, dtype):
    assert torch.equal(encode(pipeline, [prompt], dtype=dtype), reference(pipeline, [prompt], dtype=dtype))


@pytest.mark.parametrize("length", [1, 7, 512])
def test_a_batch_is_bitwise_equal_to_diffusers(pipeline, length):
    found = encode(pipeline, PROMPTS, length)
    assert found.shape == (len(PROMPTS), length, 32)
    assert torch.equal(found, reference(pipeline, PROMPTS, length))


def test_padding_is_zero_vectors(pipeline):
    (embeds,) = encode(pipeline, ["ab"], length=8)
    assert (embeds[:3] != 0).any(dim=1).all()  # two letters and the end mark
    assert not embeds[3:].any()


def test_the_comparison_notices_padding_that_is_not_zero(pipeline):
    tokens = pipeline.tokenizer(["ab"], padding="max_length", max_length=64, return_tensors="pt")
    with torch.no_grad():
        unmasked = pipeline.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    assert not torch.equal(unmasked, reference(pipeline, ["ab"]))


def test_no_gradient_is_kept(pipeline):
    with torch.enable_grad():
        assert not encode(pipeline, ["a cat"]).requires_grad


EVERY = "".join(map(chr, range(0x110000)))
SPACES = sorted({*filter(str.isspace, EVERY), *regex.findall(r"\s", EVERY)})


@pytest.mark.parametrize("space", SPACES, ids=lambda space: f"U+{ord(space):04X}")
def test_every_white_space_is_cleaned_as_in_diffusers(space):
    for text in (f"a{space}b", f"{space}a{space}{space}b{space}", f"a&#{ord(space)};b", f"a&amp;#{ord(space)};b"):
        assert clean(text) == pipeline_helios.prompt_clean(text)


@given(st.text(max_size=30))
def test_any_text_is_cleaned_as_in_diffusers(text):
    for variant in (text, html.escape(text), html.escape(html.escape(text))):
        assert clean(variant) == pipeline_helios.prompt_clean(variant)


def mix(lengths, steps: int, chunk: int):
    """Of a schedule without transitions, as diffusers has it."""
    return prompt_mix([ScheduledPrompt("a fox", length) for length in lengths], steps, chunk)


def shares_of(mix, count: int) -> list[float]:
    """The share of each of `count` prompts."""
    return [dict(mix).get(index, 0.0) for index in range(count)]


def test_schedule_written_out():
    found = [mix((2, 4, 3), 3, chunk) for chunk in range(11)]
    assert found == [
        *[((0, 1.0),)] * 3,
        ((0, 0.5), (1, 0.5)),
        *[((1, 1.0),)] * 3,
        ((1, 0.5), (2, 0.5)),
        *[((2, 1.0),)] * 3,
    ]


def test_a_single_step_repeats_the_old_prompt_once():
    assert float(torch.linspace(0, 1, steps=1)) == 0.0
    found = [mix((2, 2), 1, chunk) for chunk in range(5)]
    assert found == [((0, 1.0),)] * 3 + [((1, 1.0),)] * 2


def test_an_entry_shorter_than_the_blend():
    found = [mix((1, 2, 1), 5, chunk) for chunk in range(9)]
    assert found == [
        *[((0, 1.0),)] * 2,
        ((0, 0.75), (1, 0.25)),
        ((1, 1.0),),  # the switch to the third prompt starts from the second alone
        ((1, 0.75), (2, 0.25)),  # the last entry goes on, and its blend with it
        ((1, 0.5), (2, 0.5)),
        ((1, 0.25), (2, 0.75)),
        *[((2, 1.0),)] * 2,
    ]


def test_the_last_prompt_holds_and_the_first_never_returns():
    assert {mix((3, 3, 3), 3, chunk) for chunk in range(20, 200)} == {((2, 1.0),)}


def test_transitions_written_out():
    """At once; over four chunks; and a third prompt that breaks the second off, from what was shown then."""
    entries = [("a fox", 2, None), ("an owl", 2, 4), ("a cat", 2, 2), ("a dog", 1, 1)]
    found = [prompt_mix([ScheduledPrompt(*entry) for entry in entries], 3, chunk) for chunk in range(9)]
    assert found == [
        *[((0, 1.0),)] * 2,
        ((0, 0.75), (1, 0.25)),
        ((0, 0.5), (1, 0.5)),
        ((0, 0.25), (1, 0.25), (2, 0.5)),
        ((2, 1.0),),
        *[((3, 1.0),)] * 3,
    ]


schedules = st.lists(st.integers(1, 6), min_size=1, max_size=6)


@given(schedules, st.integers(1, 7), st.integers(0, 40))
def test_weights_are_those_of_linspace(lengths, steps, chunk):
    entry, position = 0, chunk
    while entry < len(lengths) - 1 and position >= lengths[entry]:
        position -= lengths[entry]
        entry += 1
    expected = [0.0] * len(lengths)
    if entry == 0 or position >= steps:
        expected[entry] = 1.0
    else:
        weight = float(torch.linspace(0, 1, steps)[position])
        expected[entry - 1], expected[entry] = 1 - weight, weight
    assert shares_of(mix(lengths, steps, chunk), len(lengths)) == pytest.approx(expected, abs=1e-6)


entries = st.builds(ScheduledPrompt, st.just("a fox"), st.integers(1, 6), st.none() | st.integers(1, 9))


@given(st.lists(entries, min_size=1, max_size=6), st.integers(1, 7), st.integers(0, 40))
def test_shares_sum_to_one_in_order(schedule, steps, chunk):
    found = prompt_mix(schedule, steps, chunk)
    assert sum(share for _, share in found) == pytest.approx(1)
    assert all(0 < share <= 1 for _, share in found)
    assert [index for index, _ in found] == sorted({index for index, _ in found})


@given(st.lists(entries, min_size=1, max_size=6), st.integers(1, 9), st.integers(0, 40))
def test_a_transition_never_jumps(schedule, transition, chunk):
    """From one chunk to the next no share moves by more than a transition's step, whatever a change breaks off."""
    schedule = [ScheduledPrompt(entry.prompt, entry.chunks, max(transition, 2)) for entry in schedule]
    before, after = (shares_of(prompt_mix(schedule, 3, each), len(schedule)) for each in (chunk, chunk + 1))
    assert max(abs(new - old) for old, new in zip(before, after, strict=True)) <= 1 / max(transition, 2) + 1e-9


@pytest.mark.parametrize(
    ("lengths", "steps", "chunk", "named"),
    [((), 3, 0, "at least 1 chunk"), ((2, 0), 3, 0, r"\[2, 0\]"), ((2,), 0, 0, "steps 0"), ((2,), 3, -1, "chunk -1")],
)
def test_bad_schedules_are_refused(lengths, steps, chunk, named):
    with pytest.raises(ValueError, match=named):
        mix(lengths, steps, chunk)
