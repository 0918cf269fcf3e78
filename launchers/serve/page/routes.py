"""Routes of the page. It holds no secret, so it needs no key; its headers are those of all answers, in `access`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from fastapi import APIRouter, HTTPException, Request, Response

if TYPE_CHECKING:
    from launchers.serve.server import Server

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class PageFile:
    """One file of the page, as it is sent."""

    content: bytes
    media_type: str
    etag: str


def read_page() -> dict[str, PageFile]:
    """Name -> file. They are small, and read once."""
    found = {}
    for path in files(__package__).iterdir():
        media_type = TYPES.get("." + path.name.rpartition(".")[2])
        if media_type:
            content = path.read_bytes()
            found[path.name] = PageFile(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


def router(_: Server | None = None) -> APIRouter:
    """`/` is the page, `/page/NAME` are the files that it asks for."""
    routes, page = APIRouter(), read_page()

    @routes.get("/", include_in_schema=False)
    def index(request: Request) -> Response:
        return answer(page["index.html"], request)

    @routes.get("/page/{name}", include_in_schema=False)
    def file(name: str, request: Request) -> Response:
        if name not in page:
            raise HTTPException(404, f"/page/{name}: the page has no such file")
        return answer(page[name], request)

    return routes


def answer(file: PageFile, request: Request) -> Response:
    """The file, or 304 where the browser has it. `no-cache` makes it ask each time, so a new server is a new page."""
    headers = {"etag": file.etag, "cache-control": "no-cache"}
    if file.etag in request.headers.get("if-none-match", "").replace("W/", "").split(", "):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
