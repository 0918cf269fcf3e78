"""`WS /v1/sessions/ID/watch`: viewers, who see all and steer nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, WebSocket
from starlette.websockets import WebSocketDisconnect

from launchers.serve.access import bearer
from launchers.serve.problems import Refusal
from launchers.serve.realtime import messages
from launchers.serve.realtime.outlet import Outlet, both
from launchers.serve.server import Server
from launchers.serve.sessions import telling
from launchers.serve.sessions.session import Session


def router(server: Server) -> APIRouter:
    routes = APIRouter()

    @routes.websocket("/v1/sessions/{session_id}/watch")
    async def watch(
        websocket: WebSocket,
        session_id: str,
        first: Annotated[int, Query(alias="from", ge=-1)] = -1,
        token: str | None = None,
    ) -> None:
        await websocket.accept()
        await Viewer(server, websocket, session_id, first).run(bearer(websocket.headers) or token)

    return routes


class Viewer:
    """One viewer's connection, from chunk `first` on; -1 is the newest."""

    def __init__(self, server: Server, websocket: WebSocket, session_id: str, first: int) -> None:
        self._server = server
        self._websocket = websocket
        self._outlet = Outlet(websocket)
        self._id, self._first = session_id, first
        self._session: Session | None = None

    async def run(self, token: str | None) -> None:
        if token is not None:
            self._try(partial(self._join, token))
        try:
            await both(self._outlet, self._read())
        finally:
            if self._session is not None:
                self._session.leave(self._outlet)

    def _join(self, token: str) -> None:
        session = self._server.sessions.viewed(self._id, token)
        if self._server.sessions.viewers >= self._server.call.viewers:
            raise Refusal("busy", f"{self._server.call.viewers} viewers watch already; try again later")
        count = len(session.store.chunks)
        first = max(count - 1, 0) if self._first < 0 else min(self._first, count)
        self._session = session
        self._outlet.follow(
            session,
            telling.start(session.recording, session.store, self._server.checked.model),
            first,
            skips=self._first < 0,
        )
        session.audience.join(self._outlet)
        if session.is_done:
            self._outlet.say(telling.done(session.recording, session.store))
            self._outlet.end(1000, session.recording.why)

    async def _read(self) -> None:
        while True:
            await self._outlet.room()
            frame = await self._websocket.receive()
            if frame["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(frame.get("code", 1005))
            self._try(partial(self._obey, frame.get("text")))

    def _obey(self, text: str | None) -> None:
        message = messages.parse(text or "")
        match message:
            case messages.Ping():
                self._outlet.say({**message.model_dump(), "type": "session.pong"})
            case messages.Watch() if self._session is None:
                self._join(message.token)
            case messages.Watch():
                raise Refusal("already_started", "this connection watches already")
            case _ if self._session is None:
                raise Refusal(
                    "unauthorized", "send a viewer's or a controller's token first, by a message of type watch"
                )
            case _:
                raise Refusal("forbidden", f"{message.type}: a viewer may only watch and send session.ping")

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Refusal as refusal:
            self._outlet.refuse(refusal)
            if self._session is None:  # whoever has no token is not listened to
                self._outlet.end(refusal.problem.close, str(refusal))
