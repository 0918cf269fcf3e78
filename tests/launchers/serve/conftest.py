"""A server without workers, for what it answers by itself; and one that runs, which some files share."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from websockets.exceptions import ConnectionClosed

from launchers.serve.app import build_app
from launchers.serve.flags import ServeCall
from launchers.serve.server import Server
from tests.launchers.conftest import write_adapter
from tests.launchers.serve.running import RunningServer

HERE = "http://127.0.0.1:8000"
WS = "ws://127.0.0.1:8000"
"""The test client would else call a WebSocket's host `testserver`."""


@pytest.fixture
def key_file(tmp_path) -> Path:
    file = tmp_path / "keys"
    file.write_text("first-key-0123456789 second-key-0123456789  # two of them\n# nobody\n")
    file.chmod(0o600)
    return file


def client_of(server: Server, more: Callable[[FastAPI], object] = lambda app: None) -> TestClient:
    """A client of the application itself; `more` adds routes to it."""
    app = build_app(server)
    more(app)
    return TestClient(app, base_url=HERE, raise_server_exceptions=False)


def call_of(folder: Path, **values) -> ServeCall:
    return ServeCall(data=folder / "data", **values)


KEY = "a-key-of-the-tests-0123456789"
QUEUE = 8
MESSAGE_BYTES = 200_000


@pytest.fixture(scope="session")
def running_server(presets, tmp_path_factory):
    """With a key, random weights, an adapter, places for two sessions at a time, and few in its queue."""
    folder = tmp_path_factory.mktemp("server")
    keys = folder / "keys"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)
    (folder / "loras").mkdir()
    write_adapter(folder / "loras" / "ink.safetensors")
    flags = ["--api-key-file", str(keys), "--lora-folder", str(folder / "loras"), "--sessions", "2"]
    flags += ["--queue", str(QUEUE), "--message-bytes", str(MESSAGE_BYTES), "--requests", "1000000"]
    flags += ["--longest", "10000"]  # of videos whose chunks last minutes
    with RunningServer(folder, str(presets["random-distilled"]), *flags, key=KEY) as server:
        yield server
        assert server.end(signal.SIGINT) == 0
        assert "server.fault" not in server.log.read_text()


@pytest.fixture
def controller(running_server):
    """Of a session, which is stopped in the end."""
    with running_server.connect() as client:
        yield client
        with suppress(ConnectionClosed):
            client.send("session.stop")
            client.until("session.done")
