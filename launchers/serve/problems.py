"""Why something is refused or fails: one table of codes, for HTTP and for WebSockets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from helios_cp.config.errors import RequestError

INVALID = "invalid_request_error"


@dataclass(frozen=True)
class Problem:
    """How a code is told: the status of HTTP, the `type` that OpenAI's clients know, the close code of a WebSocket."""

    status: int
    type: str
    close: int


PROBLEMS = {
    "invalid_message": Problem(400, INVALID, 1008),
    "invalid_request": Problem(400, INVALID, 1008),
    "unsupported": Problem(400, INVALID, 1008),
    "unauthorized": Problem(401, "authentication_error", 1008),
    "forbidden": Problem(403, "permission_error", 1008),
    "not_found": Problem(404, INVALID, 1008),
    "method_not_allowed": Problem(405, INVALID, 1008),
    "too_slow": Problem(408, INVALID, 1008),
    "not_started": Problem(409, INVALID, 1008),
    "already_started": Problem(409, INVALID, 1008),
    "event_id_conflict": Problem(409, INVALID, 1008),
    "not_finished": Problem(409, INVALID, 1008),
    "too_large": Problem(413, INVALID, 1009),
    "limit": Problem(429, "rate_limit_error", 1013),
    "failed": Problem(500, "server_error", 1011),
    "busy": Problem(503, "server_error", 1013),
}
"""By code. `limit` and `busy` come with the seconds after which to try again."""


class Refusal(Exception):
    """`code` is one of `PROBLEMS`; the text is one line that says what is allowed or what to do.

    `param` is the field that is wrong. `retry_after`: seconds.
    """

    def __init__(self, code: str, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @property
    def problem(self) -> Problem:
        return PROBLEMS[self.code]

    @classmethod
    def of(cls, error: RequestError) -> Refusal:
        """What the command line refuses, in the words of the API: `num_frames` in place of `--num-frames`."""
        message = re.sub(r"(?<!\S)--([a-z][a-z-]*)", lambda found: found[1].replace("-", "_"), str(error))
        message = message.replace("pyramid_steps", "pyramid_num_inference_steps_list")
        named = re.match(r"(\w+)[ :]", message)
        return cls("invalid_request", message, param=named and named[1])
