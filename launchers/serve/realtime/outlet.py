"""A connection and its way out: messages and chunks in order, as fast as its client reads, with no queue of chunks."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from launchers.serve.problems import Refusal
from launchers.serve.realtime import messages
from launchers.serve.server import Server
from launchers.serve.sessions import telling
from launchers.serve.sessions.session import Session

MOST_MESSAGES = 256
"""That wait for a client. One that reads nothing meanwhile is cut off."""

MOST_BEHIND = 8
"""Chunks that a viewer of the newest may be behind; then it skips to the newest one, and its metadata say so."""

CLOSE_SECONDS = 10.0
"""For what a connection has to send before it is closed."""

REASON_BYTES = 123
"""Of a close frame."""


class Outlet:
    """A follower of a session, by WebSocket; see `media.audience.Follower`.

    `run` sends until `end`, in one task, so that no message comes between a chunk's metadata and its bytes.
    """

    def __init__(self, websocket: WebSocket) -> None:
        self.session: Session | None = None
        self.next = 0
        self._skips = False
        self._websocket = websocket
        self._messages: deque[dict[str, Any]] = deque()
        self._news = asyncio.Event()
        self._has_room = asyncio.Event()
        self._close: tuple[int, str] | None = None

    def say(self, message: dict[str, Any]) -> None:
        self._messages.append(message)
        if len(self._messages) >= MOST_MESSAGES:
            self.end(1013, "too many messages wait for this client; read them faster")
        self.wake()

    def follow(self, session: Session, start: dict[str, Any], first: int, skips: bool) -> None:
        """Send `start` with the initialization segment, and chunks from `first` on."""
        self.session, self.next, self._skips = session, first, skips
        self.say(start)
        self.say(telling.state(session.recording, session.store))

    def wake(self) -> None:
        self._news.set()

    def end(self, code: int, reason: str) -> None:
        if self._close is None:
            self._close = code, reason
        self.wake()

    async def room(self) -> None:
        """Until the client has read what it was sent, so that one that only writes is not read any more."""
        while len(self._messages) >= MOST_MESSAGES // 4 and self._close is None:
            self._has_room.clear()
            await self._has_room.wait()

    async def run(self) -> None:
        """Raises `WebSocketDisconnect` where the client goes."""
        while True:
            await self._news.wait()
            self._news.clear()
            await self._send_messages()
            while self._has_chunk() and not self._is_cut_off():
                await self._send_chunk()
                await self._send_messages()
            if self._close is not None:
                code, reason = self._close
                await self._websocket.close(code, reason.encode()[:REASON_BYTES].decode(errors="ignore"))
                return

    async def _send_messages(self) -> None:
        while self._messages and not (self._is_cut_off() and len(self._messages) >= MOST_MESSAGES):
            message = self._messages.popleft()
            self._has_room.set()
            if message["type"] == "session.done":  # after the last chunk
                while self._has_chunk():
                    await self._send_chunk()
            await self._send(message)
            if message["type"] == "video.start":
                await self._websocket.send_bytes(self.session.store.init)

    def _has_chunk(self) -> bool:
        return self.session is not None and self.next < len(self.session.store.chunks)

    def _is_cut_off(self) -> bool:
        return self._close is not None and self._close[0] != 1000

    async def _send_chunk(self) -> None:
        store, skipped = self.session.store, 0
        newest = len(store.chunks) - 1
        if self._skips and newest - self.next >= MOST_BEHIND:
            skipped, self.next = newest - self.next, newest
        media = store.media(self.next)
        await self._send(telling.chunk_message(store.chunks[self.next], skipped))
        await self._websocket.send_bytes(media)
        self.next += 1
        self.session.pacer.wake()

    async def _send(self, message: dict[str, Any]) -> None:
        await self._websocket.send_text(json.dumps(message))


class Connection:
    """One client's WebSocket. What it sends wrong is told by an `error`, and all goes on; what it may not do ends the
    connection. When it goes, its session stays."""

    def __init__(self, server: Server, websocket: WebSocket) -> None:
        self._server = server
        self._websocket = websocket
        self._outlet = Outlet(websocket)
        self._session: Session | None = None

    async def run(self) -> None:
        try:
            await self._send_and_read()
        finally:
            if self._session is not None:
                self._session.leave(self._outlet)

    async def _send_and_read(self) -> None:
        """At once, until either ends."""
        sending, reading = tasks = [asyncio.create_task(self._outlet.run()), asyncio.create_task(self._read())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if sending not in done and reading.exception() is None:  # told to go by what was read
                await asyncio.wait([sending], timeout=CLOSE_SECONDS)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for error in results:
            if isinstance(error, Exception) and not isinstance(error, WebSocketDisconnect):
                raise error

    async def _read(self) -> None:
        """Until the client goes, or is told to."""
        while True:
            await self._outlet.room()
            frame = await self._websocket.receive()
            if frame["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(frame.get("code", 1005))
            text = frame.get("text")
            try:
                if text is None:
                    raise Refusal("invalid_message", "a binary frame: messages are JSON in text frames")
                message = messages.parse(text)
                if isinstance(message, messages.Ping):
                    self._outlet.say({**message.model_dump(), "type": "session.pong"})
                else:
                    await self._obey(message)
            except Refusal as refusal:
                if self._refuse(refusal, None if text is None else messages.event_id_of(text)):
                    return

    def _refuse(self, refusal: Refusal, event_id: str | None = None) -> bool:
        """Returns whether the connection ends with it."""
        about = {} if event_id is None else {"event_id": event_id}
        self._outlet.say({"type": "error", "code": refusal.code, "message": str(refusal), **about})
        if self._ends_with(refusal):
            self._outlet.end(refusal.problem.close, str(refusal))
            return True
        return False

    def _follow(
        self, session: Session, about: dict[str, Any], first: int, join: Callable[[Outlet], None], skips: bool = False
    ) -> None:
        """Send what `video.start` says, `about` among it, and chunks from `first` on, or from the newest where that is
        negative. `skips`: it may skip to the newest where it falls behind."""
        self._session, count = session, len(session.store.chunks)
        start = telling.start(session.recording, session.store, self._server.checked.model)
        first = max(count - 1, 0) if first < 0 else min(first, count)
        self._outlet.follow(session, {**start, **about, "first_chunk": first}, first, skips)
        join(self._outlet)
        if session.is_done:
            self._outlet.say(telling.done(session.recording, session.store))
            self._outlet.end(1000, session.recording.why)

    async def _obey(self, message: Any) -> None:
        """What a message asks for; each kind of client may ask for its own. Raises `Refusal`."""
        raise NotImplementedError

    def _ends_with(self, refusal: Refusal) -> bool:
        """Whether a refusal ends the connection of this kind of client."""
        raise NotImplementedError
