"""Browser: the page's player alone, fed with fragments as the server makes them. No server runs."""

from __future__ import annotations

import base64
import time

import pytest
import torch

from helios_cp.files.mp4 import encode_segment
from launchers.serve.media.fragments import fragment, mime
from launchers.serve.page.routes import TYPES, read_page
from tests.browser.conftest import FLAGS
from tests.launchers.conftest import PATIENCE

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ADDRESS = "http://127.0.0.1:1"
"""Nothing listens there: the page's files are given to the browser without a network."""

FRAMES, FPS = 33, 24
SECONDS = FRAMES / FPS

HTML = b"""<!doctype html><title>A player</title><video id="video" muted playsinline width="320"></video>"""

PLAYER = """async () => {
  const { Player } = await import("/page/player.js");
  const video = document.getElementById("video");
  window.told = { skipped: [], broken: [], thrown: [] };
  window.player = new Player(video, {
    skipped: (seconds) => told.skipped.push(seconds),
    broken: (why) => told.broken.push(why),
    blocked: () => {},
  });
  const append = SourceBuffer.prototype.appendBuffer;
  SourceBuffer.prototype.appendBuffer = function (bytes) {
    try {
      append.call(this, bytes);
    } catch (error) {
      told.thrown.push(error.name);
      throw error;
    }
  };
  window.bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;
}"""

BUFFERED = """() => {
  const { buffered } = document.getElementById("video");
  return Array.from({ length: buffered.length }, (_, i) => [buffered.start(i), buffered.end(i)]);
}"""

STATE = """() => {
  const { currentTime, paused, ended, seeking, readyState, playbackRate } = document.getElementById("video");
  return { currentTime, paused, ended, seeking, readyState, playbackRate };
}"""


class Player:
    """`player.js` in a page of its own."""

    def __init__(self, page, height: int = 64, width: int = 96, noise: int = 40) -> None:
        self.page = page
        self._shape, self._noise = (FRAMES, height, width, 3), noise
        self._init = None
        page.route("**/*", self._answer)
        page.goto(f"{ADDRESS}/")
        page.evaluate(PLAYER)

    def open(self) -> None:
        init = self._made(0).init
        self.page.evaluate("([mime, init]) => player.open(mime, bytes(init))", [mime(init), text(init)])

    def append(self, chunk: int, media: bytes | None = None) -> None:
        media = media or self._made(chunk).media
        span = [text(media), chunk * SECONDS, (chunk + 1) * SECONDS]
        self.page.evaluate("([media, start, end]) => player.append(bytes(media), start, end)", span)

    @property
    def time(self) -> float:
        return self.page.evaluate("player.time")

    @property
    def buffered(self) -> list[list[float]]:
        """Start and end of each range, in seconds."""
        return self.page.evaluate(BUFFERED)

    @property
    def told(self) -> dict:
        return self.page.evaluate("told")

    def until(self, condition, what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, f"{what}: {self.page.evaluate(STATE)}, {self.buffered}, {self.told}"
            self.page.wait_for_timeout(50)

    def _made(self, chunk: int):
        generator = torch.Generator().manual_seed(chunk)
        frames = torch.randint(128 - self._noise, 128 + self._noise, self._shape, generator=generator)
        return fragment(encode_segment(frames.to(torch.uint8), FPS), chunk * FRAMES, chunk)

    def _answer(self, route) -> None:
        name = route.request.url.rpartition("/")[2]
        files = read_page()
        if name in files:
            route.fulfill(body=files[name], content_type=TYPES["." + name.rpartition(".")[2]])
        else:
            route.fulfill(body=HTML, content_type="text/html")


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture
def player(browser):
    page = browser.new_page()
    yield Player(page)
    page.close()


def test_chunks_play_on_without_a_gap(player):
    player.open()
    for chunk in range(3):
        player.append(chunk)
    player.until(lambda: player.time > 2.2 * SECONDS, "two borders are passed")
    assert player.told["skipped"] == [] and player.told["broken"] == []
    lead, played = player.page.evaluate("[player.lead, player.time]")
    assert lead == pytest.approx(3 * SECONDS - played, abs=0.5)
    player.page.evaluate("player.end()")
    player.until(lambda: player.page.evaluate("document.getElementById('video').ended"), "the end is reached")


def test_a_browser_that_stops_by_itself_is_nudged(player):
    """One that stands still and does not say so: it is paused behind the player's back."""
    player.open()
    for chunk in range(3):
        player.append(chunk)
    player.until(lambda: player.time > 0.2, "it plays")
    player.page.evaluate("""() => {
      const video = document.getElementById("video");
      video.pause();
      Object.defineProperty(video, "paused", { get: () => false });
    }""")
    stood = player.time
    player.until(lambda: player.time != stood, "it is moved on")
    assert player.time == pytest.approx(stood + 0.05, abs=0.01)
    assert player.told["skipped"] == [] and player.told["broken"] == []


def test_a_late_start_is_no_gap(player):
    player.open()
    player.append(7)
    player.until(lambda: player.time > 7 * SECONDS, "it begins where the first fragment does")
    assert player.told["skipped"] == []


def test_a_missing_chunk_is_jumped_over_and_told(player):
    player.open()
    for chunk in (0, 2):
        player.append(chunk)
    player.until(lambda: player.time > 2 * SECONDS, "it plays on behind the gap")
    assert player.told["skipped"] == [pytest.approx(SECONDS, abs=0.2)]


def test_the_newest_chunk_is_a_click_away(player):
    player.open()
    for chunk in range(6):
        player.append(chunk)
    player.until(lambda: player.buffered and player.buffered[0][1] > 5.9 * SECONDS, "all is there")
    player.page.evaluate("player.goLive()")
    player.until(lambda: player.time > 5 * SECONDS, "it plays the newest")
    assert player.told["skipped"] == []


def test_what_is_played_is_removed(player):
    """Whole fragments, up to 20 s behind the picture."""
    player.open()
    for chunk in range(30):
        player.append(chunk)
    player.page.evaluate("document.getElementById('video').playbackRate = 16")
    oldest = 30 * SECONDS - 20 - 2 * SECONDS
    player.until(lambda: player.buffered[0][0] > oldest, "most is played, and removed")
    first, end = player.buffered[0]
    assert end == pytest.approx(30 * SECONDS, abs=0.1) and first < player.time - 10
    assert first / SECONDS == pytest.approx(round(first / SECONDS), abs=0.05), "a fragment is whole, or gone"
    assert player.told["skipped"] == []


@pytest.fixture(scope="module")
def narrow_browser(browser, chromium):
    """Chromium that is told to keep one megabyte."""
    narrow = browser.browser_type.launch(executable_path=chromium, args=[*FLAGS, "--mse-video-buffer-size-limit-mb=1"])
    yield narrow
    narrow.close()


@pytest.mark.parametrize(("height", "width", "chunks", "fit"), [(96, 144, 10, 3), (160, 240, 3, 1)])
def test_a_full_buffer_waits_and_loses_nothing(narrow_browser, height, width, chunks, fit):
    """Of several chunks; or of a single one, whose end Chromium would play only after the next one has come."""
    player = Player(narrow_browser.new_page(), height, width, noise=90)
    player.open()
    rate = "document.getElementById('video').playbackRate = {}"
    player.page.evaluate(rate.format(0.1))  # so that nothing is played and evicted meanwhile
    for chunk in range(chunks):
        media = player._made(chunk).media
        assert 2**20 // len(media) == fit
        player.append(chunk, media)
    player.until(lambda: player.told["thrown"], "it is full")
    player.page.evaluate(rate.format(1.5))
    player.until(lambda: player.time > (chunks - 0.5) * SECONDS, "all is played")
    assert player.told["skipped"] == [] and player.told["broken"] == []
    assert set(player.told["thrown"]) == {"QuotaExceededError"}


def test_what_cannot_be_decoded_is_told_once(player):
    player.open()
    player.append(0)
    player.until(lambda: player.time > 0, "the first chunk plays")
    player.append(1, b"\x00\x00\x00\x10moof" + 8 * b"\xff")
    player.until(lambda: player.told["broken"], "it is told")
    assert len(player.told["broken"]) == 1
    player.open()
    player.append(0)
    player.until(lambda: player.time > 0.1, "it begins again")


def test_a_browser_without_media_source_is_told_what_is_missing(player):
    """As on an iPhone before iOS 17.1."""
    page = player.page
    page.add_init_script("delete window.MediaSource; delete window.ManagedMediaSource")
    page.reload()
    said = page.evaluate("import('/page/player.js').then(({missing}) => missing('video/mp4'))")
    assert "Media Source Extensions" in said


def test_a_browser_without_the_decoder_is_told_what_is_missing(player):
    script = "mime => import('/page/player.js').then(({missing}) => missing(mime))"
    assert player.page.evaluate(script, 'video/mp4; codecs="avc1.64000b"') is None
    assert "H.264" in player.page.evaluate(script, 'video/mp4; codecs="avc9.000000"')
