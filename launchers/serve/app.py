"""The web application: every router of the server, and the gate around them."""

from __future__ import annotations

from fastapi import FastAPI

from launchers.serve import about, answers
from launchers.serve.gate import Gate
from launchers.serve.limits import Rates
from launchers.serve.page import routes as page
from launchers.serve.realtime import control, watch
from launchers.serve.server import Server
from launchers.serve.sessions import routes as sessions
from launchers.serve.videos import routes as videos


def build_app(server: Server) -> FastAPI:
    """No generated documentation pages: they load scripts from elsewhere."""
    app = FastAPI(title="Helios live", docs_url=None, redoc_url=None, openapi_url=None)
    for module in (about, page, control, watch, sessions, videos):
        app.include_router(module.router(server))
    answers.install(app)
    rates, most = Rates(server.call.requests), server.call.message_bytes
    app.add_middleware(Gate, access=server.access, rates=rates, log=server.log, most_bytes=most)
    return app
