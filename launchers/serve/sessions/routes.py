"""Sessions by HTTP: what there is, their files for players and proxies, and an end to them."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from launchers.serve.access import bearer
from launchers.serve.media.store import INIT, fragment_name
from launchers.serve.problems import Refusal
from launchers.serve.server import Server
from launchers.serve.sessions import telling
from launchers.serve.sessions.session import Session

FOR_EVER = "max-age=31536000, immutable"
"""A chunk's bytes never change."""

Token = Annotated[str | None, Query(max_length=256)]


def router(server: Server) -> APIRouter:
    routes = APIRouter(prefix="/v1/sessions")

    async def viewed(session_id: str, request: Request, token: Token = None) -> Session:
        given = bearer(request.headers) or token or request.cookies.get("view_token")
        session = server.sessions.viewed(session_id, given)
        session.touch()
        return session

    watched = Depends(viewed)

    def described(session: Session) -> dict[str, Any]:
        return {**session.summary(), "position": server.sessions.positions().get(session.id)}

    @routes.get("")
    async def every(request: Request) -> JSONResponse:
        server.access.check_key(bearer(request.headers))
        return JSONResponse({"data": [described(each) for each in server.sessions]})

    @routes.get("/{session_id}")
    async def one(session: Session = watched) -> JSONResponse:
        configuration = telling.configuration(session.recording, server.checked.model)
        return JSONResponse({**described(session), "configuration": configuration})

    @routes.delete("/{session_id}")
    async def delete(session_id: str, request: Request) -> JSONResponse:
        session = server.sessions.steered(session_id, bearer(request.headers))
        await server.sessions.delete(session)
        return JSONResponse({"id": session_id, "deleted": True})

    @routes.get("/{session_id}/chunks")
    async def chunks(session: Session = watched, first: Annotated[int, Query(alias="from", ge=0)] = 0) -> JSONResponse:
        return JSONResponse({"data": session.store.chunks[first:]})

    @routes.get("/{session_id}/schedule.json")
    async def schedule(session: Session = watched, take: int = -1) -> Response:
        takes = session.recording.takes
        if not -1 <= take < len(takes) or not takes:
            raise Refusal("not_found", f"take {take}: the session has {len(takes)}")
        text = json.dumps(session.schedule(take % len(takes)), indent=2)
        attached = {"Content-Disposition": 'attachment; filename="schedule.json"'}
        return Response(text, media_type="application/json", headers=attached)

    @routes.get("/{session_id}/video.mp4")
    async def video(session: Session = watched) -> FileResponse:
        if not session.store.chunks:
            raise Refusal("not_found", "no chunk is made yet; ask again later")
        path = await session.whole_video()
        return FileResponse(path, media_type="video/mp4", filename=f"{session.id}.mp4")

    @routes.get("/{session_id}/hls/live.m3u8")
    async def playlist(session: Session = watched, token: Token = None) -> Response:
        """Its addresses carry the token, as players send no header of their own."""
        query = "" if token is None else f"?token={quote(token)}"
        text = session.store.playlist(session.is_done, query)
        return Response(text, media_type="application/vnd.apple.mpegurl", headers={"Cache-Control": "no-cache"})

    @routes.get("/{session_id}/hls/{name}")
    async def media(name: str, request: Request, session: Session = watched, token: Token = None) -> Response:
        """Caches that many share, as those of a CDN, may keep what the address alone gives a right to."""
        is_by_address = token is not None and bearer(request.headers) is None
        cached = {"Cache-Control": f"{'public' if is_by_address else 'private'}, {FOR_EVER}"}
        store = session.store
        if name == INIT:
            return Response(store.init, media_type="video/mp4", headers=cached)
        number = name.removesuffix(".m4s")
        if not number.isascii() or not number.isdecimal() or len(number) > 9 or name != fragment_name(int(number)):
            raise Refusal("not_found", f"{name[:64]!r}: there is no such file")
        if int(number) >= len(store.chunks):
            raise Refusal("not_found", f"chunk {int(number)} is not made yet")
        content = await asyncio.to_thread(store.media, int(number))
        return Response(content, media_type="video/iso.segment", headers=cached)

    return routes
