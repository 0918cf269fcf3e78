"""Ray: the examples of docs/live.md do what it says, on a server as a user starts it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import av
import pytest

from tests.launchers.conftest import PATIENCE

pytestmark = [pytest.mark.browser, pytest.mark.ray, pytest.mark.slow]

PAGE = Path(__file__).parents[2] / "docs" / "live.md"


def test_the_client_in_python_saves_the_video_that_it_steers(server, tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    example = tmp_path / "client.py"
    for before, after in (
        ("127.0.0.1:8000", server.url.removeprefix("http://")),
        ('"seed": 7', '"seed": 7, "fps": 12'),  # slower, so that a client on a busy machine is never too late
    ):
        assert before in code
        code = code.replace(before, after)
    example.write_text(code)
    command = [sys.executable, str(example)]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    promised = re.search(r"^night applies from chunk (\d+)$", done.stdout, re.MULTILINE)[1]
    assert f"chunk {promised}: " in done.stdout and "shows first ['night']" in done.stdout
    assert done.stdout.endswith("165 frames, finished\n")
    with av.open(str(tmp_path / "balloon.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 165
