"""Which call makes which video: a video has one maker at a time, on all machines that share its folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from helios_cp.config.console import say
from helios_cp.config.errors import RequestError
from helios_cp.files.locks import LockedError, locked
from helios_cp.generate.prompt_files import Job


class InUseError(RequestError):
    """Another call is writing these files."""


@contextmanager
def claimed(job: Job) -> Iterator[None]:
    """Hold the locks on a job's MP4s and on its run folder inside the `with`. Raises `InUseError` at once."""
    locks = {} if job.folder is None else {f"run folder {job.folder}": job.folder / "lock"}
    for output in job.output:
        target = Path(os.path.realpath(output))
        locks[f"--output {output}"] = target.with_name(f".{target.name}.lock")
    with ExitStack() as stack:
        for what, path in locks.items():
            try:
                stack.enter_context(locked(path))
            except LockedError as holder:
                reason = f"{what}: another call is writing there ({holder})"
                raise InUseError(f"{reason}; wait until it ends, or give another name") from None
        yield


def turns(jobs: Sequence[Job], is_finished: Callable[[Job], bool]) -> Iterator[tuple[int, ExitStack]]:
    """The videos of a prompt file that are this call's to make, by number, each with a claim for the caller to close.

    What other calls have in hand comes last: by then it is finished, and skipped; or given up, and made; or it is left
    to them.
    """
    left = list(range(len(jobs)))
    for is_last in (False, True):
        waiting, left = left, []
        for number in waiting:
            job, claim = jobs[number], ExitStack()
            try:
                claim.enter_context(claimed(job))
            except InUseError:
                left.append(number)
                if is_last:
                    say(f"{job.names}: another call is making it, skipped")
                continue
            if is_finished(job):  # by another call, since this one began
                claim.close()
                say(f"{job.names} exists, skipped")
                continue
            yield number, claim
