"""Unit: which signals stop, and how a process that waits in a library ends after one."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from helios_cp.generate.stopping import SIGNALS, TO_ALL, handled

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
@pytest.mark.parametrize("number", TO_ALL, ids=lambda number: number.name)
def test_a_process_that_is_stuck_ends_late(stuck, number):
    stuck.send_signal(number)
    assert stuck.wait(60) == 128 + number


@pytest.mark.parametrize("stuck", ["exit_late(0.1)"], indirect=True)
def test_other_signals_are_left_to_the_first_rank(stuck):
    for number in set(SIGNALS) - set(TO_ALL):
        stuck.send_signal(number)
    stuck.communicate("go on\n", timeout=60)
    assert stuck.returncode == 0


def test_a_handler_gets_all_signals_but_one_that_nohup_ignores(monkeypatch):
    got = []
    before = [signal.getsignal(number) for number in SIGNALS]
    with handled(lambda number, _: got.append(number)):
        for number in SIGNALS:
            signal.raise_signal(number)
    assert got == list(SIGNALS) and [signal.getsignal(number) for number in SIGNALS] == before
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_IGN)
    with handled(lambda *_: None):
        monkeypatch.undo()
        assert signal.getsignal(signal.SIGHUP) == before[SIGNALS.index(signal.SIGHUP)]
        assert signal.getsignal(signal.SIGUSR1) != before[SIGNALS.index(signal.SIGUSR1)]


WAITS = """
import ctypes, signal, sys
from helios_cp.generate.stopping import StopSignal
with StopSignal(0.1).installed() as stop:
    stop.last_words = lambda: print("last words", flush=True)
    {before}
    ctypes.CDLL(None).system(b"echo stuck; read line")
"""


def test_the_first_rank_has_last_words_where_it_waits_for_one_that_is_gone():
    """And is not ended once it is on its way out by itself."""
    for before, says in (("pass", "last words\n"), ("signal.raise_signal(15)", "")):
        finish = "try: stop.check()\n    except KeyboardInterrupt: pass"
        program = WAITS.format(before=before if before == "pass" else f"{before}\n    {finish}")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([sys.executable, "-c", program], **pipes) as process:
            assert process.stdout.readline() == "stuck\n"
            if says:
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 128 + signal.SIGTERM
                process.stdin.close()  # the shell ends, which holds the pipe too
                assert process.stdout.read() == says
            else:
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(1)
                process.communicate("go on\n", timeout=60)
                assert process.returncode == 0


@pytest.mark.parametrize(
    "stuck", ["exit_late(1000)", "signal.signal(signal.SIGTERM, lambda *_: sys.exit())"], indirect=True
)
def test_not_before_its_time_nor_by_a_handler_alone(stuck):
    """The second as a mistake to be seen: a handler in Python never gets its turn."""
    stuck.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        stuck.wait(1)
