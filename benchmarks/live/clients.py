"""Clients of the live server: a controller with a player, and viewers."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import av
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

POSITION_SECONDS = 0.25
"""Between two positions that a player tells, as the page does."""

PATIENT = {"max_size": None, "open_timeout": None, "ping_timeout": None}
"""Of connections: however long an answer takes, it is measured."""


@dataclass(frozen=True)
class Arrival:
    """A chunk: its metadata, and when its last byte came, in seconds since 1970."""

    metadata: dict[str, Any]
    media: bytes = field(repr=False)
    at: float

    @property
    def seconds_after_ready(self) -> float:
        """From the moment at which the pipeline handed the chunk to the server."""
        return self.at - self.metadata["ready_at"]


class Controller:
    """Starts a session, takes its chunks, and tells where its player is.

    The player begins with the first chunk and plays in real time what is there; with `hurries` it has played a chunk as
    soon as it comes, so that the server never waits for it.
    """

    def __init__(self, socket: ClientConnection, hurries: bool = False) -> None:
        self.socket = socket
        self.hurries = hurries
        self.arrivals: list[Arrival] = []
        self.start: dict[str, Any] = {}
        self.init = b""
        self.receipts: dict[str, dict[str, Any]] = {}
        self.shown: dict[str, Arrival] = {}
        self.is_done = self.has_ended = False
        self._ready = self._played = 0.0
        self._looked = time.monotonic()
        self._news = asyncio.Condition()

    async def say(self, kind: str, **fields: Any) -> None:
        with suppress(ConnectionClosed):  # what has come before tells why
            await self.socket.send(json.dumps({"type": kind, **fields}))

    async def run(self) -> None:
        """Until the session is done, or its connection closed."""
        telling = asyncio.create_task(self._tell())
        try:
            async for text in self.socket:
                await self._take(json.loads(text))
                async with self._news:
                    self._news.notify_all()
                if self.is_done:
                    return
        finally:
            telling.cancel()
            self.has_ended = True
            async with self._news:
                self._news.notify_all()

    async def until(self, condition: Callable[[], object]) -> None:
        """Raises `RuntimeError` where it cannot come any more."""
        async with self._news:
            await self._news.wait_for(lambda: condition() or self.has_ended)
        if not condition():
            raise RuntimeError("the session has ended before")

    def position(self) -> float:
        """Seconds of media played."""
        now = time.monotonic()
        self._played = self._ready if self.hurries else min(self._ready, self._played + now - self._looked)
        self._looked = now
        return self._played

    async def _take(self, message: dict[str, Any]) -> None:
        match message["type"]:
            case "video.start":
                self.start, self.init = message, await self.socket.recv()
            case "session.interaction.queued":
                self.receipts[message["event_id"]] = {**message, "at": time.time()}
            case "video.chunk_metadata":
                media = await self.socket.recv()
                arrival = Arrival(message, media, time.time())
                self.position()
                self._ready = message["media_time"] + message["duration"]
                self.arrivals.append(arrival)
                self.shown |= dict.fromkeys(message["started"], arrival)
                if self.hurries:
                    await self.say("session.position", media_time=self.position())
            case "session.done":
                self.is_done = True
            case "error":
                raise RuntimeError(f"the server refuses: {message['message']}")

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(POSITION_SECONDS)
            if self.arrivals:
                await self.say("session.position", media_time=self.position())


@asynccontextmanager
async def controlling(url: str, hurries: bool = False, **session: Any) -> AsyncIterator[Controller]:
    """A session that has begun; it is stopped in the end."""
    async with connect(f"{url.replace('http', 'ws', 1)}/v1/realtime/video", **PATIENT) as socket:
        controller = Controller(socket, hurries)
        running = asyncio.create_task(controller.run())
        await controller.say("session.start", **session)
        try:
            await controller.until(lambda: controller.start)
            yield controller
        finally:
            if not controller.is_done:
                await controller.say("session.stop")
            await running


@asynccontextmanager
async def watchers(url: str, start: dict[str, Any], count: int) -> AsyncIterator[list[list[Arrival]]]:
    """So many viewers of a session; what has come to each of them."""
    arrivals: list[list[Arrival]] = [[] for _ in range(count)]
    tasks = [asyncio.create_task(_watch(url, start, each)) for each in arrivals]
    try:
        yield arrivals
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _watch(url: str, start: dict[str, Any], arrivals: list[Arrival]) -> None:
    """A viewer, who keeps no media. Ends with the session, or when it is cancelled."""
    place = f"{url.replace('http', 'ws', 1)}/v1/sessions/{start['session_id']}/watch"
    headers = {"Authorization": f"Bearer {start['view_token']}"}
    async with connect(place, **PATIENT, additional_headers=headers) as socket:
        async for text in socket:
            if isinstance(text, bytes):  # the init segment
                continue
            message = json.loads(text)
            if message["type"] == "video.chunk_metadata":
                await socket.recv()
                arrivals.append(Arrival(message, b"", time.time()))


def seconds_to_decode(init: bytes, media: bytes) -> float:
    """Of the first frame of a chunk, beginning with bytes."""
    begin = time.perf_counter()
    with av.open(io.BytesIO(init + media)) as container:
        next(container.decode(video=0)).to_ndarray(format="rgb24")
    return time.perf_counter() - begin
