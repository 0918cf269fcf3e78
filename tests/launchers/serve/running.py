"""A server as a process of its own, on a Ray instance of its own, with a small model on the CPU."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from tests.launchers.conftest import PATIENCE, QUICK, UNHURRIED
from tests.launchers.serve.client import Client

ROOT = Path(__file__).parents[3]


def free_port() -> int:
    """Below those that the system gives to clients, so that none of these takes it while no server listens there."""
    while True:
        port = random.randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def wait_until(happens: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happens():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.1)


class RunningServer:
    """A context manager; `url` is where it listens, and `log` the file of what it writes.

    `port`: 0 takes a free one at each start. `key` is shown by whoever comes by the methods of this class.
    """

    def __init__(self, folder: Path, model: str, *flags: str, port: int = 0, key: str | None = None) -> None:
        self.folder, self.data, self.key = folder, folder / "data", key
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

    def start(self, *flags: str) -> None:
        """Until it is ready; then `url` is known. `flags` come beside those that it always has."""
        self.spawn(*flags)
        self.wait_until_ready()

    def spawn(self, *flags: str) -> None:
        """Until it listens, while it loads; then `url` is known."""
        environment = {**os.environ, **UNHURRIED, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment["RAY_TMPDIR"] = self._ray.name
        before = self.log.read_text() if self.log.exists() else ""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*self._command, *flags],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,
            )

        def told() -> re.Match[str] | None:
            assert self.process.poll() is None, self.log.read_text()
            return re.search(r"(http://\S+) tells how far", self.log.read_text()[len(before) :])

        wait_until(told)
        self.url = told()[1]

    def wait_until_ready(self) -> None:
        assert self.process.stdout.readline().strip() == self.url, self.log.read_text()

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

    # What its clients do

    def connect(self, **options: Any) -> Client:
        """To start a session, or to come back to one."""
        return Client(f"{self.url}/v1/realtime/video", additional_headers=self._shown(self.key), **options)

    def attached(self, begun: dict[str, Any], first: int = -1) -> Client:
        """The controller of a session that comes back, for chunks from `first` on."""
        client = self.connect()
        client.send("session.attach", session_id=begun["session_id"], token=begun["control_token"], from_chunk=first)
        client.until("video.start")
        return client

    def viewer(self, begun: dict[str, Any], first: int | None = None, **options: Any) -> Client:
        where = "" if first is None else f"?from={first}"
        headers = self._shown(begun["view_token"])
        return Client(
            f"{self.url}/v1/sessions/{begun['session_id']}/watch{where}", additional_headers=headers, **options
        )

    def ask(self, path: str, token: str | None = None, method: str = "GET") -> tuple[int, bytes]:
        """Status and content of an answer by HTTP."""
        answer = httpx.request(method, self.url + path, headers=self._shown(token), timeout=PATIENCE)
        return answer.status_code, answer.content

    def download(self, begun: dict[str, Any], name: str) -> bytes:
        """A file of a session, for its viewers."""
        code, content = self.ask(f"/v1/sessions/{begun['session_id']}/{name}", begun["view_token"])
        assert code == 200
        return content

    def sessions(self) -> list[dict[str, Any]]:
        return json.loads(self.ask("/v1/sessions", self.key)[1])["data"]

    def events(self) -> list[dict[str, Any]]:
        """What it has logged, of all its starts."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    @staticmethod
    def _shown(key: str | None) -> dict[str, str]:
        return {} if key is None else {"Authorization": f"Bearer {key}"}
