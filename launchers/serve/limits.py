"""How much of the server one may take: its flags, and the checks that need nothing but them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from helios_cp.config.arguments import flag
from helios_cp.config.request import Request
from launchers.serve.problems import Refusal

MOST_CALLERS = 10_000
"""Whose requests are counted at a time; those who have asked for nothing the longest are forgotten."""


MOST_STEPS, MOST_TOKENS, MOST_HISTORY, MOST_LATENT_FRAMES = 1000, 1024, 100, 33
"""Of a chunk, whoever asks: what grows with these is the memory and time of one forward pass."""


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
        """Raises `Refusal` for a resolved request that would take more of the machines than one may.

        A single chunk is never too long.
        """
        if request.width * request.height > self.pixels:
            size = f"{request.width}x{request.height}"
            raise Refusal("invalid_request", f"size {size}: {self.pixels} pixels at most are allowed", param="size")
        seconds = request.num_chunks * request.frames_per_chunk / request.fps
        if seconds > self.longest and request.num_chunks > 1:
            raise Refusal(
                "invalid_request", f"seconds {seconds:g}: {self.longest:g} at most are allowed", param="seconds"
            )
        steps = (request.num_inference_steps or 0, *(request.pyramid_num_inference_steps_list or ()))
        for name, value, most in (
            ("steps", sum(steps), MOST_STEPS),
            ("max_sequence_length", request.max_sequence_length, MOST_TOKENS),
            ("history_sizes", sum(request.history_sizes), MOST_HISTORY),
            ("num_latent_frames_per_chunk", request.num_latent_frames_per_chunk, MOST_LATENT_FRAMES),
        ):
            if value > most:
                raise Refusal("invalid_request", f"{name} {value}: {most} at most are allowed", param=name)


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
