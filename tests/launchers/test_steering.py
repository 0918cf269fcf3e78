"""Unit, without a cluster: videos that are steered while they are made: prompts changed, held back, stopped."""

from __future__ import annotations

from concurrent.futures import CancelledError

import pytest

from helios_cp.config.errors import RequestError
from helios_cp.config.request import ScheduledPrompt
from launchers.schedule.terms import Limits
from tests.launchers.conftest import frames_in
from tests.launchers.stand_ins import FRAMES, PATIENCE, Studio
from tests.launchers.test_conductor import lose


def denoised(studio: Studio, chunks: int, name: str = "group-0") -> list:
    """Once a group has been handed so many chunks, and the last is held: the schedules they came with."""
    group = studio.workers[name]
    studio.until(lambda: group.calls.count("denoise") == chunks)
    return [plain[0].request.prompt_schedule for _, plain, _ in group.waiting]


def entries(*values) -> tuple[ScheduledPrompt, ...]:
    return tuple(ScheduledPrompt(*each) for each in values)


def go_on(studio: Studio, name: str = "group-0") -> None:
    """Answer the chunk in hand alone."""
    group = studio.workers[name]
    method, arguments, answer = group.waiting.pop(0)
    answer.get_loop().call_soon_threadsafe(group.answer, method, arguments, answer)


# Changes of the prompt


def test_a_change_is_answered_with_the_first_chunk_that_shows_it():
    """That after the one in hand; the latest change wins, also over what was planned."""
    with Studio(group={"denoise"}) as studio:
        handle = studio.submit(4)
        assert denoised(studio, 1) == [()]
        answers = [handle.change_prompt("an owl", transition=3), handle.change_prompt("a cat", transition=2)]
        assert [answer.result(PATIENCE) for answer in answers] == [1, 1]
        go_on(studio)
        assert denoised(studio, 2) == [entries(("a fox", 1), ("a cat", 3, 2))]
        assert handle.change_prompt("a dog").result(PATIENCE) == 2
        go_on(studio)
        assert denoised(studio, 3) == [entries(("a fox", 1), ("a cat", 1, 2), ("a dog", 2, 1))]
        go_on(studio)
        denoised(studio, 4)
        with pytest.raises(RequestError, match="the last chunk has begun"):
            handle.change_prompt("a bear").result(PATIENCE)
        studio.workers["group-0"].release()
        assert handle.result(PATIENCE).chunks == 4


def test_chunks_tell_what_they_show_and_old_prompts_are_not_encoded_again():
    with Studio(group={"denoise"}) as studio:
        mixes, encoded, text = [], [], studio.workers["text"]
        encode = text._encode
        text._encode = lambda request, is_guided, first: (encoded.append(first), encode(request, is_guided, first))[1]
        handle = studio.submit(5, on_chunk=lambda chunk: mixes.append(chunk.mix))
        for chunk, prompt in enumerate(("an owl", "a cat", "a dog")):
            denoised(studio, chunk + 1)
            handle.change_prompt(prompt, transition=2 if prompt == "an owl" else 1).result(PATIENCE)
            go_on(studio)
        denoised(studio, 4)
        studio.workers["group-0"].release()
        handle.result(PATIENCE)
    assert mixes == [(("a fox", 1.0),), (("a fox", 0.5), ("an owl", 0.5)), (("a cat", 1.0),), *[(("a dog", 1.0),)] * 2]
    assert encoded == [0, 0, 2, 3]


def test_a_change_before_the_first_chunk_replaces_the_prompt():
    with Studio(text={"encode"}, group={"denoise"}) as studio:
        handle = studio.submit(2)
        studio.until(lambda: studio.workers["text"].waiting)
        assert handle.change_prompt("an owl", transition=4).result(PATIENCE) == 0
        studio.workers["text"].release()
        assert denoised(studio, 1) == [entries(("an owl", 2))]


def test_changes_that_were_promised_for_later_chunks_wait_for_them():
    """As after a start of the server: the chunk in hand is made again, and may show none of them before its time."""
    with Studio(group={"denoise"}) as studio:
        handle = studio.submit(5, allowed=0)
        assert handle.change_prompt("an owl", transition=2, not_before=1).result(PATIENCE) == 1
        assert handle.change_prompt("a cat", not_before=3).result(PATIENCE) == 3
        handle.allow(5)
        assert denoised(studio, 1) == [entries(("a fox", 1), ("an owl", 2, 2), ("a cat", 2, 1))]
        go_on(studio)
        denoised(studio, 2)
        assert handle.change_prompt("a dog", not_before=1).result(PATIENCE) == 2, "chunk 1 has begun"
        go_on(studio)
        assert denoised(studio, 3) == [entries(("a fox", 1), ("an owl", 1, 2), ("a dog", 3, 1))]
        studio.workers["group-0"].release()
        handle.result(PATIENCE)


def test_a_chunk_that_is_made_again_keeps_its_place_in_the_schedule():
    """Its worker dies after a change that was promised for the next chunk."""
    with Studio(group={"denoise"}) as studio:
        handle, group = studio.submit(3), studio.workers["group-0"]
        denoised(studio, 1)
        assert handle.change_prompt("an owl").result(PATIENCE) == 1
        lose(group)
        group.says("ready")
        assert denoised(studio, 2) == [entries(("a fox", 1), ("an owl", 2, 1))]
        group.release()
        assert handle.result(PATIENCE).chunks == 3


@pytest.mark.parametrize(
    ("prompt", "transition", "named"),
    [(" ", 1, "white space"), ("a\udcff", 1, "UTF-8"), ("an owl", 0, "transition is 0")],
)
def test_bad_changes_are_refused_and_change_nothing(prompt, transition, named):
    with Studio(group={"denoise"}) as studio:
        handle = studio.submit(2)
        denoised(studio, 1)
        with pytest.raises(RequestError, match=named):
            handle.change_prompt(prompt, transition=transition).result(PATIENCE)
        go_on(studio)
        assert denoised(studio, 2) == [()]


def test_changes_that_come_too_late_or_to_a_batch_are_refused():
    with Studio(group={"denoise"}) as studio:
        handle = studio.submit(2, prompt=("a fox", "an owl"))
        denoised(studio, 1)
        with pytest.raises(RequestError, match="a batch of 2 videos takes no change"):
            handle.change_prompt("a cat").result(PATIENCE)
        studio.workers["group-0"].release()
        handle.result(PATIENCE)
        with pytest.raises(RequestError, match="has ended"):
            handle.change_prompt("a cat").result(PATIENCE)


# Pacing


def test_no_chunk_begins_before_it_is_allowed(tmp_path):
    with Studio() as studio:
        made, ready = 0, []
        handle = studio.submit(4, tmp_path / "a.mp4", on_chunk=lambda chunk: ready.append(chunk.index), allowed=0)
        group = studio.workers["group-0"]
        for allowed in (1, 3, 3, 2):  # a lower number takes nothing back
            handle.allow(allowed)
            made = max(allowed, made)
            studio.until(lambda made=made: len(ready) == made)
            studio.conductor.status()
            assert group.calls.count("denoise") == made
        handle.allow(9)
        assert handle.result(PATIENCE).chunks == 4
        assert frames_in(tmp_path / "a.mp4") == 4 * FRAMES


def test_a_chunk_that_waits_for_a_worker_can_be_held_back_again():
    """It was allowed, and another video had the worker until it was not allowed any more."""
    with Studio(group={"denoise"}) as studio:
        other = studio.submit(1)
        denoised(studio, 1)
        handle = studio.submit(1, allowed=1)
        studio.until(lambda: studio.conductor.status()["queue"]["denoise"] == 1)
        handle.allow(0)
        studio.workers["group-0"].release()
        assert other.result(PATIENCE).chunks == 1
        studio.conductor.status()
        assert studio.workers["group-0"].calls.count("denoise") == 1
        assert handle.change_prompt("an owl").result(PATIENCE) == 0, "no worker has been handed it"
        handle.allow(1)
        assert handle.result(PATIENCE).chunks == 1


def test_a_video_that_is_held_back_does_not_hold_up_others():
    with Studio(limits=Limits(active=1)) as studio:
        held = studio.submit(2, allowed=1)
        studio.until(lambda: studio.workers["group-0"].calls.count("denoise") == 1)
        assert studio.submit(2).result(PATIENCE).chunks == 2
        held.allow(2)
        assert held.result(PATIENCE).chunks == 2


# Stopping


def test_stop_ends_well_after_the_chunk_in_hand(tmp_path):
    with Studio(group={"denoise"}) as studio:
        handle = studio.submit(9, tmp_path / "a.mp4")
        denoised(studio, 1)
        go_on(studio)
        denoised(studio, 2)
        handle.stop()
        studio.conductor.status()
        studio.workers["group-0"].release()
        assert handle.result(PATIENCE).chunks == 2
    assert frames_in(tmp_path / "a.mp4") == 2 * FRAMES
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_stop_between_two_chunks(tmp_path):
    """The chunk before was not the last when it was written."""
    with Studio() as studio:
        handle = studio.submit(9, tmp_path / "a.mp4", allowed=2)
        studio.until(lambda: studio.workers["writer"].calls.count("write") == 2)
        handle.stop()
        assert handle.result(PATIENCE).chunks == 2
    assert frames_in(tmp_path / "a.mp4") == 2 * FRAMES
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("waits_for", ["admission", "its text", "a worker"])
def test_stop_before_the_first_chunk(tmp_path, waits_for):
    """What the video waits for is busy with another one, and stays so."""
    active = 1 if waits_for == "admission" else 2
    with Studio(limits=Limits(active=active), group={"denoise"}) as studio:
        other, text = studio.submit(1), studio.workers["text"]
        denoised(studio, 1)
        if waits_for == "its text":
            text.held.add("encode")
        handle = studio.submit(9, tmp_path / "a.mp4")
        if waits_for == "its text":
            studio.until(lambda: text.waiting)
        elif waits_for == "a worker":
            studio.until(lambda: studio.conductor.status()["queue"]["denoise"] == 1)
        handle.stop()
        handle.stop()
        assert handle.result(PATIENCE).chunks == 0
        text.release()
        studio.workers["group-0"].release()
        assert other.result(PATIENCE).chunks == 1
        assert studio.workers["group-0"].calls.count("denoise") == 1
    assert not list(tmp_path.iterdir())


def test_stop_while_the_next_chunk_waits_for_a_worker(tmp_path):
    """Another video has it. The file is finished, and the next video gets the place that was asked for."""
    with Studio(group={"denoise"}) as studio:
        handle = studio.submit(9, tmp_path / "a.mp4")
        denoised(studio, 1)
        other = studio.submit(1)
        studio.until(lambda: studio.conductor.status()["queue"]["denoise"] == 1)
        go_on(studio)
        denoised(studio, 2)
        studio.until(lambda: studio.conductor.status()["queue"]["denoise"] == 1)
        handle.stop()
        assert handle.result(PATIENCE).chunks == 1
        studio.workers["group-0"].release()
        assert other.result(PATIENCE).chunks == 1
        assert studio.submit(1).result(PATIENCE).chunks == 1
    assert frames_in(tmp_path / "a.mp4") == FRAMES


def test_stop_ends_after_a_chunk_that_is_made_again(tmp_path):
    """Its worker died: it has begun, so it is finished."""
    with Studio(group={"denoise"}) as studio:
        handle, group = studio.submit(9, tmp_path / "a.mp4"), studio.workers["group-0"]
        denoised(studio, 1)
        lose(group)
        handle.stop()
        studio.conductor.status()
        group.says("ready")
        denoised(studio, 2)
        group.release()
        assert handle.result(PATIENCE).chunks == 1
    assert frames_in(tmp_path / "a.mp4") == FRAMES


def test_stop_of_a_stream_and_cancel_after_it():
    with Studio(limits=Limits(undelivered=2)) as studio:
        handle = studio.submit(9, streams=True)
        studio.until(lambda: studio.workers["group-0"].calls.count("denoise") == 2)
        handle.stop()
        assert [chunk.index for chunk in handle] == [0, 1]
        assert handle.result(PATIENCE).chunks == 2
        group = studio.workers["group-0"]
        group.held.add("denoise")
        other = studio.submit(9, streams=True)
        studio.until(lambda: group.waiting)
        other.stop(), other.cancel()
        group.release()
        with pytest.raises(CancelledError):
            other.result(PATIENCE)


def test_the_segments_of_a_chunk_are_those_of_the_file(tmp_path):
    with Studio() as studio:
        found = []
        studio.submit(2, tmp_path / "a.mp4", on_chunk=found.append).result(PATIENCE)
        studio.submit(1, on_chunk=found.append).result(PATIENCE)
    for chunk in found[:2]:
        (segment,) = chunk.segments
        (tmp_path / "one.mp4").write_bytes(segment)
        assert frames_in(tmp_path / "one.mp4") == FRAMES
    assert found[2].segments == ()
