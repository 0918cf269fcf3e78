"""Unit: a session on disk, its changes, and the schedule that makes it again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from helios_cp.config.execution import Adapter
from helios_cp.config.request import Request, ScheduledPrompt
from helios_cp.generate.prompt_files import read_schedule_file
from launchers.serve.access import digest
from launchers.serve.sessions import telling
from launchers.serve.sessions.recording import Change, Recording, Take, told_of, with_change
from launchers.serve.sessions.sessions import view_token

REQUEST = Request(prompt=("a fox",), height=64, width=64, seed=(7,))


def change(event: str, chunk: int, transition: int = 1, take: int = 0, by: str | None = None) -> Change:
    return Change(event, f"prompt of {event}", transition, take, chunk, by)


def recording(folder, *changes: Change, takes=()) -> Recording:
    made = Recording("1", folder, REQUEST, digest("control"), digest("view"), 1.0)
    made.takes, made.changes = list(takes) or [Take(0, 7, "a fox")], list(changes)
    return made


def test_what_is_saved_is_read_back(tmp_path):
    made = recording(tmp_path, change("a", 2, 3), takes=[Take(0, 7, "a fox", 4), Take(4, 8, "a dog")])
    made.state, made.why, made.is_endless = "done", "stopped", False
    made.write(made.to_json())
    assert Recording.load(tmp_path) == made


def test_adapters_are_kept_and_told_without_where_they_lie(tmp_path):
    """The schedule names files as it names pictures: whoever makes the video again has them in the current folder."""
    made = recording(tmp_path)
    made.request = replace(REQUEST, lora=(Adapter("/loras/ink.safetensors", 0.5), Adapter("/loras/motion")))
    made.write(made.to_json())
    assert Recording.load(tmp_path).request.lora == made.request.lora
    asked = telling.configuration(made, "a model")
    schedule = made.schedule(0, 2)
    expected = [{"path": "ink.safetensors", "weight": 0.5}, {"path": "motion", "weight": 1.0}]
    assert schedule["lora"] == asked["lora"] == expected
    (tmp_path / "schedule.json").write_text(json.dumps(schedule))
    found = read_schedule_file(tmp_path / "schedule.json")["lora"]
    assert found == (Adapter(str(Path.cwd() / "ink.safetensors"), 0.5), Adapter(str(Path.cwd() / "motion")))


def test_no_token_is_on_disk(tmp_path):
    made = recording(tmp_path)
    made.write(made.to_json())
    text = (tmp_path / "session.json").read_text()
    assert '"control"' in text
    assert digest("control") in text
    assert view_token("control") not in text


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 99, "state": "done"}', '{"format": 1, "state": "?"}']
)
def test_what_is_no_recording_is_told(tmp_path, text):
    (tmp_path / "session.json").write_text(text)
    with pytest.raises(ValueError, match="no recording"):
        Recording.load(tmp_path)


def test_a_recording_with_an_unknown_name_is_told(tmp_path):
    made = recording(tmp_path)
    made.write(made.to_json())
    file = tmp_path / "session.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pickle": 1}))
    with pytest.raises(ValueError, match="no recording"):
        Recording.load(tmp_path)


def test_events_begin_go_on_and_are_complete():
    changes = [change("a", 2, 3), change("b", 7)]
    told = [told_of(changes, 0, chunk) for chunk in range(9)]
    assert [each["started"] for each in told] == [(), (), ("a",), (), (), (), (), ("b",), ()]
    assert [each["active"] for each in told] == [(), (), ("a",), ("a",), ("a",), (), (), ("b",), ()]
    assert [each["completed"] for each in told] == [(), (), (), (), ("a",), (), (), ("b",), ()]


def test_a_change_cuts_the_transition_of_the_last_one_short():
    changes = [change("a", 2, 5), change("b", 4, 2)]
    told = [told_of(changes, 0, chunk) for chunk in range(7)]
    assert [each["active"] for each in told] == [(), (), ("a",), ("a",), ("b",), ("b",), ()]
    assert [each["completed"] for each in told] == [(), (), (), (), (), ("b",), ()]


def test_the_latest_change_of_a_chunk_wins_and_the_others_are_named():
    changes = [change("a", 2), change("b", 3)]
    changes = with_change(changes, change("c", 3))
    assert [each.superseded_by for each in changes] == [None, "c", None]
    assert told_of(changes, 0, 3)["started"] == ("c",)
    assert told_of(changes, 0, 3)["superseded"] == ("b",)


def test_a_change_replaces_those_of_later_chunks_too():
    """After a start of the server, changes may wait for chunks that were begun before and are made again."""
    changes = with_change([change("a", 2), change("b", 4), change("c", 5)], change("d", 4))
    assert [each.superseded_by for each in changes] == [None, "d", "d", None]
    assert (told_of(changes, 0, 4)["started"], told_of(changes, 0, 4)["superseded"]) == (("d",), ("b", "c"))
    assert told_of(with_change(changes, change("e", 3)), 0, 3)["superseded"] == ("b", "c", "d")
    assert with_change([change("a", 9)], change("b", 12, take=1))[0].superseded_by is None


def test_a_change_that_was_made_and_never_answered_is_taken_up(tmp_path):
    """The server was killed after the pipeline had taken it: `shown` is what the chunks on disk were made of."""
    made = recording(tmp_path, change("a", 2), change("b", 4), takes=[Take(0, 7, "a fox", 1), Take(1, 7, "a dog")])
    made.changes = [change("a", 2, take=1), change("b", 5, take=1)]
    shown = {1: ScheduledPrompt("a dog", 1), 2: ScheduledPrompt("prompt of a", 2, 1), 4: ScheduledPrompt("a cat", 9, 3)}
    for _ in range(2):  # the second kill finds it again
        made.add_unanswered(shown)
        assert [(each.prompt, each.transition, each.chunk) for each in made.changes_from(1)] == [
            ("prompt of a", 1, 2),
            ("a cat", 3, 4),
        ]
    assert made.changes[1].superseded_by == made.changes[2].event_id
    assert made.schedule(1, 4)["prompt_schedule"][-1] == {"prompt": "a cat", "chunks": 1, "transition": 3}


def test_events_of_another_take_are_not_told():
    assert told_of([change("a", 2)], 1, 2) == told_of([], 1, 2)


def test_the_schedule_has_the_lengths_between_changes(tmp_path):
    made = recording(tmp_path, change("a", 2, 3), change("b", 5, by="c"), change("c", 5))
    schedule = made.schedule(0, 9)
    assert schedule["prompt_schedule"] == [
        {"prompt": "a fox", "chunks": 2},
        {"prompt": "prompt of a", "chunks": 3, "transition": 3},
        {"prompt": "prompt of c", "chunks": 4, "transition": 1},
    ]
    assert schedule["seed"] == [7]
    assert schedule["num_frames"] == 9 * 33


def test_a_change_that_no_chunk_shows_yet_is_in_no_schedule(tmp_path):
    assert recording(tmp_path, change("a", 2)).schedule(0, 2)["prompt_schedule"] == [{"prompt": "a fox", "chunks": 2}]


def test_a_change_before_the_first_chunk_takes_its_place(tmp_path):
    schedule = recording(tmp_path, change("a", 0, 3)).schedule(0, 4)["prompt_schedule"]
    assert schedule == [{"prompt": "prompt of a", "chunks": 4}]


def test_each_take_has_a_schedule_of_its_own(tmp_path):
    takes = [Take(0, 7, "a fox", 4), Take(4, 8, "a dog")]
    made = recording(tmp_path, change("a", 2), change("b", 6, take=1), takes=takes)
    assert [each["chunks"] for each in made.schedule(0, 4)["prompt_schedule"]] == [2, 2]
    assert made.schedule(1, 3)["prompt_schedule"] == [
        {"prompt": "a dog", "chunks": 2},
        {"prompt": "prompt of b", "chunks": 1, "transition": 1},
    ]
    assert made.schedule(1, 3)["seed"] == [8]
    assert [path.parent.name for path in made.segments(6)] == ["take-000"] * 4 + ["take-001"] * 2
