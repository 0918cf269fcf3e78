"""What every request and every WebSocket passes on its way in and out: page, rate, size; headers, log, faults."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass
from pathlib import PurePosixPath

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from launchers.serve import access, answers
from launchers.serve.access import Access
from launchers.serve.limits import Rates
from launchers.serve.logs import Log
from launchers.serve.problems import Refusal

UNCOUNTED = ("/health", "/ready", "/metrics")
"""What watches the server asks as often as it likes."""

SEGMENTS = (".m3u8", ".m4s", ".mp4")
"""Nor are the files of HLS counted: a proxy fetches them once for all its viewers, from one address."""

BODY_SECONDS = 30.0
LEAST_RATE = 16 * 1024
"""A body may take so many seconds, and one more for so many bytes of it: a client that sends byte by byte holds a
connection no longer than that."""


@dataclass(frozen=True)
class Gate:
    """An ASGI application around another, the outermost of all. `most_bytes` and `body_seconds` bound the body of a
    request."""

    app: ASGIApp
    access: Access
    rates: Rates
    log: Log
    most_bytes: int
    body_seconds: float = BODY_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self.most_bytes, self.body_seconds)
        begin, fault = time.perf_counter(), None
        try:
            self._check(scope, exchange.headers)
            await self.app(scope, exchange.receive, exchange.send)
        except Refusal as refusal:
            await exchange.refuse(refusal)
        except (ClientDisconnect, WebSocketDisconnect):
            pass
        except Exception as error:
            fault = secrets.token_hex(8)
            self.log.fault("server.fault", error, id=fault, path=scope["path"])
            await exchange.refuse(Refusal("failed", f"the server failed; its log says why beside {fault}"))
        self._tell(scope, exchange, time.perf_counter() - begin, fault)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raises `Refusal`."""
        path, method = scope["path"], scope.get("method")
        self.access.check_page(headers, method)
        is_file = method in access.SAFE_METHODS and PurePosixPath(path).suffix in SEGMENTS
        if path not in UNCOUNTED and not is_file:
            self.rates.take(self._caller(scope, headers), time.monotonic())

    def _caller(self, scope: Scope, headers: Headers) -> str:
        """A key that is known, or the address: a made-up key gives nobody more."""
        key = access.bearer(headers)
        if self.access.needs_key and key is not None and self.access.admits(key):
            return access.digest(key)
        return (scope.get("client") or ("",))[0]

    def _tell(self, scope: Scope, exchange: _Exchange, seconds: float, fault: str | None) -> None:
        """The path alone: what follows a question mark may be a token."""
        method = scope.get("method", "WEBSOCKET")
        is_quiet = method in access.SAFE_METHODS and (exchange.status or 0) < 400
        self.log.event(
            "request",
            level=logging.DEBUG if is_quiet else logging.INFO,
            method=method,
            path=scope["path"],
            status=exchange.status,
            seconds=round(seconds, 4),
            client=(scope.get("client") or (None,))[0],
            fault=fault,
        )


class _Exchange:
    """One request and its answer, or a WebSocket: counts what comes in, and puts headers on what goes out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, most_bytes: int, body_seconds: float) -> None:
        self.scope = scope
        self.headers = Headers(scope=scope)
        self.status: int | None = None
        self._receive, self._send, self._most_bytes = receive, send, most_bytes
        self._body_seconds = body_seconds
        self._begin: float | None = None
        self._bytes = 0
        self._is_whole = False
        self._is_accepted = self._is_closed = False

    async def receive(self) -> Message:
        """Raises `Refusal` for a body that is too large, as it says itself or as it comes, and one that is too slow."""
        if self.scope["type"] == "http" and not self._is_whole:
            return await self._receive_body()
        message = await self._receive()
        self._is_closed = self._is_closed or message["type"] == "websocket.disconnect"
        return message

    async def _receive_body(self) -> Message:
        length = self.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._most_bytes:
            raise self._too_large()
        now = asyncio.get_running_loop().time()
        self._begin = now if self._begin is None else self._begin
        try:
            async with asyncio.timeout_at(self._begin + self._body_seconds + self._bytes / LEAST_RATE):
                message = await self._receive()
        except TimeoutError:
            raise Refusal("too_slow", f"only {self._bytes} bytes of the request came in time; send it faster") from None
        self._bytes += len(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)
        if self._bytes > self._most_bytes:
            raise self._too_large()
        return message

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind in ("http.response.start", "websocket.http.response.start"):
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in access.HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("Cache-Control", "no-store")
        elif kind == "websocket.accept":
            self._is_accepted, self.status = True, 101
        elif kind == "websocket.close":
            self._is_closed = True
            self.status = message.get("code", 1000)
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Tell the client, as far as that is still possible."""
        if self.scope["type"] == "http" or not self._is_accepted:
            if self.status is None:
                await answers.answer(self.scope["path"], refusal)(self.scope, self._receive, self.send)
        elif not self._is_closed:
            reason = str(refusal)[:120]  # a close frame holds 123 bytes
            await self.send({"type": "websocket.close", "code": refusal.problem.close, "reason": reason})

    def _too_large(self) -> Refusal:
        return Refusal("too_large", f"the request is larger than {self._most_bytes} bytes, which is what is allowed")
