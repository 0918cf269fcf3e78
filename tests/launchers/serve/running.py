"""A server as a process of its own, on a Ray instance of its own, with a small model on the CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.launchers.conftest import PATIENCE, QUICK, UNHURRIED

ROOT = Path(__file__).parents[3]


class RunningServer:
    """A context manager; `url` is where it listens, and `log` the file of what it writes.

    `port`: 0 takes a free one at each start.
    """

    def __init__(self, folder: Path, model: str, *flags: str, port: int = 0) -> None:
        self.folder, self.data = folder, folder / "data"
        self.log = folder / "log.jsonl"
        self._command = [sys.executable, "-m", "launchers.serve", "--model", model, "--device", "cpu"]
        self._command += ["--port", str(port), "--data", str(self.data), "--wait", str(PATIENCE), *QUICK, *flags]

    def __enter__(self) -> RunningServer:
        self._ray = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp")  # short: Ray's sockets lie in it
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end(signal.SIGTERM)
        self._ray.cleanup()

    def start(self) -> None:
        """Until it is ready; then `url` is known."""
        environment = {**os.environ, **UNHURRIED, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment["RAY_TMPDIR"] = self._ray.name
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True
            )
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://"), self.log.read_text()

    def end(self, by: signal.Signals) -> int:
        """Its exit code. A killed one takes its Ray processes along: they are of its session."""
        if self.process.poll() is None:
            self.process.send_signal(by)
        code = self.process.wait(PATIENCE)
        if by == signal.SIGKILL:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.stdout.close()
        return code

    def signal_worker(self, name: str, by: signal.Signals) -> None:
        """To the actors of a class, such as DenoiserRank."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                is_ours = os.getsid(int(folder.name)) == self.process.pid
                title = (folder / "cmdline").read_text()
            except (ProcessLookupError, FileNotFoundError):
                continue
            if is_ours and title.startswith(f"ray::{name}"):
                os.kill(int(folder.name), by)
