"""Multi-rank gloo: the pool of ranks itself. A failing rank must fail its test at once, with its own error."""

import contextlib
import os
import signal
import sys
import time
from multiprocessing.connection import wait

import pytest
import torch.distributed as dist

from benchmarks.ranks.pool import RankError, RankPool, exit_code


def _world(rank):
    return rank, dist.get_rank(), dist.get_world_size()


def _without_world(rank):
    return dist.is_initialized()


def _fail_on(rank, failing):
    if rank == failing:
        raise ArithmeticError("no such sum")
    dist.barrier()


def _die_on(rank, failing):
    if rank == failing:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _hang_on(rank, hanging):
    if rank == hanging:
        time.sleep(600)


@pytest.mark.parametrize("size", [2, 5, 8])
def test_world_has_exactly_the_ranks_asked_for(ranks, size):
    assert ranks.run(_world, ranks=size) == [(rank, rank, size) for rank in range(size)]


def test_one_rank_needs_no_process_group(ranks):
    assert ranks.run(_without_world, ranks=1) == [False]


def _inherits(rank):
    return "diffusers" in sys.modules


def test_beside_cards_a_rank_inherits_nothing(monkeypatch):
    """diffusers asks for cards when it is imported, and a process that is forked after that cannot use them."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with contextlib.closing(RankPool(2)) as pool:
        assert pool.run(_inherits, ranks=2) == [False, False]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_fail_on, r"rank 1 of 3 failed:(?s:.*)ArithmeticError: no such sum"),
        (_die_on, r"rank 1 of 3 died with exit code -9"),
    ],
)
def test_failing_rank_fails_the_call_with_its_own_error(ranks, function, message):
    ranks.run(_world, ranks=3)
    # The other ranks wait in a barrier for as long as the timeout, and end in another error.
    with pytest.raises(RankError, match=message):
        ranks.run(function, 1, ranks=3, timeout=600)
    assert ranks.run(_world, ranks=3) == [(rank, rank, 3) for rank in range(3)]


def test_hanging_rank_is_named(ranks, monkeypatch):
    """The time is up once the others have connected and answered, however long that takes them."""

    def wait_for_others(connections, timeout):
        assert 0 < timeout <= 600
        return wait(connections, timeout if len(connections) > 1 else 0.1)

    monkeypatch.setattr("benchmarks.ranks.pool.wait", wait_for_others)
    with pytest.raises(RankError, match=r"no answer within 600 s from ranks \[1\]"):
        ranks.run(_hang_on, 1, ranks=3, timeout=600)


def test_a_command_whose_ranks_fail_says_so_and_ends_with_1(capsys):
    def main():
        raise RankError("no answer within 600 s from ranks [1]")

    assert exit_code(main) == 1
    assert capsys.readouterr().err == "error: no answer within 600 s from ranks [1]\n"
    assert exit_code(lambda: 2) == 2
