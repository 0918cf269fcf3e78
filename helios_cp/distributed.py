"""Joining the ranks that torchrun starts, and ending them all when one fails."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from helios_cp.config import RequestError

GRACE_SECONDS = 5.0
"""How long a rank that is asked to end may take to finish its files."""


@dataclass(frozen=True)
class Ranks:
    """This process's place in a job, from torchrun's environment; one rank without it."""

    rank: int = 0
    local_rank: int = 0
    local_size: int = 1
    size: int = 1

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Ranks:
        def number(name: str, default: int) -> int:
            return int(environment.get(name, default))

        return cls(number("RANK", 0), number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", 1), number("WORLD_SIZE", 1))

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def device_of_rank(device: torch.device, ranks: Ranks) -> torch.device:
    """One card a rank, in turn, where no card is named."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", ranks.local_rank % torch.cuda.device_count())


def pick_backend(name: str | None, device: torch.device, ranks: Ranks) -> str:
    """NCCL for CUDA and gloo elsewhere, or the one named. Raises `RequestError` where it cannot run."""
    backend = name or ("nccl" if device.type == "cuda" else "gloo")
    if backend == "nccl":
        if device.type != "cuda":
            raise RequestError(f"--backend nccl: it needs CUDA devices, this is {device.type}; use gloo")
        if ranks.local_size > torch.cuda.device_count():
            raise RequestError(
                f"--backend nccl: {ranks.local_size} ranks share {torch.cuda.device_count()} card(s), and it needs one "
                "each; use --backend gloo"
            )
    return backend


class Job:
    """The ranks of one job: they share what rank 0 decides, and the first that fails speaks for all.

    Its store is that of torchrun's rendezvous. A job of one rank has none and communicates nothing.
    """

    def __init__(self, ranks: Ranks, timeout: float) -> None:
        self.ranks = ranks
        self.timeout = timedelta(seconds=timeout)
        self._store = None
        if ranks.size > 1:
            store, _, _ = next(dist.rendezvous("env://", timeout=self.timeout))
            store.set_timeout(self.timeout)
            self._store = store

    def share(self, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `decide` returns on rank 0, as JSON, on every rank. It is called on rank 0 only."""
        if self._store is None:
            return decide()
        if self.ranks.is_first:
            decided = decide()
            self._store.set("helios_cp/decided", json.dumps(decided))
            return decided
        return json.loads(self._store.get("helios_cp/decided"))

    @contextmanager
    def connected(self, backend: str, device: torch.device) -> Iterator[None]:
        """Process groups exist inside. An exception is reported by the first rank that has one, and ends the process.

        When a rank fails its peers lose their connection to it and fail too; they stay silent.
        """
        if self._store is None:
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store = dist.PrefixStore("helios_cp/group", self._store)
        dist.init_process_group(
            backend, store=store, rank=self.ranks.rank, world_size=self.ranks.size, timeout=self.timeout
        )
        try:
            yield
        except Exception as error:
            self._report(error)
            end_process(1)
        dist.destroy_process_group()

    def claim_end(self) -> bool:
        """Whether this is the first rank to end the job, so that what the others see is a consequence."""
        if self._store is None:
            return True
        with contextlib.suppress(Exception):  # the store goes down with the job
            return self._store.add("helios_cp/ended", 1) == 1
        return False

    def _report(self, error: Exception) -> None:
        if not self.claim_end():
            return
        if isinstance(error, dist.DistError | ConnectionError) or _is_lost_connection(error):
            reason = " ".join(str(error).split())[:300]
            print(
                f"rank {self.ranks.rank}: another rank does not answer; it was killed, hangs for more than "
                f"{self.timeout.total_seconds():g} s, or its machine is gone ({reason})",
                file=sys.stderr,
                flush=True,
            )
            return
        lines = traceback.format_exception(error)
        print(f"rank {self.ranks.rank} failed:", "".join(lines), sep="\n", end="", file=sys.stderr, flush=True)


def _is_lost_connection(error: Exception) -> bool:
    """gloo raises a plain RuntimeError when a peer is gone or too slow."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("gloo", "Connection closed", "Connection reset", "Timed out", "NCCL", "Socket")
    )


def end_process(code: int) -> None:
    """End at once: a rank that waits for its process groups to close could wait for a dead peer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_after_grace(code: int) -> None:
    """End the process in `GRACE_SECONDS` unless it ends by itself before, as when it is stuck waiting for a peer."""
    timer = threading.Timer(GRACE_SECONDS, os._exit, (code,))
    timer.daemon = True
    timer.start()
