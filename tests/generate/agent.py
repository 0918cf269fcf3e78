"""Ranks under torchrun's own agent, which starts, watches and ends them as the command `torchrun` has it do.

The agent runs in a thread of the tests, set as `torchrun --nproc_per_node` sets it, and its ranks are forked from a
process that has imported what they need: that costs a small part of what the command takes. The command itself is for
tests of what it alone does.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from benchmarks.ranks.pool import PRELOADED, start_method


class Job:
    """`call(*arguments)` on so many ranks in `folder`. What it returns, if not 0, is the exit code of its rank."""

    def __init__(
        self,
        ranks: int,
        folder: Path,
        environment: dict[str, str],
        call: Callable[..., int],
        *arguments: str,
        restarts: int = 0,
    ) -> None:
        self.failed: ChildFailedError | None = None
        self._said = Path(tempfile.mkdtemp())
        multiprocessing.get_context(start_method()).set_forkserver_preload(PRELOADED)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=restarts,
            start_method=start_method(),
        )
        arguments = (folder, self._said, environment, call, *arguments)
        self._thread = threading.Thread(target=self._run, args=(config, arguments), daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> tuple[bool, str, str]:
        """Whether a rank failed, stdout and stderr of all ranks, once they have ended."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"no end after {seconds} s"
        found = self.failed is not None, *((self._said / name).read_text() for name in ("stdout", "stderr"))
        shutil.rmtree(self._said)
        return found

    def _run(self, config: LaunchConfig, arguments: tuple) -> None:
        try:
            elastic_launch(config, on_rank)(*arguments)
        except ChildFailedError as error:
            self.failed = error


def on_rank(folder: Path, said: Path, environment: dict[str, str], call: Callable[..., int], *arguments: str) -> None:
    """The ranks share two files as they would share a terminal."""
    os.environ |= environment
    os.chdir(folder)
    torch.set_num_threads(1)
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        file = os.open(said / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream.fileno())
    if code := call(*arguments):
        sys.exit(code)
