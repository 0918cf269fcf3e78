"""A live server as its own process, on the tiny model with random weights and small pictures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.launchers.conftest import PATIENCE, UNHURRIED

SMALL = ["--height", "64", "--width", "64", "--pyramid-steps", "1", "1", "1"]


class LiveServer:
    """`url` is where it answers; `said` what it wrote to stderr."""

    def __init__(self, data: Path, cache: Path, *flags: str, port: int = 0) -> None:
        environment = {**os.environ, **UNHURRIED, "OMP_NUM_THREADS": "1", "HELIOS_CP_CACHE": str(cache)}
        environment["RAY_TMPDIR"] = tempfile.gettempdir()
        command = [sys.executable, "-m", "launchers.serve", "--model", "random-distilled", "--data", str(data)]
        self.process = subprocess.Popen(
            [*command, "--port", str(port), *SMALL, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[3],
            start_new_session=True,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.process.stdout.readline().strip()
        assert self.url, self.said

    @property
    def said(self) -> str:
        return "".join(self._lines)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def stop(self, number: int = signal.SIGINT) -> int:
        """Returns the exit code."""
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def kill(self) -> None:
        """With SIGKILL, the server alone; then what it started, which sees that it is gone."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def _read(self) -> None:
        for line in self.process.stderr:
            self._lines.append(line)


@contextmanager
def live_server(data: Path, cache: Path, flags: Sequence[str] = (), port: int = 0) -> Iterator[LiveServer]:
    server = LiveServer(data, cache, *flags, port=port)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()
