"""What went wrong with a worker: whether another try can do better, and how to say it in one line."""

from __future__ import annotations

from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
    UnserializableException,
)

from helios_cp.pipeline.world import is_lost_connection

SETUP_ATTEMPTS = 2
"""Of a start that fails before the actor exists, such as on a node without the package; another node may have it."""

CONNECTION_ATTEMPTS = 3
"""Of a start whose ranks do not find each other: one of them may have died, or the network is set up wrongly."""

LONGEST = 300
"""Characters of a reason."""


class PayloadLostError(Exception):
    """What was sent went down with its node; the worker itself is well."""


class WorkerLostError(Exception):
    """The worker died, or cannot be reached."""


class StartError(WorkerLostError):
    """A start failed in a way that the next one is likely to fail too; worth `attempts` in a row."""

    def __init__(self, reason: str, attempts: int) -> None:
        super().__init__(reason)
        self.attempts = attempts


def fault_of(error: BaseException, *, in_gang: bool = False) -> BaseException:
    """What went wrong in a call: `PayloadLostError`, `WorkerLostError`, or the error that the work itself raised.

    Only a rank of a gang has others to lose the connection to.
    """
    cause = _cause(error)
    if isinstance(cause, ObjectLostError | GetTimeoutError):
        return PayloadLostError(one_line(cause))
    if isinstance(cause, UnserializableException):
        return RuntimeError(last_line(cause))
    if isinstance(cause, RayError) or (in_gang and is_lost_connection(cause)):
        return WorkerLostError(one_line(cause))
    return cause


def start_fault_of(error: BaseException, *, in_gang: bool = False) -> BaseException:
    """As `fault_of`, for a worker that never became ready: `StartError` too, and a lost payload is a lost start."""
    cause = _cause(error)
    if (isinstance(cause, RayActorError) and cause.actor_init_failed) or isinstance(cause, RuntimeEnvSetupError):
        return StartError(last_line(cause), SETUP_ATTEMPTS)
    if in_gang and is_lost_connection(cause):
        return StartError(one_line(cause), CONNECTION_ATTEMPTS)
    fault = fault_of(error, in_gang=in_gang)
    return WorkerLostError(str(fault)) if isinstance(fault, PayloadLostError) else fault


def one_line(error: BaseException) -> str:
    """The beginning of what an error says, without line breaks."""
    return " ".join(str(error).split())[:LONGEST]


def last_line(error: BaseException) -> str:
    """The end of an error that says a whole traceback: the exception that it ended with."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:LONGEST] if lines else type(error).__name__


def _cause(error: BaseException) -> BaseException:
    while isinstance(error, RayTaskError):
        error = error.cause
    return error
