"""Unit, in processes of their own: telling never ends work, wherever stdout and stderr go."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helios_cp.config import console

TELL = """
import sys
from helios_cp.config.console import say, unfailing_output
with unfailing_output():
    print("fox 狐", flush=True)
    say("owl 梟")
    print("\\udce7 at the end")
    held = open(sys.argv[1], "w")
    held.write("done")
"""
"""The last line is left in the buffer, which Python flushes as it ends."""

LOCALES = {
    "UTF-8": {"PYTHONUTF8": "1"},
    "C without UTF-8": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ASCII": {"PYTHONIOENCODING": "ascii"},
    "Latin-1": {"PYTHONIOENCODING": "latin-1"},
}


def tell(
    folder: Path, redirection: str = "", stdout: int = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess:
    paths = {**os.environ, "PYTHONPATH": str(Path(console.__file__).parents[2]), **environment}
    script = folder / "tell.py"
    script.write_text(TELL, encoding="utf-8")
    command = f'"{sys.executable}" "{script}" "{folder / "done"}" {redirection}'
    return subprocess.run(command, shell=True, env=paths, stdout=stdout, stderr=subprocess.PIPE)


@pytest.mark.parametrize("name", LOCALES)
def test_what_an_encoding_lacks_is_escaped(tmp_path, name):
    told = tell(tmp_path, **LOCALES[name])
    assert told.returncode == 0, told.stderr
    assert told.stdout == ("fox 狐\n" if name == "UTF-8" else "fox \\u72d0\n").encode() + b"\\udce7 at the end\n"
    assert told.stderr == ("owl 梟\n" if name == "UTF-8" else "owl \\u689f\n").encode()


@pytest.mark.parametrize("redirection", [">/dev/full", "2>/dev/full", ">/dev/full 2>&1", ">&-", "2>&-", ">&- 2>&- <&-"])
def test_a_full_disk_or_a_closed_stream_changes_no_exit_code(tmp_path, redirection):
    told = tell(tmp_path, redirection)
    assert told.returncode == 0, told.stderr
    assert (tmp_path / "done").read_text() == "done", "nothing printed went into a file of the command's"
    assert (b"fox" in told.stdout) == (redirection[:10] != ">/dev/full" and redirection[:3] != ">&-")


def test_a_reader_that_left_changes_no_exit_code(tmp_path):
    reads, writes = os.pipe()
    os.close(reads)
    try:
        told = tell(tmp_path, stdout=writes)
    finally:
        os.close(writes)
    assert told.returncode == 0 and b"owl" in told.stderr and b"Traceback" not in told.stderr


@pytest.mark.parametrize("name", ["UTF-8", "C without UTF-8"])
def test_a_text_of_the_command_line_is_read_as_it_was_typed(name):
    program = (
        "import sys; from helios_cp.config.console import typed; print(ascii([typed(each) for each in sys.argv[1:]]))"
    )
    paths = {**os.environ, "PYTHONPATH": str(Path(console.__file__).parents[2]), **LOCALES[name]}
    command = [sys.executable, "-c", program, "ein Füchslein 狐".encode(), b"\xff"]
    told = subprocess.run(command, env=paths, capture_output=True, text=True, check=True)
    assert told.stdout == "['ein F\\xfcchslein \\u72d0', '\\udcff']\n"
