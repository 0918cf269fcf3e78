"""The web application: every router of the server, by one line each."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, FastAPI

from launchers.serve import health
from launchers.serve.server import Server

ROUTERS: tuple[Callable[[Server], APIRouter], ...] = (health.router,)
"""Each makes its routes for a server."""


def build_app(server: Server) -> FastAPI:
    """No generated documentation pages: they load scripts from elsewhere."""
    app = FastAPI(title="Helios live", docs_url=None, redoc_url=None, openapi_url=None)
    for router in ROUTERS:
        app.include_router(router(server))
    return app
