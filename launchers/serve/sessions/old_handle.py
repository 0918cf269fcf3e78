"""In the place of what a video's handle does not have yet."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any


class OldHandle:
    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._chunk = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def allow(self, chunks: int) -> None:
        self._chunk = chunks

    def change_prompt(self, text: str, *, transition: int = 1) -> Future[int]:
        self._handle.update_prompt(text)
        answer: Future[int] = Future()
        answer.set_result(self._chunk)
        return answer

    def stop(self) -> None:
        self._handle.cancel()
