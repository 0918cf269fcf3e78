"""The web server in a thread of its own, with an event loop in which all sessions live."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Coroutine
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from helios_cp.config.errors import RequestError

GRACE_SECONDS = 5
"""For answers in hand when the server ends."""

SEND_BYTES = 256 * 1024
"""That the kernel may keep for each client. Left to itself it keeps megabytes, which are seconds of old pictures for a
slow client, and memory for many."""

SILENT_SECONDS = 60
"""After which a WebSocket that answers no ping counts as lost."""

UNREAD_SECONDS = 120
"""After which the kernel gives up a client that takes nothing of what was sent."""


def listen(host: str, port: int) -> socket.socket:
    """Take the port, so that a taken one is refused before anything else starts. Raises `RequestError`."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)  # connections take it over
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * UNREAD_SECONDS)
        return listener
    except OSError as error:
        raise RequestError(
            f"--host {host} --port {port}: nobody can listen there ({error.strerror}); give another"
        ) from None


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class WebServer:
    """Serves an application; a context manager. `loop` is its event loop."""

    def __init__(self, app: ASGIApp, listener: socket.socket, message_bytes: int) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            ws="websockets-sansio",
            ws_max_size=message_bytes,
            ws_per_message_deflate=False,  # MP4 is compressed already
            timeout_graceful_shutdown=GRACE_SECONDS,
            server_header=False,
            ws_ping_timeout=SILENT_SECONDS,
        )
        self._listener = listener
        self._server = uvicorn.Server(config)
        self.loop = asyncio.new_event_loop()
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="web server", daemon=True)

    def call(self, coroutine: Coroutine[Any, Any, Any], timeout: float | None = None) -> Any:
        """Run a coroutine in the loop, and wait for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def __enter__(self) -> WebServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(self._server.serve(sockets=[self._listener]))
        finally:
            self.ended.set()
            self.loop.close()
