"""Refusals as answers of HTTP, in two shapes.

`/v1/videos` answers in OpenAI's shape, so that its clients raise their own exceptions; all else has `code` and
`message`, as messages on a WebSocket do. No traceback reaches a client.
"""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from helios_cp.config.errors import RequestError
from launchers.serve.problems import Refusal

OPENAI_PATH = "/v1/videos"

OF_STATUS = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
"""Codes of what the web framework itself refuses."""

RETRY_SECONDS = 5
"""When to try again, where nothing better is known."""


def answer(path: str, refusal: Refusal) -> JSONResponse:
    """The response to a request for `path`."""
    problem, retry = refusal.problem, refusal.retry_after
    if retry is None and problem.status in (429, 503):
        retry = RETRY_SECONDS
    headers = {} if retry is None else {"Retry-After": str(math.ceil(retry))}
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if problem.status == 408:  # the rest of its request may still come
        headers["Connection"] = "close"
    return JSONResponse(_body(path, refusal), problem.status, headers)


def _body(path: str, refusal: Refusal) -> dict[str, Any]:
    if path != OPENAI_PATH and not path.startswith(OPENAI_PATH + "/"):
        return {"code": refusal.code, "message": str(refusal)}
    error = {"message": str(refusal), "type": refusal.problem.type, "param": refusal.param, "code": refusal.code}
    return {"error": error}


def install(app: FastAPI) -> None:
    """Have the application answer what its routes refuse."""

    async def refused(request: HTTPConnection, error: Exception) -> JSONResponse:
        if request.scope["type"] == "websocket":
            raise error  # to the gate, which closes it
        response = answer(request.url.path, _refusal_of(error))
        if isinstance(error, HTTPException):
            response.headers.update(error.headers or {})
        return response

    for kind in (Refusal, RequestError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, refused)


def _refusal_of(error: Exception) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if isinstance(error, RequestError):
        return Refusal.of(error)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        name = str(first["loc"][-1]) if first["loc"] else "request"
        return Refusal("invalid_request", f"{name}: {first['msg']}", param=name)
    code = OF_STATUS.get(error.status_code, "invalid_request" if error.status_code < 500 else "failed")
    return Refusal(code, str(error.detail))
