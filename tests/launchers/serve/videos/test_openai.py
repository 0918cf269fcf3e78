"""Ray: the `openai` package as the client of a real server that makes videos on the CPU."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI

from tests.launchers.conftest import PATIENCE, frames_in
from tests.launchers.serve.conftest import KEY, QUEUE
from tests.launchers.serve.running import RunningServer, wait_until
from tests.launchers.serve.uploads.files import picture

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

PROMPT = "a red fox that nobody shall read about"
DOCS = Path(__file__).parents[4] / "docs" / "serving.md"
SMALL = {"prompt": PROMPT, "size": "64x64"}
LONG = {"num_frames": 33 * 300}
"""Nobody waits for its end."""


@pytest.fixture
def server(running_server):
    return running_server


@pytest.fixture
def client(server):
    with client_of(server) as client:
        yield client
        for video in client.videos.list():
            client.videos.delete(video.id)
        wait_until(lambda: not [each for each in (server.data / "videos").iterdir() if each.name.startswith("video_")])


def client_of(server: RunningServer, key: str = KEY) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)


def test_a_video_from_text(server, client, tmp_path):
    made = client.videos.create(**SMALL, seconds="2")
    assert (made.status, made.progress, made.prompt, made.size) == ("queued", 0, PROMPT, "64x64")
    seen = [made.progress]
    while made.status not in ("completed", "failed"):
        time.sleep(0.05)
        made = client.videos.retrieve(made.id)
        seen.append(made.progress)
    assert made.status == "completed", made.error
    assert seen == sorted(seen)
    assert set(seen) <= {0, 50, 99, 100}
    assert made.completed_at >= made.created_at
    client.videos.download_content(made.id).write_to_file(tmp_path / "video.mp4")
    assert frames_in(tmp_path / "video.mp4") == 66  # 2 s in whole chunks
    whole = (tmp_path / "video.mp4").read_bytes()
    address, key = f"{server.url}/v1/videos/{made.id}/content", {"Authorization": f"Bearer {KEY}"}
    part = httpx.get(address, headers={**key, "Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, whole[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(whole)}"
    assert httpx.get(address, headers={**key, "Range": "bytes=99999999-"}).status_code == 416
    folder = server.data / "videos" / made.id
    wait_until(lambda: sorted(each.name for each in folder.iterdir()) == ["video.json", "video.mp4"])


def test_a_video_from_a_picture(client, tmp_path):
    (tmp_path / "fox.png").write_bytes(picture())
    made = client.videos.create_and_poll(
        **SMALL, input_reference=tmp_path / "fox.png", extra_body={"num_frames": 33, "seed": 3}, poll_interval_ms=100
    )
    assert made.status == "completed", made.error
    other = client.videos.create_and_poll(**SMALL, extra_body={"num_frames": 33, "seed": 3}, poll_interval_ms=100)
    assert client.videos.download_content(made.id).read() != client.videos.download_content(other.id).read()


def test_the_same_seed_is_the_same_video(client):
    extra = {
        "extra_body": {
            "num_frames": 33,
            "seed": 5,
            "fps": 12,
            "extra_params": {"keep_first_frame": False, "history_sizes": [8, 2, 1]},
        }
    }
    videos = [client.videos.create_and_poll(**SMALL, **extra, poll_interval_ms=100) for _ in range(2)]
    assert videos[0].seconds == "2.75"
    first, second = (client.videos.download_content(each.id).read() for each in videos)
    assert first == second


def test_an_adapter_by_its_name(client):
    fields = {"num_frames": 33, "seed": 5}
    strong = {"name": "ink", "scale": 2.0}
    choices = [{}, {"lora": "ink"}, {"lora": strong}, {"lora": json.dumps([strong])}]
    made = [
        client.videos.create_and_poll(**SMALL, extra_body={**fields, **each}, poll_interval_ms=100) for each in choices
    ]
    plain, adapted, stronger, again = (client.videos.download_content(each.id).read() for each in made)
    assert len({plain, adapted, stronger}) == 3 and stronger == again
    with pytest.raises(openai.BadRequestError, match="allowed are ink") as refused:
        client.videos.create(**SMALL, extra_body={"lora": "style"})
    assert refused.value.param == "lora"


def test_pages_of_a_list(client):
    made = [client.videos.create(**SMALL, extra_body=LONG).id for _ in range(3)]
    page = client.videos.list(limit=2)
    assert [each.id for each in page.data] == made[:0:-1]
    assert [each.id for each in client.videos.list(limit=2)] == made[::-1]  # goes from page to page
    assert [each.id for each in client.videos.list(limit=2, order="asc")] == made
    assert {each.status for each in page.data} == {"queued"}


def test_a_deleted_video_is_made_no_further(server, client):
    made = client.videos.create(**SMALL, extra_body=LONG)
    wait_until(lambda: client.videos.retrieve(made.id).progress > 0)
    with pytest.raises(openai.ConflictError, match="in_progress"):
        client.videos.download_content(made.id)
    deleted = client.videos.delete(made.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (made.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(made.id)
    wait_until(lambda: not (server.data / "videos" / made.id).exists())
    after = client.videos.create_and_poll(**SMALL, extra_body={"num_frames": 33}, poll_interval_ms=100)
    assert after.status == "completed"  # long before the deleted one would have ended


def test_errors_are_those_of_the_package(server, client):
    with pytest.raises(openai.AuthenticationError), client_of(server, "wrong") as stranger:
        stranger.videos.list()
    with pytest.raises(openai.BadRequestError, match="multiples of") as refused:
        client.videos.create(prompt="a fox", size="65x64")
    assert (refused.value.param, refused.value.code) == ("width", "invalid_request")
    with pytest.raises(openai.BadRequestError, match="SVG"):
        client.videos.create(**SMALL, input_reference=("a.png", b"<svg/>", "image/png"))
    with pytest.raises(openai.BadRequestError, match="nothing is fetched"):
        client.videos.create(**SMALL, extra_body={"input_reference": {"image_url": "http://127.0.0.1:1/"}})
    with pytest.raises(openai.NotFoundError, match="this server has"):
        client.videos.create(**SMALL, model="sora-2")
    for act in (client.videos.retrieve, client.videos.delete, client.videos.download_content):
        with pytest.raises(openai.NotFoundError):
            act("video_0")
    for _ in range(1 + QUEUE):
        client.videos.create(**SMALL, extra_body=LONG)
    with pytest.raises(openai.InternalServerError, match="wait already") as busy:
        client.videos.create(**SMALL)
    assert busy.value.status_code == 503


def test_no_secret_and_no_prompt_is_logged(server):
    """Of the whole run up to here, and of a video and a stranger more."""
    with client_of(server) as client:
        client.videos.delete(client.videos.create_and_poll(**SMALL, extra_body={"num_frames": 33}).id)
    httpx.post(f"{server.url}/v1/videos?key={KEY}&token={KEY}", json={"prompt": PROMPT, "key": KEY})
    text = server.log.read_text()
    assert KEY not in text
    assert "nobody shall read" not in text
    lines = server.events()
    assert {"video.created", "video.finished", "video.deleted", "request"} <= {line["event"] for line in lines}
    assert all(re.fullmatch(r"[0-9T:.-]+Z", line["time"]) for line in lines)


def test_the_example_of_the_docs(server, client, tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[1]
    for before, after in (("http://127.0.0.1:8000", server.url), ("KEY", KEY), ("640x384", "64x64"), ('"4"', '"1"')):
        assert before in code
        code = code.replace(before, after)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert frames_in(tmp_path / "fox.mp4") == 33
