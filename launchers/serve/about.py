"""What the server says of itself.

`/health`: the process answers. `/ready`: it takes sessions; 503 while weights load. `/metrics`: for Prometheus.
`/v1/server`: what the page, or any client, needs to know before it starts a session; nothing secret.
"""

from __future__ import annotations

import functools
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from helios_cp.config.request import Request
from launchers.serve.access import bearer
from launchers.serve.answers import RETRY_SECONDS
from launchers.serve.media.store import blank_mime
from launchers.serve.metrics import CONTENT_TYPE
from launchers.serve.realtime.messages import MOST_PROMPT
from launchers.serve.server import Server

SAMPLES = (
    "a red fox running through fresh snow",
    "a lighthouse in a storm at night, waves breaking over the rocks",
    "an old steam train crossing a stone bridge in autumn",
    "a jellyfish glowing in the deep sea",
)
TINY_SAMPLES = (
    "a red balloon drifting to the right over a green meadow on a sunny day",
    "a white sailing boat on the sea at sunset",
    "a yellow ball bouncing on the snow at night",
    "a blue car driving to the left through a desert",
)
"""What the embedded models know."""

SIZES = ((640, 384), (384, 640), (512, 512))
TINY_SIZES = ((128, 64),)
"""What the embedded models were trained at; at other sizes they show nothing."""
MOST_TRANSITION = 8
"""Chunks of a transition that a form offers; more are allowed."""

SHOWN = ("negative_prompt", "fps", "num_inference_steps", "pyramid_num_inference_steps_list", "guidance_scale")


def router(server: Server) -> APIRouter:
    routes = APIRouter()
    known = functools.cache(lambda: _known(server))

    @routes.get("/v1/server")
    def about() -> dict[str, Any]:
        state = "ready" if server.is_ready else "draining" if server.is_draining else "loading"
        return {"state": state, "status": server.doing, **known()}

    @routes.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @routes.get("/ready")
    async def ready() -> JSONResponse:
        if server.is_ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": server.doing}, 503, {"Retry-After": str(RETRY_SECONDS)})

    @routes.get("/metrics")
    async def metrics(request: HttpRequest) -> Response:
        """With a key, where the server has one: how much is asked of it is nobody else's business."""
        server.access.check_key(bearer(request.headers))
        return Response(server.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return routes


def _known(server: Server) -> dict[str, Any]:
    call, checked = server.call, server.checked
    request = checked.jobs[0].request
    is_tiny = checked.model.startswith(("tiny-", "random-"))
    return {
        "model": checked.model,
        "chunk_frames": request.frames_per_chunk,
        "mime": blank_mime(request.height, request.width, request.fps),
        "key_required": server.access.needs_key,
        "defaults": _defaults(request, call.lead, checked.checkpoint.is_distilled),
        "limits": {
            "pixels": call.pixels,
            "seconds": call.longest,
            "sessions": call.most_sessions,
            "queue": call.queue,
            "message_bytes": call.message_bytes,
            "upload_bytes": call.upload_bytes,
            "prompt_characters": MOST_PROMPT,
            "transition_chunks": MOST_TRANSITION,
            "sizes": [size for size in (TINY_SIZES if is_tiny else SIZES) if size[0] * size[1] <= call.pixels],
        },
        "loras": server.loras.names,
        "prompts": TINY_SAMPLES if is_tiny else SAMPLES,
    }


def _defaults(request: Request, lead: float, is_distilled: bool) -> dict[str, Any]:
    """What a session has where it does not say; what the checkpoint does not read is left out."""
    ignored = ("negative_prompt", "guidance_scale") if is_distilled else ()
    values = {name: getattr(request, name) for name in SHOWN if name not in ignored}
    found = {name: value for name, value in values.items() if value is not None}
    found |= {"width": request.width, "height": request.height, "seed": request.seed[0], "num_frames": None}
    return {**found, "lead": lead, "transition_chunks": 1}
