"""Unit: locks between processes. A process that holds one is killed here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helios_cp.files import locks
from helios_cp.files.locks import LockedError, locked

HOLD = """
import pathlib, sys
from helios_cp.files.locks import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """A lock that another process holds, and that process."""
    path = tmp_path / "new" / ".a.lock"
    environment = {**os.environ, "PYTHONPATH": str(Path(locks.__file__).parents[2])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], env=environment, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield path, process
        process.kill()


def test_the_second_is_refused_at_once_and_told_who_holds_it(held):
    path, process = held
    with pytest.raises(LockedError, match=f"process {process.pid} on "), locked(path):
        pytest.fail("two hold it")
    process.stdin.close()
    assert process.wait(60) == 0
    assert not path.parent.exists(), "the lock goes, and the folder made for it"
    with locked(path):
        pass


def test_a_killed_process_locks_nothing(held):
    path, process = held
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert path.exists()
    with locked(path), pytest.raises(LockedError), locked(path):
        pytest.fail("two hold it")
    assert not path.exists()


def test_a_file_that_its_holder_has_removed_locks_nothing(tmp_path, monkeypatch):
    """Opened before its holder removed it, and locked after: another process may lock a new file of its name."""
    path, flock, removed = tmp_path / "a.lock", locks.fcntl.flock, []

    def late(file, how):
        if not removed:
            removed.append(path.unlink())
        flock(file, how)

    monkeypatch.setattr(locks.fcntl, "flock", late)
    with locked(path):
        assert path.exists() and len(removed) == 1


def test_a_file_system_without_locks_locks_nothing(tmp_path, monkeypatch):
    def missing(*_):
        raise OSError(locks.errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", missing)
    with locked(tmp_path / "a.lock"):
        pass


def test_folders_with_something_in_them_stay(tmp_path):
    with locked(tmp_path / "new" / "folder" / ".a.lock"):
        (tmp_path / "new" / "a.mp4").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.mp4"]
