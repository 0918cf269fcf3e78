"""Wall-clock times of several programs that share a machine fairly: in turns, warmed up, as medians with spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each call after the warm-up, two calls or more."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of the calls were faster than the first, a quarter slower than the second."""
        return _quartiles(self.seconds)

    def to_json(self) -> dict[str, Any]:
        return {"median": self.median, "quartiles": self.quartiles, "seconds": self.seconds}


@dataclass(frozen=True)
class Ratio:
    """How many times longer one program takes than another: median over the turns, and quartiles."""

    median: float
    quartiles: tuple[float, float]


def ratio(slow: Timing, fast: Timing) -> Ratio:
    """Of two programs timed in turns. Taken turn by turn, so that a slow spell of the machine divides out."""
    turns = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    return Ratio(statistics.median(turns), _quartiles(turns))


def interleave(
    programs: dict[str, Callable[[], Any]], repeats: int, device: torch.device, warmup: int = 2
) -> dict[str, Timing]:
    """Call the programs in turns, `repeats` times each (two or more), forth and back so that none is always second.

    Whatever slows the machine down for a while slows all of them. The first `warmup` rounds are dropped.
    """
    if repeats < 2:
        raise ValueError(f"repeats={repeats}: two or more are needed for a spread")
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(warmup + repeats):
        for name in list(programs) if turn % 2 else reversed(programs):
            elapsed = _seconds(programs[name], device)
            if turn >= warmup:
                seconds[name].append(elapsed)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _seconds(program: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    program()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
