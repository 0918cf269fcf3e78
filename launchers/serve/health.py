"""`/health`: the process answers. `/ready`: it takes sessions; 503 while weights load."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from launchers.serve.server import Server

RETRY_SECONDS = 5
"""When to ask again."""


def router(server: Server) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @routes.get("/ready")
    async def ready() -> JSONResponse:
        if server.is_ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": server.doing}, 503, {"Retry-After": str(RETRY_SECONDS)})

    return routes
