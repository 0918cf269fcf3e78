"""The live server as a user starts it: a process of its own, which can be killed and started again."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil

from tests.launchers.conftest import PATIENCE, UNHURRIED


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class LiveServer:
    """`python -m launchers.serve` on one port and one folder, so that each start goes on where the last one ended."""

    def __init__(self, folder: Path, ray_folder: Path, *flags: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        self._command = [sys.executable, "-m", "launchers.serve", "--port", str(self.port)]
        self._command += ["--data", str(folder / "data"), *flags]
        self._environment = {**os.environ, **UNHURRIED, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(ray_folder)}
        self._process: subprocess.Popen[str] | None = None
        self._children: list[psutil.Process] = []

    def start(self) -> None:
        """Returns once the page answers; weights may still load."""
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self._wait_for("/health")

    def wait_until_ready(self) -> None:
        """The address is printed when it takes sessions."""
        output = self._process.stdout
        assert select.select([output], [], [], PATIENCE)[0], self.log.read_text()[-4000:]
        assert output.readline().strip() == self.url, self.log.read_text()[-4000:]

    def kill(self) -> None:
        """SIGKILL to the server alone, which is also the driver of its cluster."""
        self._children += psutil.Process(self._process.pid).children(recursive=True)
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """In order, and whatever a kill has left behind."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(PATIENCE)
        self._process.stdout.close()
        for child in self._children:
            if child.is_running():
                child.kill()

    def _wait_for(self, path: str) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            assert self._process.poll() is None, self.log.read_text()[-4000:]
            try:
                urlopen(self.url + path, timeout=PATIENCE).close()
                return
            except URLError:
                time.sleep(0.1)
        raise TimeoutError(f"{path}: {self.log.read_text()[-4000:]}")
