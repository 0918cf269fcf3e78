"""Unit, with real child processes: files that people send are decoded apart, or refused in one line."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as with_settings
from hypothesis import strategies as st
from PIL import Image

from helios_cp.files.pictures import read_image
from launchers.serve.problems import Refusal
from launchers.serve.uploads import child, kinds, uploads
from launchers.serve.uploads.child import Task
from launchers.serve.uploads.kinds import CLIP, PICTURE, NotAllowedError, format_of
from launchers.serve.uploads.uploads import Uploads, content_of
from tests.launchers.serve.uploads.files import BAD_FILES, clip, data_url, picture, png_of_size

BOTH = (PICTURE, CLIP)


@pytest.fixture
def taking(tmp_path):
    return Uploads(tmp_path / "uploads", 2**22)


def take(taking: Uploads, given: bytes | str, folder, kinds=BOTH, least=33):
    return taking.check(given, folder, "image", kinds, least)


@pytest.mark.parametrize(
    "content",
    [
        picture(),
        picture("JPEG"),
        picture("JPEG", progressive=True),
        picture("WEBP", lossless=True),
        picture(mode="L"),
        picture(mode="P"),
        picture("JPEG", mode="CMYK"),
        picture("JPEG") + picture("JPEG"),  # as cameras put a second picture behind the first
        picture("JPEG", exif=Image.Exif()),
    ],
)
def test_a_picture_is_kept_as_its_pixels(taking, tmp_path, content):
    (tmp_path / "given").write_bytes(content)
    found = take(taking, content, tmp_path / "session")
    assert (found.kind, found.width, found.height, found.frames) == (PICTURE, 96, 64, 1)
    assert found.path == tmp_path / "session" / "start.png"
    as_kept, as_given = read_image(found.path, 64, 96), read_image(tmp_path / "given", 64, 96)
    assert np.array_equal(as_kept.numpy(), as_given.numpy())
    assert not list((tmp_path / "uploads").iterdir())


def test_nothing_but_pixels_goes_on(taking, tmp_path):
    secret = b"<script>alert(1)</script> and where it was taken"
    exif = Image.Exif()
    exif[0x010E] = secret.decode()
    content = picture("JPEG", exif=exif, comment=secret)
    assert secret in content
    assert secret not in take(taking, content, tmp_path / "session").path.read_bytes()


@pytest.mark.parametrize(
    ("content", "suffix"), [(clip(), ".mp4"), (clip(kind="mov"), ".mp4"), (clip(kind="webm", codec="libvpx"), ".mkv")]
)
def test_a_clip_is_kept_as_it_is(taking, tmp_path, content, suffix):
    found = take(taking, data_url(content, "video/mp4"), tmp_path / "session")
    assert (found.kind, found.width, found.height, found.frames) == (CLIP, 64, 64, 40)
    assert found.fps == pytest.approx(24, rel=1e-2)
    assert found.path == tmp_path / "session" / f"start{suffix}"
    assert found.path.read_bytes() == content


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line(taking, tmp_path, name):
    with pytest.raises(Refusal) as refused:
        take(taking, BAD_FILES[name], tmp_path / "session")
    assert refused.value.problem.status == 400
    assert str(refused.value).startswith("image: ")
    assert "\n" not in str(refused.value)
    assert str(tmp_path) not in str(refused.value)
    assert not (tmp_path / "session").exists()
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "data URL"),
        ("a fox", "data URL"),
        ("file:///etc/passwd", "nothing is fetched"),
        ("http://169.254.169.254/latest/meta-data", "nothing is fetched"),
        ("https://example.org/fox.png", "nothing is fetched"),
        ("/etc/passwd", "nothing is fetched"),
        ("data:image/png,hello", "data URL"),
        ("data:;base64,AAAA", "data URL"),
        ("data:image/png;base64", "data URL"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,@@@@", "no base64"),
        ("data:image/png;base64,AAA", "no base64"),
        ("data:image/png;base64,AA=A", "no base64"),
        ("data:image/png;base64,AAAA AAAA", "no base64"),
        ("data:image/png;base64,AAAA\nAAAA", "no base64"),
        ("data:image/png;base64,AAAA-_AA", "no base64"),
        ("data:image/png;base64,ä", "no base64"),
        ("DATA:image/png;base64,AAAA", "data URL"),
        (data_url(b"x" * (2**22 + 1)), "larger than 4194304"),
        (data_url(b"x" * 2**23), "larger than 4194304"),
    ],
)
def test_a_wrong_data_url_is_refused(taking, tmp_path, url, reason):
    with pytest.raises(Refusal, match=reason) as refused:
        take(taking, url, tmp_path / "session")
    assert len(str(refused.value)) < 200
    assert not (tmp_path / "session").exists()


def test_a_data_url_that_is_too_large_is_not_decoded(monkeypatch):
    monkeypatch.setattr("launchers.serve.uploads.uploads.base64.b64decode", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(Refusal, match="larger"):
        content_of(data_url(b"x" * 1000), 900, "image")


def test_a_kind_that_is_not_asked_for(taking, tmp_path):
    with pytest.raises(Refusal, match="this is a clip; a picture is allowed"):
        take(taking, clip(), tmp_path, kinds=(PICTURE,))
    with pytest.raises(Refusal, match="this is a picture; a clip is allowed"):
        take(taking, picture(), tmp_path, kinds=(CLIP,))


def test_what_is_called_a_picture_is_looked_at(taking, tmp_path):
    assert take(taking, data_url(clip(), "image/png"), tmp_path).kind == CLIP


def test_a_process_that_takes_too_long_is_killed(tmp_path, monkeypatch):
    """The child decodes a real clip; the parent waits for no time at all."""
    taking = Uploads(tmp_path / "uploads", 2**22, wall_seconds=0.05)
    with pytest.raises(Refusal, match="too long"):
        take(taking, clip(400), tmp_path / "session")
    assert not list((tmp_path / "uploads").iterdir())


def limited(name: str, value: int, task: Task) -> subprocess.CompletedProcess:
    """The child with a lower limit."""
    code = f"from launchers.serve.uploads import child; child.{name} = {value}; import sys; child.main(sys.argv[1])"
    return subprocess.run([sys.executable, "-c", code, task.to_json()], capture_output=True, text=True, check=False)


def test_memory_is_limited(tmp_path):
    (tmp_path / "given.png").write_bytes(png_of_size(7000, 7000))
    task = Task(str(tmp_path / "given.png"), PICTURE, str(tmp_path / "picture.png"), 33, 1000)
    assert json.loads(limited("MEMORY_BYTES", 3 * 2**30, task).stdout)["width"] == 7000
    done = limited("MEMORY_BYTES", 2**28, task)
    assert done.returncode or "refused" in json.loads(done.stdout)


def test_seconds_of_the_processor_are_limited(tmp_path):
    code = (
        "import itertools, sys; from launchers.serve.uploads import child; child.CPU_SECONDS = 1;"
        "child.look = lambda task: sum(itertools.repeat(1)); child.main(sys.argv[1])"
    )
    task = Task("", CLIP, "", 33, 1000)
    done = subprocess.run([sys.executable, "-c", code, task.to_json()], capture_output=True, check=False)
    assert done.returncode in (-signal.SIGXCPU, -signal.SIGKILL)


def test_frames_are_limited(tmp_path):
    (tmp_path / "given.mp4").write_bytes(clip(40))
    told = json.loads(limited("CPU_SECONDS", 60, Task(str(tmp_path / "given.mp4"), CLIP, "", 33, 39)).stdout)
    assert told == {"refused": "it has more than 39 frames, which is what is allowed"}


def test_the_child_loads_no_torch_and_knows_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    seen = {}
    real = subprocess.run
    monkeypatch.setattr(uploads.subprocess, "run", lambda *a, **k: seen.update(k) or real(*a, **k))
    take(Uploads(tmp_path / "uploads", 2**22), clip(), tmp_path / "session")
    assert "HF_TOKEN" not in seen["env"]
    code = (
        "import sys; from launchers.serve.uploads import child; import helios_cp.files.clips, helios_cp.files.pictures;"
        "sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    )
    assert real([sys.executable, "-c", code], check=False).returncode == 0


def test_a_client_that_goes_meanwhile_leaves_nothing(taking, tmp_path, monkeypatch):
    begun, kept = threading.Event(), threading.Event()

    def check(*arguments):
        begun.set()
        kept.wait()
        return Uploads.check(taking, *arguments)

    monkeypatch.setattr(taking, "check", check)

    async def go() -> None:
        keeping = asyncio.create_task(taking.keep(picture(), tmp_path / "session", "image", (PICTURE,), 33))
        await asyncio.to_thread(begun.wait)
        keeping.cancel()
        await asyncio.wait([keeping])
        kept.set()
        await asyncio.to_thread(taking._threads.shutdown)

    asyncio.run(go())
    assert not (tmp_path / "session").exists()


def test_a_killed_server_leaves_nothing_in_its_scratch_folder(tmp_path):
    (tmp_path / "uploads" / "tmp1").mkdir(parents=True)
    (tmp_path / "uploads" / "tmp1" / "given.png").write_bytes(b"x")
    Uploads(tmp_path / "uploads", 2**22)
    assert not (tmp_path / "uploads").exists()


@given(
    start=st.sampled_from([each[:64] for each in (picture(), picture("JPEG"), picture("WEBP"), clip())]),
    rest=st.binary(),
)
@with_settings(max_examples=300)
def test_kinds_of_any_bytes(start, rest):
    """Whatever the bytes are, they are a format or refused, and nothing else is raised."""
    try:
        assert format_of(start + rest) in kinds.FORMATS
    except NotAllowedError as error:
        assert str(error)


@given(content=st.binary(max_size=40), at=st.integers(0, 3000))
@with_settings(max_examples=25)
def test_damaged_pictures(tmp_path_factory, content, at):
    """A file with other bytes in the middle is decoded, or refused."""
    folder = tmp_path_factory.mktemp("damaged")
    whole = picture("JPEG")
    damaged = whole[:at] + content + whole[at + len(content) :]
    (folder / "given.jpg").write_bytes(damaged)
    try:
        told = child.look(Task(str(folder / "given.jpg"), PICTURE, str(folder / "picture.png"), 33, 1000))
    except Exception as error:
        assert not isinstance(error, SystemExit)
    else:
        assert told["width"] > 0
