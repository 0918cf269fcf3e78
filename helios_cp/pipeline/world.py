"""Joining the ranks that torchrun starts, and ending them all when one fails."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from helios_cp.config.errors import CheckpointError, RequestError
from helios_cp.config.ranks import Ranks
from helios_cp.device.device import TESTED, card_count, make_current

POLL = 0.05  # seconds between two looks whether all ranks are as far as this one
BEAT = 1.0  # seconds between two signs of life of a rank that has long work to do before it meets the others
GRACE = 2.0
"""Seconds that a rank waits for a lost rank to say why. torchrun and `generate` let it live for longer than that."""

GLOO_LOST = re.compile(r"\[[^\]]*gloo/transport/[^\]]*\]|Application timeout caused pair closure")
"""How the messages of gloo's transport begin. They come as a plain `RuntimeError`."""
NCCL_LOST = re.compile(r"ncclRemoteError|Watchdog caught collective operation timeout|communicator was aborted")
"""What NCCL says of other ranks, in a `DistBackendError`, which it raises for faults of its own rank too."""


def pick_backend(name: str | None, device: torch.device, ranks: Ranks) -> str:
    """NCCL for CUDA and gloo elsewhere, or the one named. Raises `RequestError` where it cannot run."""
    if ranks.size > 1 and device.type not in TESTED:
        raise RequestError(
            f"--device {device.type}: one process only; {ranks.size} ranks run on {' and '.join(TESTED)}"
        )
    backend = name or ("nccl" if device.type == "cuda" else "gloo")
    if backend == "nccl":
        if device.type != "cuda":
            raise RequestError(f"--backend nccl: it needs CUDA devices, this is {device.type}; use gloo")
        if ranks.local_size > card_count(device):
            raise RequestError(
                f"--backend nccl: {ranks.local_size} ranks share {card_count(device)} card(s), and it needs one each; "
                "use --backend gloo"
            )
    return backend


class World:
    """The ranks of one job. They share what rank 0 decides, and the first rank that fails speaks for all.

    They use the store of torchrun's rendezvous. A job of one rank has no store and communicates nothing. Raises
    `RequestError` where there is no rendezvous.
    """

    def __init__(self, ranks: Ranks, timeout: float) -> None:
        self.ranks = ranks
        self.timeout = timedelta(seconds=timeout)
        self._store = None
        if ranks.size > 1:
            try:
                store, _, _ = next(dist.rendezvous("env://", timeout=self.timeout))
            except (ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise RequestError(
                    f"WORLD_SIZE {ranks.size} in the environment, but the ranks do not find each other ({reason}); "
                    f"start them with torchrun --nproc_per_node {ranks.size}"
                ) from None
            store.set_timeout(self.timeout)
            # torchrun can keep its store when it starts the ranks again, with what they had put into it.
            self._store = dist.PrefixStore(f"attempt-{ranks.attempt}", store)

    def share(self, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `decide` returns on rank 0, as JSON, on every rank. It is called on rank 0 only.

        Rank 0 is waited for while it gives signs of life. Raises `TimeoutError` for none within the timeout.
        """
        if self._store is None:
            return decide()
        if self.ranks.is_first:
            with self._beating():
                decided = decide()
            self._store.set("helios_cp/decision", json.dumps(decided))
        self._meet("decided")
        return json.loads(self._store.get("helios_cp/decision"))

    def prepare(self, step: Callable[[], object]) -> None:
        """Call `step` once on every machine, and wait until it has come to its end on all.

        A machine is waited for while it gives signs of life. Raises `TimeoutError` for none within the timeout.
        """
        if self.ranks.local_rank == 0:
            with self._beating():
                step()
        if self._store is not None:
            self._meet("prepared")

    @contextmanager
    def connected(self, backend: str, device: torch.device) -> Iterator[None]:
        """Process groups exist inside. An exception is reported by the first rank that has one, and ends the process.

        When a rank fails, its peers lose their connection to it and fail too; they stay silent. Ranks leave together,
        because one that left early would close connections that others may still read from.
        """
        if self._store is None:
            yield
            return
        make_current(device)
        store = dist.PrefixStore("helios_cp/group", self._store)
        dist.init_process_group(
            backend, store=store, rank=self.ranks.rank, world_size=self.ranks.size, timeout=self.timeout
        )
        try:
            yield
        except Exception as error:
            self._report(error)
            end_process(1)
        with contextlib.suppress(Exception):  # the store went down, after the work was done
            self._meet("finished")
        # Free CUDA graphs first: destroying NCCL while a captured graph holds collectives never returns. Pipelines lie
        # in cycles of references.
        gc.collect()
        dist.destroy_process_group()

    def claim_end(self) -> bool:
        """Whether this is the first rank to end the job: what the others see then is a consequence, and not told."""
        if self._store is None:
            return True
        with contextlib.suppress(Exception):  # the store goes down with the job
            return self._store.add("helios_cp/ended", 1) == 1
        return False

    def _meet(self, where: str) -> None:
        """Wait until all ranks have come here: through the store, as some may have minutes of other work before.

        Raises `TimeoutError` when for the whole timeout nobody comes and nobody gives a sign of life.
        """
        key, size = f"helios_cp/{where}", self.ranks.size
        self._store.set(f"{key}/{self.ranks.rank}", "here")
        self._store.add(key, 1)
        seen, since = None, time.monotonic()
        while (count := self._store.add(key, 0)) < size:
            now = count, self._store.add("helios_cp/beats", 0)
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > self.timeout.total_seconds():
                missing = [str(rank) for rank in range(size) if not self._store.check([f"{key}/{rank}"])]
                raise TimeoutError(
                    f"rank {', '.join(missing)} of {size} gave no sign of life for --timeout "
                    f"{self.timeout.total_seconds():g} s before all were {where}"
                )
            time.sleep(POLL)

    @contextmanager
    def _beating(self) -> Iterator[None]:
        """This rank gives signs of life inside, from a thread."""
        if self._store is None:
            yield
            return
        is_over = threading.Event()

        def beat() -> None:
            with contextlib.suppress(Exception):  # the store goes down with the job
                while not is_over.wait(BEAT):
                    self._store.add("helios_cp/beats", 1)

        thread = threading.Thread(target=beat, name="signs of life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def _wait_for_cause(self) -> None:
        """Let the rank speak that failed first, which may still be putting its files in order.

        torchrun's SIGTERM does not cut this short: the process ends by itself right after.
        """
        with contextlib.suppress(ValueError):  # in another thread than the main one
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end = time.monotonic() + GRACE
        with contextlib.suppress(Exception):
            while self._store.add("helios_cp/ended", 0) == 0 and time.monotonic() < end:
                time.sleep(POLL)

    def _report(self, error: Exception) -> None:
        if is_lost_connection(error):
            self._wait_for_cause()
        if not self.claim_end():
            return
        who = f"rank {self.ranks.rank}"
        if isinstance(error, RequestError | CheckpointError | OSError):
            lines = f"{who}: error: {error}"
        elif is_lost_connection(error):
            lines = (
                f"{who}: another rank does not answer: it was killed, its machine is gone, or it hangs for more than "
                f"--timeout {self.timeout.total_seconds():g} s ({' '.join(str(error).split())[:300]})"
            )
        else:
            lines = f"{who} failed:\n{''.join(traceback.format_exception(error))}".rstrip()
        print(lines, file=sys.stderr, flush=True)


def is_lost_connection(error: Exception) -> bool:
    """Whether a peer is gone or too slow: by the error's type, and by its text where one type serves several faults."""
    if isinstance(error, dist.DistBackendError):
        return NCCL_LOST.search(str(error)) is not None
    if isinstance(error, dist.DistError):  # of the network, or of the store
        return True
    return type(error) is RuntimeError and GLOO_LOST.match(str(error)) is not None


def end_process(code: int) -> None:
    """End at once: a rank that waits for its process groups to close could wait for a dead peer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
