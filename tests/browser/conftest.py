"""A real browser and a real server. Both are started once for the tests of this folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.browser.live_page import LivePage
from tests.launchers.conftest import write_adapter
from tests.launchers.serve.running import RunningServer, free_port

SIZE = ("--height", "64", "--width", "128")
"""That the embedded models know."""

LONGEST = 6000
"""Seconds of video, which a test in a hurry plays faster than a user does."""

SCREENSHOTS = Path(__file__).parents[2] / "outputs" / "browser"
FLAGS = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required", "--disable-dev-shm-usage", "--disable-gpu"]
"""Of Chromium: a container's root has no sandbox and little shared memory; a phone's user would press play; there is no
GPU, and playing that there is one takes time."""


@pytest.fixture(scope="session")
def chromium() -> str:
    """Debian's own build, which has the patented decoders; that of playwright's download lacks H.264."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    return path


@pytest.fixture(scope="package")
def browser(chromium):
    """Not for longer: playwright keeps an event loop running in this thread, and other tests have their own."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def server(tmp_path_factory, chromium) -> Iterator[RunningServer]:
    """On a port that a second start has too, because pages come back to it. It decodes where it denoises, which no page
    can tell from a decoder of its own."""
    folder = tmp_path_factory.mktemp("live")
    (folder / "loras").mkdir()
    write_adapter(folder / "loras" / "ink.safetensors", width=128)
    flags = [*SIZE, "--decoders", "0", "--lora-folder", str(folder / "loras"), "--longest", str(LONGEST)]
    with RunningServer(folder, "tiny-distilled", *flags, port=free_port()) as server:
        yield server


@pytest.fixture
def open_page(browser, server) -> Iterator[Callable[..., LivePage]]:
    """Opens the page, each time in a context of its own, as another user has. At the end no session is left running,
    and nothing has gone wrong in any of them that its test did not expect."""
    opened: list[LivePage] = []

    def open_page(address: str = "", **options) -> LivePage:
        context = browser.new_context(**options)
        page = LivePage(context.new_page(), server.url)
        opened.append(page)
        page.goto(address)
        return page

    yield open_page
    for page in opened:
        page.stop_if_running()
        page.page.context.close()
        assert not page.faults, page.faults


@pytest.fixture
def screenshot(request) -> Callable[[LivePage, str], None]:
    """Keeps a picture in outputs/browser."""

    def keep(page: LivePage, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.page.screenshot(path=SCREENSHOTS / f"{name}.png")

    return keep
