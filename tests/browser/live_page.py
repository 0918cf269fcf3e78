"""The live page as a user has it: what is on screen, and what the keyboard and the mouse do."""

from __future__ import annotations

import base64
import json
import re
import time
from typing import Any
from urllib.parse import urlsplit

from tests.launchers.conftest import PATIENCE

POLL = 0.05
"""Seconds between two looks at a condition."""

PIXELS = """() => {
  const video = document.getElementById("video");
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [48, 32];
  const context = canvas.getContext("2d");
  context.drawImage(video, 0, 0, 48, 32);
  return Array.from(context.getImageData(0, 0, 48, 32).data);
}"""

PLAY_AT = """(rate) => {
  const video = document.getElementById("video");
  video.playbackRate = video.defaultPlaybackRate = rate;
}"""

KEEP_STATUS = """() => {
  const status = document.getElementById("status");
  window.said = [];
  new MutationObserver(() => window.said.push(status.textContent)).observe(status, {
    childList: true, characterData: true, subtree: true,
  });
}"""

BRING = """([event, name, content, kind]) => {
  const data = new DataTransfer();
  data.items.add(new File([Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0))], name, { type: kind }));
  const also = { bubbles: true, cancelable: true };
  if (event === "paste") document.body.dispatchEvent(new ClipboardEvent(event, { ...also, clipboardData: data }));
  else document.body.dispatchEvent(new DragEvent(event, { ...also, dataTransfer: data }));
}"""


class LivePage:
    """`faults` are errors of the console, refusals of the page's policy, and requests to others than the server."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.faults: list[str] = []
        self.sent: list[str] = []
        self._url = url
        page.set_default_timeout(1000 * PATIENCE)
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        page.on("request", lambda request: self._asked(request.url))
        page.on("websocket", self._connected)

    def goto(self, address: str = "") -> None:
        self.page.goto(address or f"{self._url}/")

    # What is on screen

    @property
    def state(self) -> str:
        return self.page.evaluate("document.body.dataset.state")

    @property
    def time(self) -> float:
        """Of the video, in seconds."""
        return self.page.evaluate("document.getElementById('video').currentTime")

    @property
    def status(self) -> str:
        return self.page.text_content("#status")

    def keep_status(self) -> None:
        """From here on, in `said`."""
        self.page.evaluate(KEEP_STATUS)

    @property
    def said(self) -> list[str]:
        return self.page.evaluate("window.said")

    @property
    def pieces(self) -> int:
        """Of the video that is there: one, if nothing is missing in between."""
        return self.page.evaluate("document.getElementById('video').buffered.length")

    @property
    def chunk(self) -> int:
        """The one on screen; -1 before the first."""
        return int(self.page.evaluate("document.querySelector('.strip [data-state=now] small')?.textContent ?? -1"))

    @property
    def changes(self) -> list[str]:
        """What became of each prompt, newest first."""
        return self.page.locator(".change-state").all_text_contents()

    def figure(self, name: str) -> float:
        return float(self.page.text_content(f"#{name}").replace("–", "nan"))

    def pixels(self) -> list[int]:
        """Red, green, blue and alpha of the picture on screen, made small."""
        return self.page.evaluate(PIXELS)

    def schedule(self) -> dict[str, Any]:
        """The file that makes the video again."""
        with self.page.expect_download() as download:
            self.page.click("#save-schedule")
        return json.loads(download.value.path().read_text())

    # What the user does

    def bring(self, event: str, name: str, content: bytes, kind: str) -> None:
        """A file that is dropped on the page, or pasted."""
        self.page.evaluate(BRING, [event, name, base64.b64encode(content).decode(), kind])

    def choose(self, **settings: str) -> None:
        for name, value in settings.items():
            self.page.fill(f"#settings [name={name}]", str(value))

    def type_prompt(self, text: str) -> None:
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")

    def press(self, key: str) -> None:
        """While the focus is in no field."""
        self.page.locator("body").press(key)

    def play_at(self, rate: float) -> None:
        """How fast the video is played, from here on: so no test waits for it, or has to be as fast."""
        self.page.evaluate(PLAY_AT, rate)

    def stop_if_running(self) -> None:
        stop = self.page.locator("#stop:enabled:visible")
        if stop.count():
            self.page.keyboard.press("Escape")
            stop.click()
            self.until(lambda: self.state == "done", "the session ends")

    # Waiting

    def until(self, condition, what: str) -> Any:
        """The first true value of a condition. `wait_for_function` of playwright would need `unsafe-eval`."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            found = condition()
            if found:
                return found
            self.page.wait_for_timeout(1000 * POLL)
        seen = f"{self.state}, {self.time:.2f} s, {self.status!r}, {self.changes}, {self.faults}"
        raise AssertionError(f"not within {PATIENCE} s: {what}; on the page: {seen}")

    def until_plays(self, seconds: float) -> None:
        self.until(lambda: self.time > seconds, f"{seconds} s are played")

    def until_change(self, pattern: str, place: int = 0) -> re.Match[str]:
        """What is said of the change in a place of the history."""
        return self.until(lambda: re.search(pattern, self.changes[place]), f"a change is told as {pattern!r}")

    # What must not happen

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(f"{message.type}: {message.text}")

    def _asked(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("blob", "data") and parts.netloc != urlsplit(self._url).netloc:
            self.faults.append(f"a request to {url}")

    def _connected(self, socket: Any) -> None:
        self._asked(socket.url)
        socket.on("framesent", lambda frame: self.sent.append(str(frame)[:40]))
