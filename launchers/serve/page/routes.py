"""Routes of the page. It holds no secret, so it needs no key; its headers are those of all answers, in `access`."""

from __future__ import annotations

import hashlib
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


def read_page() -> dict[str, bytes]:
    """Name -> content of each file. They are small, and read once."""
    return {path.name: path.read_bytes() for path in files(__package__).iterdir() if suffix_of(path.name) in TYPES}


def suffix_of(name: str) -> str:
    return "." + name.rpartition(".")[2]


def router(_: Server | None = None) -> APIRouter:
    """`/` is the page, `/page/NAME` are the files that it asks for."""
    routes, page = APIRouter(), read_page()

    @routes.get("/", include_in_schema=False)
    def index(request: Request) -> Response:
        return file("index.html", request)

    @routes.get("/page/{name}", include_in_schema=False)
    def file(name: str, request: Request) -> Response:
        """The file, or 304 where the browser has it. `no-cache` makes it ask each time, so a new server is a new
        page."""
        if name not in page:
            raise HTTPException(404, f"/page/{name}: the page has no such file")
        etag = f'"{hashlib.sha256(page[name]).hexdigest()[:32]}"'
        headers = {"etag": etag, "cache-control": "no-cache"}
        if etag in request.headers.get("if-none-match", "").replace("W/", "").split(", "):
            return Response(status_code=304, headers=headers)
        return Response(page[name], media_type=TYPES[suffix_of(name)], headers=headers)

    return routes
