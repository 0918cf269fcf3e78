"""A pool of gloo ranks for benchmarks and tests, started once and used by all.

`shared_pool().run(function, *args, ranks=P)` calls `function(rank, *args)` on ranks 0 … P−1 and returns their results
in rank order. Every call runs in a world of its own of exactly P ranks (of none for P = 1), so that no test inherits
another's groups. Function and arguments are pickled, the function by its module path. A rank that raises, dies or does
not answer in time fails the call at once with that rank's own error; the workers are then killed and started afresh.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

MAX_RANKS = 8
PRELOADED = ["benchmarks.ranks.preloaded", *({"pytest"} & sys.modules.keys())]  # which ranks of tests import too
GRACE = 0.5  # seconds by which the end of a rank's pipe may lag behind the errors that it causes on others


class RankError(RuntimeError):
    """A rank failed. The message says which, and holds its traceback."""


class RankPool:
    """Up to `size` worker processes of one thread each, started when first needed."""

    def __init__(self, size: int = MAX_RANKS) -> None:
        self.size = size
        self._workers: list[tuple[Any, Connection]] = []
        self._store: Any = None
        self._runs = 0
        self._context = multiprocessing.get_context(start_method())
        # Imported once in the fork server, so that starting a process costs milliseconds.
        self._context.set_forkserver_preload(PRELOADED)

    def run(self, function: Callable[..., Any], *args: Any, ranks: int, timeout: float = 300.0) -> list[Any]:
        """`function(rank, *args)` of every rank. Raises `RankError` within `timeout` seconds when one fails."""
        if not 1 <= ranks <= self.size:
            raise ValueError(f"{ranks} ranks: this pool has 1 to {self.size}")
        self._start(ranks)
        self._runs += 1
        call = pickle.dumps((function, args))
        workers = self._workers[:ranks]
        try:
            for _, connection in workers:
                connection.send((self._runs, ranks, timeout, call))
            return self._collect(workers, timeout)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill the workers; the next `run` starts new ones."""
        for process, connection in self._workers:
            process.kill()
            connection.close()
        for process, _ in self._workers:
            process.join()
        self._workers.clear()

    def _start(self, ranks: int) -> None:
        if self._store is None:
            import torch.distributed as dist

            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        while len(self._workers) < ranks:
            ours, theirs = self._context.Pipe()
            rank = len(self._workers)
            process = self._context.Process(
                target=_work, args=(rank, theirs, self._store.port, sys.path), name=f"rank {rank}", daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _collect(self, workers: list[tuple[Any, Connection]], timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        waiting = {connection: rank for rank, (_, connection) in enumerate(workers)}
        while waiting:
            ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                raise RankError(f"no answer within {timeout} s from ranks {sorted(waiting.values())}")
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    succeeded, payload = connection.recv()
                except (EOFError, ConnectionResetError):
                    raise _death(workers, rank) from None
                if not succeeded:
                    self._check_alive(workers)
                    raise RankError(f"rank {rank} of {len(workers)} failed:\n{payload}")
                results[rank] = pickle.loads(payload)
        return [results[rank] for rank in range(len(workers))]

    @staticmethod
    def _check_alive(workers: list[tuple[Any, Connection]]) -> None:
        """Raises `RankError` for a rank that died: others' errors about a lost connection come from it.

        Its pipe tells, which closes with the process; the fork server may be late with the news.
        """
        ranks = {connection: rank for rank, (_, connection) in enumerate(workers)}
        deadline = time.monotonic() + GRACE
        while ready := wait(list(ranks), timeout=max(deadline - time.monotonic(), 0)):
            for connection in ready:
                try:
                    connection.recv_bytes()  # another's answer, which no longer counts
                except (EOFError, ConnectionResetError):
                    raise _death(workers, ranks[connection]) from None


def exit_code(main: Callable[[], int]) -> int:
    """What a command ends with: that of `main`, or 1 and the ranks' own error, without our traceback around it."""
    try:
        return main()
    except RankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def start_method() -> str:
    """How processes are started: by a fork server, but afresh where there are CUDA cards.

    A forked process cannot use them once its parent has asked for them, as diffusers does when it is imported.
    """
    import torch

    return "spawn" if torch.cuda.is_available() else "forkserver"


def _death(workers: list[tuple[Any, Connection]], rank: int) -> RankError:
    """Of a rank whose pipe is closed; its exit code is waited for."""
    process, _ = workers[rank]
    process.join()
    return RankError(f"rank {rank} of {len(workers)} died with exit code {process.exitcode}")


@functools.cache
def shared_pool() -> RankPool:
    """The pool of this test session."""
    pool = RankPool()
    atexit.register(pool.close)
    return pool


def _work(rank: int, connection: Connection, port: int, path: list[str]) -> None:
    """A worker's life: calls come in, answers go out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[:] = path
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    while True:
        try:
            run, ranks, timeout, call = connection.recv()
        except EOFError:
            return
        try:
            function, args = pickle.loads(call)
            if ranks > 1:
                dist.init_process_group(
                    "gloo",
                    store=dist.PrefixStore(f"run {run}", store),
                    rank=rank,
                    world_size=ranks,
                    timeout=timedelta(seconds=timeout),
                )
            # Pickled here, as a pipe would share a tensor's memory, which ends with this process.
            answer = True, pickle.dumps(function(rank, *args))
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send(answer)
        if ranks > 1 and answer[0]:
            dist.barrier()  # a rank that left early would close connections that others still read from
            dist.destroy_process_group()
