"""How a call went, for its user: the report, where videos stand, what failed and what to do."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import NoReturn

from helios_cp.config.console import say
from helios_cp.files.whole_files import write_json
from helios_cp.generate.check import Session
from helios_cp.generate.prompt_files import Job
from helios_cp.generate.report import Report

CURES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room in your quota there",
    errno.EFBIG: "raise the limit on the size of files, or write elsewhere",
    errno.EROFS: "make it writable, or write elsewhere",
    errno.EACCES: "make it writable, or write elsewhere",
}


def report_of(session: Session, job: Job) -> Report:
    """An empty report of one of a session's videos."""
    output = [str(path) for path in job.output]
    return Report(
        job.request,
        session.checkpoint,
        session.layout,
        session.dtype,
        session.device,
        output,
        session.execution,
        session.remarks,
    )


def write_report(session: Session, reports: Sequence[Report]) -> bool:
    """Write `--report`, if it is asked for. Returns `False`, and says why, where it cannot be written."""
    if session.report is None or not (reports or session.has_prompt_file):
        return True
    values = [report.to_json() for report in reports]
    try:
        write_json(session.report, values if session.has_prompt_file else values[0])
    except OSError as error:
        say(f"--report: it could not be written: {reason(error)}")
        return False
    return True


def tell_failures(reports: Sequence[Report], videos: int) -> int:
    """List the videos that failed; returns the exit code, 1 if there are any."""
    failed = [f"{report.names}: {report.error}" for report in reports if report.error is not None]
    if failed:
        say("\n  ".join([f"{len(failed)} of {videos} videos failed:", *failed]))
    return 1 if failed else 0


def raise_with_standing(error: Exception, session: Session, report: Report) -> NoReturn:
    """Raise an error again, with what is finished of the video and how to go on."""
    where = standing(session, report)
    if isinstance(error, OSError):
        raise OSError(f"{reason(error)}; {where}") from error
    say(f"failed; {where}")
    raise error


def reason(error: OSError) -> str:
    """One line: what the system said, of which file, and the cure."""
    parts = [error.strerror or " ".join(str(error).split())]
    parts += [f"{str(error.filename)!r}"] if error.filename is not None else []
    line = ": ".join(parts)
    return f"{line}; {CURES[error.errno]}" if error.errno in CURES else line


def standing(session: Session, report: Report) -> str:
    """Where the video stands and how to go on."""
    line = f"{report.names}: {report.finished_chunks} of {report.request.num_chunks} chunks are finished"
    if report.finished_chunks:
        place = "" if report.playable is None else f" in {report.playable}"
        line += f" and can be played{place}, {report.finished_chunks * report.request.frames_per_chunk} frames"
    again = "the same call starts over; with --checkpoint-dir DIR it could go on"
    if session.checkpoint_dir is not None:
        again = "the same call goes on"
        if not session.has_prompt_file:
            again = f"go on with --resume {session.checkpoint_dir}, or with the same call"
    elif session.has_prompt_file:
        again = "the same call makes it again, and those after it"
    return f"{line}; {again}"
