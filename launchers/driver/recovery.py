"""When a worker that died is started again, and when the others go on without it."""

from __future__ import annotations

from collections.abc import Iterable

from launchers.cluster.faults import StartError, one_line
from launchers.cluster.worker import Standing, Worker

MAX_DEATHS = 8
"""Deaths of a worker without any finished work in between, after which it is not started again."""


def reason_to_give_up(worker: Worker, error: BaseException) -> str | None:
    """Why a worker that has just died of `error` is not worth another start; `None` if it is."""
    if isinstance(error, StartError) and worker.failed_starts >= error.attempts:
        return f"{worker.name} failed to start {worker.failed_starts} times in a row: {error}"
    if worker.deaths > MAX_DEATHS:
        return f"{worker.name} died {worker.deaths} times without finishing any work: {one_line(error)}"
    return None


def can_go_on_without(worker: Worker, workers: Iterable[Worker]) -> bool:
    """Whether every stage of a worker is that of another one, too, that works or is being started."""
    hopeful = [each for each in workers if each.standing in (Standing.READY, Standing.STARTING)]
    able = {stage for each in hopeful if each is not worker for stage in each.recipe.capacity}
    return able >= set(worker.recipe.capacity)
