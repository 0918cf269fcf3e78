"""Unit: when the next chunk may begin. A player and a maker of any speed are simulated in exact steps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from launchers.serve.media.store import MediaStore
from launchers.serve.sessions.pacer import EXTRAPOLATED_SECONDS, Pacer, Playhead, allowed

CHUNK = 1.375
STEP = CHUNK / 64
LEADS = [1, 1.5, 2, 4]


@pytest.mark.parametrize(
    ("played", "lead", "count"),
    [(0, 1, 1), (0.01, 1, 2), (1, 1, 2), (1.01, 1, 3), (0, 2, 2), (0.5, 2, 3), (3, 1.5, 5), (0, 0.1, 1)],
)
def test_a_chunk_may_begin_while_the_lead_is_short(played, lead, count):
    assert allowed(played, lead) == count


def simulate(making: float, lead: float, seconds: float, wait_for_player=allowed):
    """A player that tells its position at each step, and a maker that takes `making` seconds a chunk.

    Returns when each chunk began and when it came on screen, and how long the player stood still after its start.
    """
    playhead, now, position, stood = Playhead(), 0.0, 0.0, 0.0
    begun: list[float] = []
    shown: list[float] = []
    made = 0
    while now < seconds:
        if made < len(begun) and now >= begun[made] + making:
            made += 1
        ready = made * CHUNK
        if position < ready:
            if position >= len(shown) * CHUNK - 1e-9:
                shown.append(now)
            position = min(ready, position + STEP)
        elif made:
            stood += STEP
        playhead.told(position, now, ready)
        if made == len(begun) and len(begun) < wait_for_player(playhead.seconds(now, ready) / CHUNK, lead):
            begun.append(now)
        now += STEP
    return begun, shown, stood


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("making", [0.01, 0.3, 0.9, 1.0, 1.5, 3.0])
def test_a_change_is_on_screen_within_the_lead_and_one_chunk(making, lead):
    """A change that comes just after a chunk has begun is shown by the next one."""
    begun, shown, _ = simulate(making * CHUNK, lead, 40 * CHUNK)
    slowest = max(CHUNK, making * CHUNK)
    delays = [shown[chunk + 1] - begun[chunk] for chunk in range(2, len(shown) - 1)]
    assert max(delays) <= lead * CHUNK + slowest + making * CHUNK * (making > 1) + 3 * STEP


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("making", [0.01, 0.5, 0.9])
def test_a_maker_that_is_fast_enough_never_lets_the_player_wait(making, lead):
    assert simulate(making * CHUNK, lead, 40 * CHUNK)[2] == 0


def test_without_pacing_each_change_would_be_later_than_the_last():
    begun, shown, _ = simulate(0.1 * CHUNK, 1, 20 * CHUNK, lambda *_: 10**6)
    delays = [shown[chunk + 1] - begun[chunk] for chunk in range(len(shown) - 1)]
    assert delays[-1] > 10 * CHUNK


def test_a_clock_stands_for_a_player_that_tells_nothing():
    playhead = Playhead()
    assert playhead.seconds(5, 0) == 0
    playhead.waited(10, 0)
    assert playhead.seconds(11, CHUNK) == 1
    assert playhead.seconds(20, CHUNK) == CHUNK


def test_a_player_that_stands_still_is_not_taken_to_play_on():
    playhead = Playhead()
    playhead.told(1, 10, 9)
    assert playhead.seconds(10.5, 9) == 1.5
    assert playhead.seconds(100, 9) == 1 + EXTRAPOLATED_SECONDS
    playhead.told(1, 11, 9)
    assert playhead.seconds(100, 9) == 1


def test_nobody_plays_what_is_not_ready():
    playhead = Playhead()
    playhead.told(1e9, 0, 3)
    assert playhead.seconds(1, 3) == 3


def test_when_the_player_goes_the_clock_goes_on():
    playhead = Playhead()
    playhead.told(1, 0, 9)
    playhead.left(0.5, 9)
    assert playhead.seconds(2.5, 9) == 3.5


def test_how_long_until_it_is_past_a_position():
    playhead = Playhead()
    assert playhead.seconds_until_past(1, 0, 9) == 1
    assert playhead.seconds_until_past(10, 0, 9) is None
    assert playhead.seconds_until_past(1, 5, 9) == 0
    playhead.told(1, 10, 9)
    assert playhead.seconds_until_past(1.5, 10, 9) == 0.5
    assert playhead.seconds_until_past(3, 10, 9) is None
    playhead.told(1, 11, 9)
    assert playhead.seconds_until_past(1.5, 11, 9) is None
    assert playhead.seconds_until_past(1, 12, 1) is None, "more has to be ready first"


def test_a_session_that_only_news_can_move_looks_at_no_clock(tmp_path):
    """Else it would look at it again and again: once all is played, and while its controller does not read."""
    store = MediaStore(tmp_path, b"", 24, 33)
    pacer = Pacer(store, lead=1)
    store.chunks += 5 * [{"frames": 33}]
    pacer.restart(0)
    for played in (3.5, 5):
        pacer.told(played * CHUNK)
        pacer.granted = pacer._may_begin()
        assert (pacer._seconds_until_next() is None) == (played == 5), "all is played"
    pacer.granted = 3
    pacer.reader = SimpleNamespace(next=0)
    assert pacer.is_held and pacer._seconds_until_next() is None, "the controller reads nothing"
