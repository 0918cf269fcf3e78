"""How much of the server one may take: its flags, and the checks that need nothing but them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from helios_cp.config.arguments import flag
from helios_cp.config.request import Request
from launchers.serve.problems import Refusal

MOST_CALLERS = 10_000
"""Whose requests are counted at a time; those who have asked for nothing the longest are forgotten."""


@dataclass(frozen=True)
class Limits:
    """Flags that a server has beside those of a cluster, each with what it refuses."""

    sessions: int | None = flag(
        None, "sessions at a time; more wait in a queue (default: one a group)", "N", group="limits", least=1
    )
    queue: int = flag(64, "sessions that may wait, and videos (default: 64)", "N", least=0)
    longest: float = flag(600.0, "longest session or video, in seconds of video (default: 600)", "SECONDS", least=1)
    idle: float = flag(120.0, "how long a session goes on that nobody watches (default: 120)", "SECONDS", least=1)
    keep: float | None = flag(
        None, "how long a finished session stays on disk (default: until somebody deletes it)", "HOURS", above=0
    )
    viewers: int = flag(1000, "viewers of all sessions together (default: 1000)", "N", least=1)
    pixels: int = flag(1920 * 1088, "largest video, width times height (default: 2088960)", "N", least=1)
    message_bytes: int = flag(
        64 * 2**20, "largest message, with its picture or clip (default: 67108864)", "N", least=4096
    )
    upload_bytes: int = flag(32 * 2**20, "largest picture or clip (default: 33554432)", "N", least=1024)
    requests: int = flag(600, "requests and connections a minute, by key or address (default: 600)", "N", least=1)

    def check_request(self, request: Request) -> None:
        """Raises `Refusal` for a picture or a video that is too large."""
        if request.width * request.height > self.pixels:
            raise Refusal(
                "invalid_request",
                f"size {request.width}x{request.height}: this server makes {self.pixels} pixels at most",
                param="size",
            )
        seconds = request.num_chunks * request.frames_per_chunk / request.fps
        if seconds > self.longest:
            raise Refusal(
                "invalid_request",
                f"seconds {seconds:g}: this server makes {self.longest:g} at most",
                param="seconds",
            )


class Rates:
    """A token bucket for each caller: `a_minute` requests at once, and that many more a minute later."""

    def __init__(self, a_minute: int) -> None:
        self.a_minute = a_minute
        self._spent: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str, now: float) -> None:
        """Count a request at a time of a monotonic clock. Raises `Refusal`."""
        spent, at = self._spent.pop(caller, (0.0, now))
        spent = max(0.0, spent - (now - at) * self.a_minute / 60) + 1
        is_over = spent > self.a_minute
        self._spent[caller] = spent - is_over, now
        if len(self._spent) > MOST_CALLERS:
            self._spent.popitem(last=False)
        if is_over:
            wait = (spent - self.a_minute) * 60 / self.a_minute
            raise Refusal("limit", f"{self.a_minute} requests a minute are allowed; wait", retry_after=wait)
