"""Unit: what a client may send, and that all else is refused in one line that never repeats it at length."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launchers.serve.problems import PROBLEMS, Refusal
from launchers.serve.realtime import messages
from launchers.serve.realtime.messages import TYPES, parse
from tests.launchers.serve.realtime.malformed import MALFORMED

GOOD = [
    {"type": "session.start", "prompt": "a fox", "width": 64, "num_frames": 33, "lead": 2, "anything": [1]},
    {"type": "session.attach", "session_id": "1", "token": "a", "from_chunk": 3},
    {"type": "session.interaction", "interaction": {"event": {"prompt": "a dog"}}},
    {"type": "session.interaction", "interaction": {"event_id": "1", "event": {"prompt": "é"}, "transition_chunks": 0}},
    *({"type": f"session.{name}"} for name in ("pause", "resume", "step", "reset", "ping", "stop")),
    {"type": "session.reset", "seed": 3, "prompt": "a dog"},
    {"type": "session.position", "media_time": 1.5, "displayed_chunk": 1},
    {"type": "session.playback", "position_seconds": 2},
    {"type": "session.ping", "any": {"field": [1, None]}},
    {"type": "watch", "token": "a"},
]


@pytest.mark.parametrize("message", GOOD, ids=lambda each: each["type"])
def test_what_is_allowed_is_read(message):
    assert parse(json.dumps(message)).type == message["type"]


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: repr(text[:40]))
def test_what_is_not_allowed_is_refused_in_one_line(text):
    with pytest.raises(Refusal) as refused:
        parse(text)
    line = str(refused.value)
    assert refused.value.code == "invalid_message"
    assert "\n" not in line
    assert len(line) < 500


def test_there_are_enough_of_them():
    assert len(MALFORMED) >= 60


def test_every_code_has_a_status_and_a_close_code():
    assert all(400 <= each.status < 600 and 1000 <= each.close < 5000 for each in PROBLEMS.values())


def test_a_token_is_shown_nowhere():
    message = parse(json.dumps({"type": "session.attach", "session_id": "1", "token": "very-secret"}))
    assert "very-secret" not in repr(message)
    with pytest.raises(Refusal) as refused:
        parse(json.dumps({"type": "session.attach", "session_id": "1", "token": "very-secret" * 100}))
    assert "very-secret" not in str(refused.value)


def test_a_refused_event_is_named():
    assert messages.event_id_of('{"interaction": {"event_id": "e7", "event": 1}}') == "e7"
    for text in ("", "[", "[]", "{}", '{"interaction": {"event_id": 7}}', "[" * 100_000):
        assert messages.event_id_of(text) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(
    sorted({name for kind in messages.KINDS for name in kind.model_fields} | {"event", "event_id", "seed", "x"})
)
LIKE_MESSAGES = st.builds(
    lambda kind, fields: {"type": kind, **fields},
    st.sampled_from(TYPES) | JSON,
    st.dictionaries(NAMES, JSON | st.fixed_dictionaries({"event": JSON}), max_size=5),
)


@settings(max_examples=400)
@given(st.one_of(st.text(), JSON.map(json.dumps), LIKE_MESSAGES.map(json.dumps)))
def test_whatever_comes_is_a_message_or_a_refusal(text):
    try:
        assert parse(text).type in TYPES
    except Refusal as refusal:
        assert refusal.code == "invalid_message"
        assert len(str(refusal)) < 500
