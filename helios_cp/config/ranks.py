"""This process's place in a job, read from the environment that torchrun sets."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from helios_cp.config.arguments import OneLineParser
from helios_cp.config.errors import RequestError

TASK_COUNTS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
}
"""What tells a task how many of them were started, and who sets it."""


@dataclass(frozen=True)
class Ranks:
    """This process's place in a job; `attempt` counts how often torchrun has started its ranks again."""

    rank: int = 0
    local_rank: int = 0
    local_size: int = 1
    size: int = 1
    attempt: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Ranks:
        """Read torchrun's environment; one rank without it. Raises `RequestError` for what torchrun does not set."""

        def number(name: str, default: int, least: int = 0) -> int:
            text = environment.get(name, str(default))
            if not text.isdecimal():
                raise RequestError(f"{name} {text!r} in the environment: a whole number is allowed; torchrun sets it")
            if int(text) < least:
                raise RequestError(f"{name} {text} in the environment: at least {least} is allowed; torchrun sets it")
            return int(text)

        size, local_size = number("WORLD_SIZE", 1, 1), number("LOCAL_WORLD_SIZE", 1, 1)
        rank, local_rank = number("RANK", 0), number("LOCAL_RANK", 0)
        local = ("LOCAL_WORLD_SIZE", local_size) if "LOCAL_WORLD_SIZE" in environment else ("WORLD_SIZE", size)
        for name, value, (of, count) in (("RANK", rank, ("WORLD_SIZE", size)), ("LOCAL_RANK", local_rank, local)):
            if value >= count:
                told = f"{of} is {count}" if of in environment else f"{of} is not set"
                raise RequestError(
                    f"{name} {value} in the environment, but {told}: start the ranks with torchrun, or unset {name}"
                )
        if "WORLD_SIZE" not in environment:
            _check_tasks(environment)
        # On several machines the counts can differ; there `--rdzv-backend c10d` makes a new store for each attempt.
        attempt = number("TORCHELASTIC_RESTART_COUNT", 0) if local_size == size else 0
        return cls(rank, local_rank, local_size, size, attempt)

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def _check_tasks(environment: Mapping[str, str]) -> None:
    """Raises `RequestError` where several tasks of one step would each take itself for the only one."""
    for name, starter in TASK_COUNTS.items():
        count = environment.get(name, "")
        if count.isdecimal() and int(count) > 1:
            raise RequestError(
                f"{starter} started {count} tasks ({name}), but WORLD_SIZE is not set, so each would make the whole "
                f"video: start one task a machine, and the ranks with torchrun; set WORLD_SIZE=1 for separate calls"
            )


def parse_on_rank(
    parser: OneLineParser, arguments: Sequence[str] | None, environment: Mapping[str, str]
) -> tuple[argparse.Namespace, Ranks]:
    """Parse flags on every rank of a job. Rank 0 speaks for all, but each tells what is wrong with its environment."""
    ranks, refusal = Ranks(), None
    try:
        ranks = Ranks.of(environment)
    except RequestError as error:
        refusal = error
    parser.is_quiet = not ranks.is_first
    parsed = parser.parse_args(arguments)
    if refusal is not None:
        parser.error(str(refusal))
    return parsed, ranks
