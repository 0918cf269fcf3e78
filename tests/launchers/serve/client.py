"""Clients of the live server, written from its protocol alone: nothing of the server is imported here."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

PATIENCE = 300
"""Seconds for what takes a few on a quiet machine."""

FRAMES = 33
"""Of a chunk."""


class Client:
    """One WebSocket: sends messages, and waits for those of a type; everything that comes is kept in order.

    `chunks` are pairs of metadata and bytes; `init` is the initialization segment.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self.socket: ClientConnection = connect(
            url.replace("http", "ws", 1), max_size=None, open_timeout=PATIENCE, ping_timeout=None, **options
        )
        self.init = b""
        self.chunks: list[tuple[dict[str, Any], bytes]] = []
        self.messages: list[dict[str, Any]] = []

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def receive(self, timeout: float = PATIENCE) -> dict[str, Any]:
        """The next message, with the bytes that follow it taken up."""
        text = self.socket.recv(timeout)
        assert isinstance(text, str), "bytes come behind the message that tells of them alone"
        message = json.loads(text)
        self.messages.append(message)
        if message["type"] == "video.start":
            self.init = self.socket.recv(timeout)
            assert isinstance(self.init, bytes)
        if message["type"] == "video.chunk_metadata":
            media = self.socket.recv(timeout)
            assert len(media) == message["bytes"]
            self.chunks.append((message, media))
        return message

    def until(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The next message of a type, with these values in it."""
        while True:
            message = self.receive()
            if message["type"] == kind and all(message.get(name) == value for name, value in fields.items()):
                return message

    def until_chunk(self, number: int) -> dict[str, Any]:
        while not self.chunks or self.chunks[-1][0]["chunk"] < number:
            self.receive()
        return self.chunks[-1][0]

    def play(self) -> None:
        """As a player that has shown the newest chunk to its end would tell."""
        newest = self.chunks[-1][0]
        with suppress(ConnectionClosed):  # that was the last chunk
            self.send("session.position", media_time=newest["media_time"] + newest["duration"])

    def stand(self, chunk: float) -> None:
        """As a player that stands somewhere in a chunk, such as 1.5, would tell."""
        self.send("session.position", media_time=chunk * self.chunks[-1][0]["duration"])

    def play_until(self, number: int) -> dict[str, Any]:
        """Play each chunk as it comes, and those that have come; returns the metadata of the newest."""
        while not self.chunks or self.chunks[-1][0]["chunk"] < number:
            if self.chunks:
                self.play()
            newest = len(self.chunks)
            while len(self.chunks) == newest:
                self.receive()
        self.play()
        return self.chunks[-1][0]

    def change(self, event: str, prompt: str, **fields: Any) -> dict[str, Any]:
        """Change the prompt; returns the receipt."""
        self.send("session.interaction", interaction={"event_id": event, "event": {"prompt": prompt}, **fields})
        return self.until("session.interaction.queued", event_id=event)

    def start(self, **fields: Any) -> dict[str, Any]:
        """Start a session of small pictures."""
        self.send("session.start", **{"prompt": "a red fox", "height": 64, "width": 64, **fields})
        return self.until("video.start")

    def start_at_rest(self, **fields: Any) -> dict[str, Any]:
        """Start a session whose player stands in the first chunk: two are there, and no other begins, however long a
        test takes. At one frame a second the clock stands almost still until the player has told so."""
        begun = self.start(**{"fps": 1, **fields})
        self.until_chunk(0)
        self.stand(0.5)
        self.until_chunk(1)
        return begun

    def ask(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Send, and wait for the answer of the next ping: whatever the message brought comes before it."""
        self.send(kind, **fields)
        self.send("session.ping", number=len(self.messages))
        before = len(self.messages)
        self.until("session.pong", number=before)
        return next((each for each in self.messages[before:] if each["type"] == "error"), self.messages[-1])

    def media(self) -> bytes:
        """All that was received, as one file."""
        return self.init + b"".join(media for _, media in self.chunks)


def narrow_socket(url: str) -> socket.socket:
    """A connection whose client takes little before it reads."""
    host, _, port = url.partition("://")[2].partition("/")[0].rpartition(":")
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.connect((host, int(port)))
    return made
