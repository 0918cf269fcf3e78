"""A server without workers, for what it answers by itself; and one that runs, which some files share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

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


RUNNING_KEY = "a-key-of-the-test-0123456789"


@pytest.fixture(scope="session")
def running_server(presets, tmp_path_factory):
    """With a key, random weights, an adapter, and few places in its queue."""
    folder = tmp_path_factory.mktemp("server")
    keys = folder / "keys"
    keys.write_text(f"{RUNNING_KEY}\n")
    keys.chmod(0o600)
    (folder / "loras").mkdir()
    write_adapter(folder / "loras" / "ink.safetensors")
    flags = ["--api-key-file", str(keys), "--queue", "3", "--lora-folder", str(folder / "loras")]
    with RunningServer(folder, str(presets["random-distilled"]), *flags) as server:
        yield server
