"""Unit: how a process that waits in a library ends after SIGTERM."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# A mutex that is locked twice waits for ever, and unlike Python's own waits comes back for no signal.
STUCK = """
import ctypes, signal, sys
from helios_cp.stopping import exit_late
{prepare}
mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
libc.pthread_mutex_lock(mutex)
print("stuck", flush=True)
libc.pthread_mutex_lock(mutex)
"""


@pytest.fixture
def stuck(request):
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK.format(prepare=request.param)], stdout=subprocess.PIPE, text=True
    )
    with process:
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
