"""Browser, Ray: the live page in Chromium, on a server that makes videos. Each test is one visit of a user."""

from __future__ import annotations

import signal
import statistics

import av
import pytest
from PIL import Image

from launchers.generate import checks
from launchers.serve.app import build_app
from launchers.serve.run import with_example
from launchers.serve.server import Server
from launchers.serve.web import WebServer, listen, url_of
from tests.browser.conftest import LONGEST
from tests.browser.live_page import LivePage
from tests.launchers.serve.conftest import call_of
from tests.launchers.serve.uploads.files import clip

pytestmark = [pytest.mark.browser, pytest.mark.ray, pytest.mark.slow]

CHUNK = 33
"""Frames."""

FPS = 2
SECONDS = CHUNK / FPS
"""Of a chunk. Once two of a session are there, nothing more is made before the first of them is played: it rests."""

STILL, FAST = 0.1, 16.0
"""Rates of a player, for one that stays where it is, and for one that goes on."""

PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


def test_a_video_plays_while_it_is_made_and_is_steered(open_page, screenshot):
    page = open_page(viewport={"width": 1280, "height": 800})
    page.until(lambda: page.page.text_content("#badge-text") == "Ready", "the server is ready")
    screenshot(page, "start")
    rest(page, "a red balloon drifting to the right over a green meadow on a sunny day")
    page.until(lambda: 0 < page.figure("played") < 2 * FPS and page.figure("made") > 0, "the figures are there")
    first = page.pixels()
    page.play_at(FAST)
    page.until_plays(1.5 * SECONDS)
    assert page.pieces == 1
    assert statistics.pstdev(first[0::4]) > 4 and first != page.pixels(), "a picture, and it moves"

    page.play_at(STILL)
    page.page.select_option("#transition", "2")
    page.type_prompt("a yellow ball bouncing on the snow at night")
    promised = int(page.until_change(r"Received\. Applies from chunk (\d+)")[1])
    assert promised > page.chunk
    screenshot(page, "received")
    page.play_at(FAST)
    shown = int(page.until_change(r"On screen from chunk (\d+), \d+\.\d s after it was sent, over 2 chunks$")[1])
    assert shown == promised <= page.chunk
    page.play_at(STILL)
    page.until(lambda: page.page.locator(".change img:visible").count() == 2, "both have a picture")
    screenshot(page, "live")

    page.page.click("#share")
    link = page.page.input_value("#share-link")
    page.page.keyboard.press("Escape")
    viewer = open_page(link, **PHONE)
    viewer.until(lambda: viewer.time > 0, "a late viewer's video plays")
    assert viewer.page.evaluate("document.getElementById('video').buffered.start(0)") >= SECONDS
    assert not viewer.page.is_visible("#composer") and not viewer.page.is_visible("#pause")
    viewer.until(lambda: viewer.changes, "a viewer is told the prompt")
    screenshot(viewer, "viewer")
    at = page.chunk
    for each in (page, viewer):
        each.play_at(FAST)
    page.until(lambda: page.chunk > at, "the next chunk")
    viewer.until(lambda: viewer.chunk > at, "the viewer has the next chunk")
    assert not [each for each in viewer.sent if "watch" not in each and "ping" not in each]


def test_pause_step_resume_start_over_and_save(open_page, screenshot, tmp_path):
    page = open_page(viewport={"width": 1280, "height": 800}, color_scheme="dark")
    rest(page, "a white sailing boat on the sea at sunset")
    page.page.click("#pause")
    page.until(lambda: page.state == "paused", "it is paused")
    page.play_at(FAST)

    def paused_after(chunk: int) -> bool:
        is_played = page.chunk == chunk and page.figure("lead") < 2 / FPS  # the last frame stays
        return is_played and page.status == f"Paused after chunk {chunk}."

    page.until(lambda: paused_after(1), "what was begun is played, and the page says where it stopped")
    screenshot(page, "paused")
    page.press(".")
    page.until(lambda: paused_after(2), "one step is made and played")
    page.press("p")
    page.until(lambda: page.chunk >= 4, "it goes on")

    page.press("r")
    page.page.fill("#reset-prompt", "a blue car driving to the left through a desert")
    page.page.fill("#reset-seed", "7")
    page.page.press("#reset-seed", "Enter")
    page.until(lambda: len(page.changes) == 2, "a start over is in the history")
    page.until_change(r"On screen from chunk \d+")
    assert page.page.locator(".change-prompt").first.text_content() == "a blue car driving to the left through a desert"

    page.page.click("#stop")
    page.until(lambda: page.status == "Stopped.", "it is stopped")
    with page.page.expect_download() as download:
        page.page.click("#save-video")
    download.value.save_as(tmp_path / "video.mp4")
    with av.open(str(tmp_path / "video.mp4")) as video:
        frames = sum(1 for _ in video.decode(video=0))
    assert frames % CHUNK == 0 and frames >= 5 * CHUNK
    assert page.schedule()["prompt_schedule"][0]["prompt"] == "a blue car driving to the left through a desert"
    page.page.click("#new")
    assert page.state == "idle" and page.page.is_visible("#settings")


def test_a_phone_and_the_keyboard_are_enough(open_page, screenshot):
    page = open_page(**PHONE)
    page.until(lambda: page.page.text_content("#badge-text") == "Ready", "the server is ready")
    assert_fits(page)
    screenshot(page, "phone-start")
    assert_named(page)
    for _ in range(30):  # with the keyboard alone, from the top
        page.page.keyboard.press("Tab")
        if page.page.evaluate("document.activeElement.id") == "prompt":
            break
    page.page.keyboard.type("a red balloon over a green meadow")
    page.page.keyboard.press("Enter")
    page.until(lambda: page.chunk >= 1, "the second chunk is on screen")
    assert_fits(page)
    assert_named(page)
    screenshot(page, "phone-live")
    page.page.keyboard.press("Escape")
    page.page.keyboard.press("p")
    page.until(lambda: page.state == "paused", "p pauses")
    page.page.keyboard.press("/")
    assert page.page.evaluate("document.activeElement.id") == "prompt"
    page.page.reload()
    page.until(lambda: page.state == "paused", "a reload comes back to the session")
    page.until(lambda: page.page.is_visible(".change img"), "with the pictures of its prompts")
    page.press("p")
    page.until(lambda: page.state == "running", "and steers it")


def test_a_second_user_waits_in_the_queue(open_page):
    first, second = open_page(), open_page()
    rest(first, "a fox")
    second.choose(fps=FPS)
    second.type_prompt("a bird")
    second.until(lambda: second.status == "Number 1 of 1 in the queue…", "the second is told its place")
    first.stop_if_running()
    second.until(lambda: second.time > 0, "then it plays")


def test_bad_settings_are_told_in_one_line_and_keep_the_prompt(open_page):
    page = open_page()
    page.page.wait_for_selector(".field:visible")
    page.choose(num_frames=10**9)
    page.type_prompt("a fox")
    page.page.wait_for_selector("#alert:visible")
    assert str(LONGEST) in page.page.text_content("#alert-text"), "what is allowed"
    assert page.state == "idle" and page.page.input_value("#prompt") == "a fox"


def test_a_server_that_is_killed_and_started_again_goes_on_with_the_video(open_page, server, screenshot):
    page = open_page()
    rest(page, "a red balloon drifting to the right over a green meadow on a sunny day")
    page.play_at(FAST)
    page.until(lambda: page.chunk >= 1, "the second chunk is on screen")
    server.end(signal.SIGKILL)
    page.until(lambda: page.page.text_content("#badge-text") == "Reconnecting", "the page has seen it")
    screenshot(page, "reconnecting")
    before = page.time, page.chunk
    server.start()
    page.until(lambda: page.page.text_content("#badge-text") == "Live", "the page has come back")
    page.until(lambda: page.chunk >= before[1] + 3, "chunks follow on")
    assert page.time > before[0]
    assert page.page.is_hidden("#alert"), page.page.text_content("#alert-text")
    page.faults = [each for each in page.faults if "ERR_CONNECTION" not in each and "503" not in each]


def test_a_lost_worker_is_told_and_replaced(open_page, server, screenshot):
    page = open_page()
    rest(page, "a white sailing boat on the sea at sunset")
    page.keep_status()
    server.signal_worker("DenoiserRank", signal.SIGKILL)
    page.until(lambda: any("is being replaced" in text for text in page.said), "the page says what is happening")
    screenshot(page, "replaced")
    page.play_at(FAST)
    at = page.chunk
    page.until(lambda: page.chunk >= at + 3, "it goes on")
    assert page.page.is_hidden("#alert"), page.page.text_content("#alert-text")


def rest(page: LivePage, prompt: str) -> None:
    """A session, two chunks of which are there."""
    page.choose(fps=FPS)
    page.type_prompt(prompt)
    page.until(lambda: page.figure("lead") > SECONDS, "two chunks are there")


def assert_fits(page) -> None:
    """Nothing is wider than the screen."""
    assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def assert_named(page) -> None:
    """A screen reader has a name for everything that one can press or fill."""
    lines = [line.strip() for line in page.page.locator("body").aria_snapshot().splitlines()]
    roles = ("button", "textbox", "combobox", "spinbutton")
    unnamed = [line for line in lines if line.removeprefix("- ").rstrip(":") in roles]
    assert not unnamed and sum(line.removeprefix("- ").startswith(roles) for line in lines) > 5


def test_control_without_a_name_is_seen(browser):
    page = browser.new_page()
    page.set_content("<button></button>" + "<button>a</button>" * 9)
    with pytest.raises(AssertionError):
        assert_named(type("Named", (), {"page": page}))
    page.close()


def test_a_video_starts_from_a_picture_or_clip_with_a_lora(open_page, tmp_path):
    page = open_page()
    page.until(lambda: page.page.text_content("#badge-text") == "Ready", "the server is ready")
    red = tmp_path / "red.png"
    Image.new("RGB", (128, 64), (210, 30, 30)).save(red)
    page.bring("dragenter", "red.png", red.read_bytes(), "image/png")
    assert page.page.is_visible(".drop-hint"), "the page says that it takes the file"
    page.bring("drop", "red.png", red.read_bytes(), "image/png")
    assert page.page.is_visible("#file-image") and page.page.text_content("#file-name") == "red.png"
    assert page.page.is_hidden(".drop-hint")
    page.bring("drop", "notes.txt", b"a fox", "text/plain")
    assert "notes.txt is neither a picture nor a clip" in page.page.text_content("#alert-text")
    page.page.click("#alert-close")
    page.page.set_input_files("#file", {"name": "clip.mp4", "mimeType": "video/mp4", "buffer": clip(width=128)})
    assert page.page.is_visible("#file-video") and page.page.is_hidden("#file-image"), "the last one counts"
    page.page.click("#file-remove")
    assert page.page.is_hidden("#file-chosen")
    page.bring("paste", "pasted.png", red.read_bytes(), "image/png")
    page.page.select_option("#settings [name=lora]", "ink")
    page.choose(seed=7, fps=1, pyramid_num_inference_steps_list="1 1 1")
    page.type_prompt("a red balloon over a green meadow")
    page.until(lambda: page.time > 0, "the video plays")
    first_red, first_green = page.pixels()[0::4], page.pixels()[1::4]
    assert statistics.mean(first_red) > statistics.mean(first_green), "the picture is where it starts"
    made = page.schedule()
    assert (made["image"], made["video"]) == ("start.png", None)
    assert made["lora"] == [{"path": "ink.safetensors", "weight": 1.0}]
    assert (made["seed"], made["fps"], made["pyramid_num_inference_steps_list"]) == ([7], 1, [1, 1, 1])

    page.stop_if_running()
    page.page.click("#new")
    page.page.set_input_files("#file", {"name": "clip.mp4", "mimeType": "video/mp4", "buffer": clip(width=128)})
    page.page.select_option("#settings [name=lora]", "")
    page.type_prompt("a yellow ball bouncing on the snow at night")
    page.until(lambda: page.time > 0, "the video plays")
    made = page.schedule()
    assert (made["image"], made["video"], made["lora"]) == (None, "start.mp4", None)
    moving = "document.getAnimations().length"
    assert page.page.evaluate(moving) > 0
    page.page.emulate_media(reduced_motion="reduce")
    assert page.page.evaluate(moving) == 0, "nothing moves but the video for those who want no motion"


def test_the_page_says_that_weights_load(browser, tmp_path, presets):
    """By a server whose workers never come; a session may be asked for already, and waits."""
    call = call_of(tmp_path, model=str(presets["random-distilled"]), device="cpu")
    server = Server(call, checks.check_session(with_example(call), None, 1, "cpu"))
    with listen("127.0.0.1", 0) as listener, WebServer(build_app(server), listener, call.message_bytes):
        page = LivePage(browser.new_page(), url_of(listener))
        page.goto()
        page.until(lambda: page.status == "Loading weights…", "the page says what it waits for")
        assert page.page.text_content("#badge-text") == "Loading"
        page.type_prompt("a fox")
        page.until(lambda: page.state == "queued" and page.status == "Loading weights…", "the session waits for them")
        page.stop_if_running()
        assert page.status == "Stopped." and not page.faults
        page.page.close()


def test_a_link_that_is_wrong_says_so(open_page, server):
    page = open_page(f"{server.url}/#watch=0123&token=4567")
    page.until(lambda: page.state == "done", "the page gives up")
    assert page.status.startswith("Ended: ") and "0123" in page.status
    page.page.click("#new")
    assert page.state == "idle" and page.page.evaluate("location.hash") == ""
