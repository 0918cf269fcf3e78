"""`/health`: the process answers. `/ready`: it takes sessions; 503 while weights load. `/metrics`: for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from launchers.serve.access import bearer
from launchers.serve.answers import RETRY_SECONDS
from launchers.serve.metrics import CONTENT_TYPE
from launchers.serve.server import Server


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

    @routes.get("/metrics")
    async def metrics(request: Request) -> Response:
        """With a key, where the server has one: how much is asked of it is nobody else's business."""
        server.access.check_key(bearer(request.headers))
        return Response(server.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return routes
