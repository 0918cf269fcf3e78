"""`WS /v1/sessions/ID/watch`: viewers, who see all and steer nothing."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, WebSocket

from launchers.serve.access import bearer
from launchers.serve.problems import Refusal
from launchers.serve.realtime import messages
from launchers.serve.realtime.outlet import Connection
from launchers.serve.server import Server


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
        viewer = Viewer(server, websocket, session_id, first)
        viewer.greet(bearer(websocket.headers) or token)
        await viewer.run()

    return routes


class Viewer(Connection):
    """One viewer's connection to a session, from chunk `first` on; -1 is the newest."""

    def __init__(self, server: Server, websocket: WebSocket, session_id: str, first: int) -> None:
        super().__init__(server, websocket)
        self._id, self._first = session_id, first

    def greet(self, token: str | None) -> None:
        """Take the token of a header or of the address, where there is one."""
        if token is not None:
            try:
                self._join(token)
            except Refusal as refusal:
                self._refuse(refusal)

    def _join(self, token: str) -> None:
        session = self._server.sessions.viewed(self._id, token)
        if self._server.sessions.viewers >= self._server.call.viewers:
            raise Refusal("busy", f"{self._server.call.viewers} viewers watch already; try again later")
        self._follow(session, {}, self._first, session.audience.join, skips=self._first < 0)

    async def _obey(self, message: Any) -> None:
        match message:
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

    def _ends_with(self, refusal: Refusal) -> bool:
        return self._session is None  # whoever has no token is not listened to
