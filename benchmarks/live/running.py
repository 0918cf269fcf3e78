"""A live server as a process of its own, on a Ray instance of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measuring.machine import CHECKOUT

STARTING_SECONDS = 300


class RunningServer:
    """A context manager that waits until the workers are loaded; `url` is where it listens."""

    def __init__(self, flags: Sequence[str]) -> None:
        self._flags = flags

    def __enter__(self) -> RunningServer:
        self._folder = tempfile.TemporaryDirectory(prefix="live-", dir="/tmp")  # short: Ray's sockets lie in it
        folder = Path(self._folder.name)
        environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "RAY_TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "launchers.serve", "--port", "0", "--data", str(folder / "data")]
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *self._flags], stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        self.url = self.process.stdout.readline().strip()
        deadline = time.monotonic() + STARTING_SECONDS
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(f"the live server does not start: {self.log.read_text()[-2000:]}")
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait()
        self.process.stdout.close()
        self._folder.cleanup()

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/ready") as answer:
                return answer.status == 200
        except (urllib.error.URLError, ValueError):
            return False
