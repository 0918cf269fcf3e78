"""Why the hub does not give a file, in one line: the cause, and after a semicolon the cure."""

from __future__ import annotations

import errno
import os

from helios_cp.config.errors import RequestError


def cause_of(error: BaseException) -> BaseException:
    """The error that `huggingface_hub` has wrapped in its own."""
    from huggingface_hub.errors import DryRunError, LocalEntryNotFoundError

    while isinstance(error, DryRunError | LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def may_pass(error: BaseException, under_way: bool) -> bool:
    """Whether another try may help. Where no connection is made at all, only once files were on their way."""
    from huggingface_hub.errors import FileMetadataError, LocalEntryNotFoundError, OfflineModeIsEnabled

    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    if isinstance(error, FileMetadataError | LocalEntryNotFoundError | OfflineModeIsEnabled | RequestError):
        return False
    if isinstance(error, ValueError | TypeError) or getattr(error, "errno", None) is not None:
        return False
    return under_way or not type(error).__name__.startswith(("Connect", "Proxy"))


def reason_of(error: BaseException, repository: str, revision: str | None) -> str:
    """Why it fails, and after a semicolon what to do."""
    from huggingface_hub import constants, errors, get_token

    status, number = _status(error), getattr(error, "errno", None)
    again = "run the same command again, files that came whole are kept"
    named = f"{repository} --revision {revision}" if revision else repository
    elsewhere = f"run `hf download {named} --local-dir DIR` where it works and give DIR"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, RequestError):
        return str(error)
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated; accept its terms on {constants.ENDPOINT}/{repository}, then {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub has no revision {revision!r} of it; its page lists branches, tags and commits"
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        return "the hub does not have the file (404); give a commit that is whole, as owner/name@COMMIT"
    if isinstance(error, errors.HFValidationError):
        return "no valid hub id; give a folder, a hub id owner/name or a preset"
    if status == 401 and get_token() is not None:
        return f"the hub does not take the token (401), or has no such model; {login}, with a token that is valid"
    if status in (401, 404):
        return f"neither a folder nor a public model on the hub ({status}); correct the name; if it is private, {login}"
    if status == 403:
        return f"the token has no right to read it (403); {login}, with a token that has"
    if status == 429:
        return f"the hub refuses more requests for now (429); wait some minutes and {again}; {login} to have more"
    if status is not None:
        return f"the hub fails ({status}); {again}, or {elsewhere}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            f"it is not all in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; unset it, or {elsewhere}"
        )
    if isinstance(error, errors.FileMetadataError):
        return f"{constants.ENDPOINT} does not answer as a hub does; check HF_ENDPOINT, proxies and login pages between"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {constants.HF_HUB_CACHE} is full; free some, or set HF_HOME to a folder with room; {again}"
    if number is not None:
        return f"{constants.HF_HUB_CACHE}: {os.strerror(number)}; set HF_HOME to a folder that can be written"
    return f"{constants.ENDPOINT} cannot be reached, or breaks off ({type(error).__name__}); {again}, or {elsewhere}"


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
