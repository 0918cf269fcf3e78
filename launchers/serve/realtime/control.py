"""`WS /v1/realtime/video`: a controller starts a session, or comes back to one, and steers it."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import APIRouter, WebSocket

from helios_cp.config.request import Request
from launchers.serve.access import bearer, matches
from launchers.serve.problems import Refusal
from launchers.serve.realtime import messages
from launchers.serve.realtime.outlet import Connection
from launchers.serve.server import Server
from launchers.serve.sessions import telling
from launchers.serve.sessions.asked import request_of
from launchers.serve.sessions.sessions import view_token
from launchers.serve.uploads.kinds import CLIP, PICTURE


def router(server: Server) -> APIRouter:
    routes = APIRouter()

    @routes.websocket("/v1/realtime/video")
    async def control(websocket: WebSocket) -> None:
        await websocket.accept()
        await Controller(server, websocket).run()

    return routes


class Controller(Connection):
    """One controller's connection. Its session can be attached to again."""

    def __init__(self, server: Server, websocket: WebSocket) -> None:
        super().__init__(server, websocket)
        self._transition = 1

    def _ends_with(self, refusal: Refusal) -> bool:
        return refusal.code in ("unauthorized", "forbidden")

    async def _obey(self, message: Any) -> None:
        session = self._session
        match message:
            case messages.Start():
                await self._start(message)
            case messages.Attach():
                self._attach(message)
            case messages.Watch():
                raise Refusal("invalid_message", "watch: a viewer sends it to /v1/sessions/ID/watch")
            case _ if session is None:
                raise Refusal("not_started", f"{message.type}: send session.start or session.attach first")
            case messages.Interaction():
                await self._change(message.interaction)
            case messages.Pause():
                await session.pause()
            case messages.Resume():
                await session.resume()
            case messages.Step():
                await session.step()
            case messages.Reset():
                await session.reset(message.seed, message.prompt)
            case messages.Position():
                session.pacer.told(message.media_time)
            case messages.Playback():
                session.pacer.told(message.position_seconds)
            case messages.Stop():
                await session.stop()

    async def _start(self, message: messages.Start) -> None:
        server = self._server
        self._has_none_yet()
        server.access.check_key(bearer(self._websocket.headers) or message.api_key)
        if message.format != "m4s":
            raise Refusal("unsupported", f"format {message.format[:32]!r}: m4s is what is sent")
        fields = {"prompt": message.prompt, **message.others}
        asked = request_of(fields, server.call, server.checked.checkpoint, server.loras)
        lead = message.lead
        if lead is None and message.streaming_buffer_seconds is not None:
            request = asked.request
            lead = max(1.0, message.streaming_buffer_seconds * request.fps / request.frames_per_chunk)
        session_id = uuid.uuid4().hex
        request = await self._with_start(message, asked.request, server.sessions.folder_of(session_id))
        session, control, view = await server.sessions.create(session_id, request, lead, asked.is_endless)
        self._transition = max(1, message.transition_chunks)
        ignored = [*asked.ignored, *(["model"] if message.model not in (None, server.checked.model) else [])]
        tokens = {"control_token": control, "view_token": view, "ignored": ignored}
        self._follow(session, tokens, 0, session.take_control)
        server.sessions.admit()
        if server.pipeline is None:
            self._outlet.say({"type": "session.status", "text": server.doing})

    async def _with_start(self, message: messages.Start, request: Request, folder: Path) -> Request:
        """The request with the picture or clip to start from, which is checked and kept in the session's folder."""
        if message.image is not None and message.video is not None:
            raise Refusal("invalid_request", "image and video: give one of the two")
        for field, kind in (("image", PICTURE), ("video", CLIP)):
            given = getattr(message, field)
            if given is not None:
                kept = await self._server.uploads.keep(given, folder, field, (kind,), request.frames_per_chunk)
                return replace(request, **{field: str(kept.path.absolute())})
        return request

    def _attach(self, message: messages.Attach) -> None:
        self._has_none_yet()
        session = self._server.sessions.steered(message.session_id, message.token)
        about = {"view_token": view_token(message.token)} if matches(message.token, session.recording.control) else {}
        self._follow(session, {**about, "ignored": []}, message.from_chunk, session.take_control)

    def _has_none_yet(self) -> None:
        if self._session is not None:
            raise Refusal("already_started", "this connection has a session; open another one for another session")

    async def _change(self, change: messages.Change) -> None:
        event_id = change.event_id or uuid.uuid4().hex
        transition = self._transition if change.transition_chunks is None else max(1, change.transition_chunks)
        made = await self._session.change(event_id, change.event.prompt, transition)
        session = self._session
        self._outlet.say(telling.queued(session.recording, session.store, made, session.pacer.played))
