"""Unit: how a process that waits in a library ends after SIGTERM."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# `system` waits for its shell and, unlike Python's own waits, comes back for no signal. The shell is what says so:
# by then the process is inside the call, so that no handler in Python can run first.
STUCK = """
import ctypes, signal, sys
from helios_cp.generate.stopping import exit_late
{prepare}
ctypes.CDLL(None).system(b"echo stuck; read line")
"""


@pytest.fixture
def stuck(request):
    program = STUCK.format(prepare=request.param)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "stuck\n"
        yield process
        process.kill()


@pytest.mark.parametrize("stuck", ["exit_late(0.1)"], indirect=True)
def test_a_process_that_is_stuck_ends_late(stuck):
    stuck.send_signal(signal.SIGTERM)
    assert stuck.wait(60) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    "stuck", ["exit_late(1000)", "signal.signal(signal.SIGTERM, lambda *_: sys.exit())"], indirect=True
)
def test_not_before_its_time_nor_by_a_handler_alone(stuck):
    """The second as a mistake to be seen: a handler in Python never gets its turn."""
    stuck.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        stuck.wait(1)
