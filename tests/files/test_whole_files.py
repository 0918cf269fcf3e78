"""Unit tests of checking targets before work starts, and of files that are either whole or absent. All exact."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helios_cp.config.errors import RequestError
from helios_cp.files import whole_files as files
from helios_cp.files.whole_files import check_file_target, check_folder_target, write_bytes, write_json, write_tensors


def refusal(path: Path | str) -> str:
    with pytest.raises(RequestError) as caught:
        check_file_target("--output", path, ".mp4")
    message = str(caught.value)
    assert message.startswith("--output ") and "\n" not in message
    return message


def folder_refusal(path: Path | str) -> str:
    with pytest.raises(RequestError) as caught:
        check_folder_target("--checkpoint-dir", path)
    message = str(caught.value)
    assert message.startswith(f"--checkpoint-dir {path}: ") and "\n" not in message
    return message


# Targets


def test_a_good_target_leaves_nothing_behind(tmp_path, monkeypatch):
    check_file_target("--output", tmp_path / "out.mp4", ".mp4")
    check_file_target("--output", tmp_path / "not" / "yet" / "there" / "OUT.MP4", ".mp4")
    check_folder_target("--checkpoint-dir", tmp_path)
    check_folder_target("--checkpoint-dir", tmp_path / "not" / "yet")
    monkeypatch.chdir(tmp_path)
    check_file_target("--output", "out.mp4", ".mp4")
    check_folder_target("--checkpoint-dir", "run")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_may_be_replaced_and_is_not_touched(tmp_path):
    (tmp_path / "out.mp4").write_bytes(b"earlier")
    check_file_target("--output", tmp_path / "out.mp4", ".mp4")
    assert (tmp_path / "out.mp4").read_bytes() == b"earlier"


def test_a_folder_as_target(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    for path in (tmp_path / "folder.mp4", tmp_path):
        assert refusal(path) == f"--output {path}: this is a folder; give a file name that ends in .mp4"


def test_a_file_as_folder(tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    assert "this is a file" in folder_refusal(tmp_path / "file")
    assert "this is a file" in folder_refusal(tmp_path / "link")


@pytest.mark.parametrize("name", ["out.mkv", "out", "out.mp4.gz", ".mp4"])
def test_another_suffix(tmp_path, name):
    assert "allowed is .mp4" in refusal(tmp_path / name)


def test_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("text")
    reason = f"{tmp_path / 'file'} is not a folder"
    assert reason in refusal(tmp_path / "file" / "out.mp4")
    assert reason in refusal(tmp_path / "file" / "deeper" / "out.mp4")
    assert reason in folder_refusal(tmp_path / "file" / "deeper")


def test_a_link_to_nowhere_in_place_of_a_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    assert f"{tmp_path / 'link'} is not a folder" in refusal(tmp_path / "link" / "out.mp4")


def test_a_name_that_is_too_long(tmp_path):
    """Also one that only its partial file's name makes too long."""
    for length in (240, 250, 300):
        assert "too long" in refusal(tmp_path / ("x" * length + ".mp4"))
    assert "too long" in folder_refusal(tmp_path / ("x" * 300))
    check_file_target("--output", tmp_path / ("x" * 200 + ".mp4"), ".mp4")


def test_a_name_that_no_file_can_have(tmp_path):
    assert "zero byte" in refusal(tmp_path / "a\0b.mp4")


@pytest.mark.parametrize("below", ["out.mp4", "new/folder/out.mp4"])
def test_a_read_only_folder(below):
    """Root may write to any folder, so for root the check runs as an ordinary user."""
    folder = Path(tempfile.mkdtemp())
    user = os.geteuid()
    try:
        folder.chmod(0o555)
        if user == 0:
            os.seteuid(65534)
        message, other = refusal(folder / below), folder_refusal((folder / below).parent)
    finally:
        os.seteuid(user)
        folder.rmdir()
    assert f"{folder} cannot be written (Permission denied)" in message
    assert f"{folder} cannot be written (Permission denied)" in other


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root can write to")
def test_a_folder_that_not_even_root_can_write_to():
    assert "/proc cannot be written" in refusal("/proc/out.mp4")
    assert "/proc cannot be written" in folder_refusal("/proc/run")


def test_a_link_is_followed_and_a_pipe_or_device_refused(tmp_path):
    (tmp_path / "out.mp4").symlink_to("big/out.mp4")
    check_file_target("--output", tmp_path / "out.mp4", ".mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    assert "points to itself" in refusal(tmp_path / "loop.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "null.mp4").symlink_to("/dev/null")
    (tmp_path / "proc.mp4").symlink_to("/proc/out.mp4")
    for name in ("pipe.mp4", "null.mp4"):
        assert "this is a pipe, a socket or a device; give the name of a file" in refusal(tmp_path / name)
    assert "/proc cannot be written" in refusal(tmp_path / "proc.mp4")


# Writing


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "r.json").symlink_to("big/real.json")
    for values in ([1], [2]):
        write_json(tmp_path / "r.json", values)
        assert (tmp_path / "r.json").is_symlink() and json.loads((tmp_path / "big/real.json").read_text()) == values
    assert [each.name for each in (tmp_path / "big").iterdir()] == ["real.json"]


def test_folders_are_made(tmp_path):
    path = tmp_path / "new" / "folder" / "file.json"
    write_json(path, {"a": [1, None]})
    assert json.loads(path.read_text()) == {"a": [1, None]} and path.read_text().endswith("\n")
    write_tensors(path.with_suffix(".safetensors"), {"latents": torch.arange(3)})
    assert torch.equal(load_file(path.with_suffix(".safetensors"))["latents"], torch.arange(3))
    assert sorted(each.name for each in path.parent.iterdir()) == ["file.json", "file.safetensors"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch, name):
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, name, fail)
        with pytest.raises(OSError, match="no space left"):
            write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def torn(path: Path, content: bytes) -> None:
    """What `write_bytes` must not do: the file is cut off for a while."""
    path.write_bytes(content[: len(content) // 2])
    path.write_bytes(content)


def contents_seen(write: Callable[[Path, bytes], None], path: Path) -> set[bytes]:
    """What a reader may find in `path` while `write` replaces its content: a look before every line of Python."""
    seen = set()

    def look(*_: object) -> Callable:
        seen.add(path.read_bytes())
        return look

    sys.settrace(look)
    try:
        write(path, b"new" * 1000)
    finally:
        sys.settrace(None)
    return seen | {path.read_bytes()}


def test_a_reader_sees_the_old_or_the_new_content(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    assert contents_seen(write_bytes, path) == {b"old", b"new" * 1000}
    path.write_bytes(b"old")
    assert len(contents_seen(torn, path)) > 2


WRITE_FOREVER = """
import itertools, pathlib, sys
from helios_cp.files.whole_files import write_bytes
print("ready", flush=True)
for number in itertools.count():
    write_bytes(pathlib.Path(sys.argv[1]), bytes([number % 256]) * 100_000)
"""


def test_a_killed_process_leaves_a_whole_file(tmp_path):
    path = tmp_path / "file"
    command = [sys.executable, "-c", WRITE_FOREVER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(files.__file__).parents[2]) as child:
        try:
            child.stdout.readline()
            while not path.exists():
                assert child.poll() is None
        finally:
            child.send_signal(signal.SIGKILL)
    content = path.read_bytes()
    assert len(content) == 100_000 and len(set(content)) == 1
