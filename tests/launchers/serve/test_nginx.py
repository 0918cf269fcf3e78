"""Ray, and nginx where it is installed: the example configuration of docs/ before a real server."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.launchers.conftest import PATIENCE
from tests.launchers.serve.client import Client
from tests.launchers.serve.conftest import KEY
from tests.launchers.serve.running import free_port

CONFIGURATION = Path(__file__).parents[3] / "docs" / "nginx-live.conf"
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed; apt-get install nginx-light"),
]


@pytest.fixture(scope="module")
def nginx(running_server, tmp_path_factory):
    """Its address. Of the configuration only ports and folders are others."""
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    text = CONFIGURATION.read_text()
    for before, after in (
        ("server 127.0.0.1:8000", f"server {running_server.url.removeprefix('http://')}"),
        ("listen 80;", f"listen 127.0.0.1:{port};"),
        ("/var/cache/nginx/helios-live", str(folder / "cache")),
        ("/var/log/nginx/helios-live.log", str(folder / "access.log")),
    ):
        assert before in text
        text = text.replace(before, after)
    (folder / "live.conf").write_text(text)
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};" for name in ("proxy", "fastcgi", "uwsgi", "scgi", "client_body")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/error.log; events {{}}"
        f"http {{ {temporary} include {folder}/live.conf; }}"
    )
    with subprocess.Popen([NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf")]) as process:
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
            while True:
                try:
                    assert httpx.get(f"{url}/health").status_code == 200
                    break
                except httpx.ConnectError:
                    assert process.poll() is None and time.monotonic() < deadline, (folder / "error.log").read_text()
                    time.sleep(0.1)
            yield url, folder
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def session(nginx):
    """Two chunks that were made and watched through nginx: id, tokens, and the client that started it."""
    url, _ = nginx
    headers = {"Authorization": f"Bearer {KEY}", "Origin": url}
    with Client(f"{url}/v1/realtime/video", additional_headers=headers) as client:
        start = client.start(num_frames=66)
        client.until("session.done")
        yield start, client


def test_websockets_pass(session):
    start, client = session
    assert client.init
    assert [metadata["chunk"] for metadata, _ in client.chunks] == [0, 1]
    assert start["session_id"]


def test_segments_are_fetched_once_and_for_holders_of_the_token_alone(nginx, session):
    url, folder = nginx
    start, client = session
    address = f"{url}/v1/sessions/{start['session_id']}/hls"
    token = {"token": start["view_token"]}
    playlist = httpx.get(f"{address}/live.m3u8", params=token)
    assert playlist.status_code == 200
    names = re.findall(r"^(\d+\.m4s\?token=.*)$", playlist.text, re.MULTILINE)
    assert len(names) == 2
    for name, (_, media) in zip(names, client.chunks, strict=True):
        answers = [httpx.get(f"{address}/{name}") for _ in range(3)]
        assert [each.headers["x-cache"] for each in answers] == ["MISS", "HIT", "HIT"]
        assert all(each.content == media for each in answers)
        assert "immutable" in answers[2].headers["cache-control"]
        assert "public" in answers[2].headers["cache-control"]
        for wrong in ({}, {"token": "x" * 32}, {"token": start["view_token"][:-1]}):
            assert httpx.get(f"{address}/{name.partition('?')[0]}", params=wrong).status_code == 401
    assert httpx.get(f"{address}/init.mp4", params=token).content == client.init
    assert start["view_token"] not in (folder / "access.log").read_text()


def test_what_is_not_in_the_address_is_not_for_shared_caches(nginx, session):
    url, _ = nginx
    start, _ = session
    address = f"{url}/v1/sessions/{start['session_id']}/hls/00000.m4s"
    for wrong in ({}, {"token": "x" * 32}):
        answer = httpx.get(address, params=wrong, headers={"Authorization": f"Bearer {start['view_token']}"})
        assert answer.status_code == 200
        assert "private" in answer.headers["cache-control"]
    assert httpx.get(address).status_code == 401


def test_all_else_passes_with_its_headers(nginx):
    url, _ = nginx
    page = httpx.get(url)
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert httpx.get(f"{url}/metrics").status_code == 403
    assert httpx.get(f"{url}/v1/videos").status_code == 401
    assert httpx.get(f"{url}/v1/videos", headers={"Authorization": f"Bearer {KEY}"}).json()["data"] == []
    other = httpx.post(f"{url}/v1/videos", headers={"Origin": "https://evil.example"})
    assert (other.status_code, other.json()["error"]["code"]) == (403, "forbidden")
