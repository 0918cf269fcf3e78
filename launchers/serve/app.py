"""The web application: every router of the server, by one line each."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, FastAPI

from launchers.serve import about, answers
from launchers.serve.gate import Gate
from launchers.serve.limits import Rates
from launchers.serve.page import routes as page
from launchers.serve.realtime import control, watch
from launchers.serve.server import Server
from launchers.serve.sessions import routes
from launchers.serve.videos import routes as videos

ROUTERS: tuple[Callable[[Server], APIRouter], ...] = (
    about.router,
    page.router,
    control.router,
    watch.router,
    routes.router,
    videos.router,
)
"""Each makes its routes for a server."""


def build_app(server: Server) -> FastAPI:
    """No generated documentation pages: they load scripts from elsewhere."""
    app = FastAPI(title="Helios live", docs_url=None, redoc_url=None, openapi_url=None)
    for router in ROUTERS:
        app.include_router(router(server))
    answers.install(app)
    rates, most = Rates(server.call.requests), server.call.message_bytes
    app.add_middleware(Gate, access=server.access, rates=rates, log=server.log, most_bytes=most)
    return app
