"""Models of the Hugging Face hub: their files in the hub's cache on this machine, downloaded where they are missing.

`huggingface_hub` does the work: the cache, its locks (several processes download a file once), tokens, mirrors
(`HF_ENDPOINT`) and fast transfers. This file adds what that leaves to its callers: which files, one commit for all
parts of a model, another try after a broken connection, room on the disk, and errors of one line.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helios_cp.config.checkpoint import CONFIG_FILES, WEIGHT_STEMS
from helios_cp.config.console import say
from helios_cp.config.errors import CheckpointError, RequestError
from helios_cp.files.tensor_files import weight_files

DESCRIPTIONS = ("model_index.json", *(f"{part}/*{end}" for part in CONFIG_FILES for end in (".json", ".txt", ".model")))
"""Patterns of the small files that describe a model."""

PAUSES = (1, 2, 4, 8, 16, 32)
"""Seconds before another try of a file."""

SITES = ("https://huggingface.co/", "https://hf.co/", "huggingface.co/", "hf.co/")


@dataclass(frozen=True)
class HubId:
    """A repository of the hub, at a branch, tag or commit; without one, at its main branch."""

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """From `owner/name`, `owner/name@revision` or the address of the model's page; `None` for any other text."""
        mirror = os.environ.get("HF_ENDPOINT", "").rstrip("/")
        for site in (f"{mirror}/", *SITES) if mirror else SITES:
            if text.startswith(site):
                text = text.removeprefix(site).rstrip("/").replace("/tree/", "@", 1)
                break
        found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", text)
        return cls(found[1], found[2]) if found else None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def describe(hub_id: HubId) -> Path:
    """Download the small files that describe the model; returns the folder of its commit in the hub's cache.

    The folder has the commit's name. Where the hub cannot be reached, the files in the cache serve. Raises
    `RequestError`.
    """
    return Path(_patiently(hub_id, "", _snapshot(hub_id.repository, hub_id.revision, DESCRIPTIONS)))


def download_weights(hub_id: HubId, folder: Path, parts: Iterable[str]) -> None:
    """Download the missing weights of these parts into the folder of a commit, one file after the other.

    Prints size, cache and progress on stderr, on a terminal as a bar. Raises `RequestError`.
    """
    parts = [part for part in parts if not _is_whole(folder, part)]
    if not parts:
        return
    import huggingface_hub

    commit = folder.name
    stems = [f"{part}/{WEIGHT_STEMS[part]}" for part in parts]
    patterns = [f"{stem}{end}" for stem in stems for end in (".safetensors", "-?????-of-?????.safetensors")]
    found = _patiently(hub_id, "", _snapshot(hub_id.repository, commit, patterns, dry_run=True))
    for stem in stems:
        if not any(file.filename.startswith(stem) for file in found):
            raise RequestError(
                f"--model {hub_id}: the hub has no {stem}.safetensors of it, and no shards; give a model in the "
                "diffusers layout, not a variant of one or a format of another program"
            )
    missing = sorted((file for file in found if not Path(file.local_path).exists()), key=lambda file: file.filename)
    sizes = [(file.file_size or 0) * file.will_download for file in missing]  # other commits may share a file
    if any(sizes):
        _check_room(hub_id, sum(sizes))
        say(f"{hub_id.repository}: downloading {_gigabytes(sum(sizes))} to {_cache()}")
    for index, file in enumerate(missing):
        fetch = functools.partial(huggingface_hub.hf_hub_download, hub_id.repository, file.filename, revision=commit)
        _patiently(hub_id, file.filename, fetch)
        if sizes[index] and not sys.stderr.isatty():
            done = f"{_gigabytes(sum(sizes[: index + 1]))} of {_gigabytes(sum(sizes))}"
            say(f"{hub_id.repository}: {file.filename} is here, {done}")


def snapshot_in(folder: Path) -> Path:
    """`folder`; if it is a model's folder in the hub's cache, its commit that is meant. Raises `RequestError`."""
    snapshots = folder / "snapshots"
    if (folder / "model_index.json").exists() or not snapshots.is_dir():
        return folder
    commits = sorted(path.name for path in snapshots.iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    meant = main.read_text().strip() if main.is_file() else ""
    if meant in commits:
        return snapshots / meant
    if len(commits) == 1:
        return snapshots / commits[0]
    found = f"which of its commits is meant is not said; give {snapshots}/COMMIT" if commits else "holds no commit"
    raise RequestError(f"--model {folder}: a model's folder in the hub's cache, and {found}, or its hub id owner/name")


def _is_whole(folder: Path, part: str) -> bool:
    try:
        return bool(weight_files(folder / part, WEIGHT_STEMS[part]))
    except CheckpointError:
        return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of the hub's library, because they print signed addresses, which are secret.

    The library must be imported before, because its import sets the level anew.
    """
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@_quiet()
def _patiently(hub_id: HubId, file: str, fetch: Callable[[], Any]) -> Any:
    """What `fetch` returns. It is tried again where that may help. `file` is what it fetches, if that is one file."""
    for pause in (*PAUSES, None):
        try:
            _cache()
            return fetch()
        except Exception as error:  # every transport has exceptions of its own
            cause = _cause_of(error)
            reason = _reason_of(cause, hub_id.repository, hub_id.revision)
            reason = f"{file} could not be downloaded: {reason}" if file else reason
            if pause is None or not _may_pass(cause, under_way=bool(file)):
                raise RequestError(f"--model {hub_id}: {reason}") from None
        say(f"{hub_id.repository}: {reason.split(';')[0]}; another try in {pause} s")
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _cache() -> Path:
    """The hub's cache. Raises `RequestError` where there is no home folder to have it in."""
    from huggingface_hub import constants

    try:
        return Path(constants.HF_HUB_CACHE).expanduser()
    except RuntimeError:
        raise RequestError("this user has no home folder for the hub's cache; set HF_HOME to a folder") from None


def _check_room(hub_id: HubId, size: int) -> None:
    """Raises `RequestError` where the disk of the cache has less than `size` bytes."""
    folder = _cache()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        raise RequestError(
            f"--model {hub_id}: its weights take {_gigabytes(size)}, and the disk of {folder} has {_gigabytes(free)} "
            "left; free some, or set HF_HOME to a folder with room"
        )


def _snapshot(
    repository: str, revision: str | None, patterns: Iterable[str], dry_run: bool = False
) -> Callable[[], Any]:
    """A call that fetches, or with `dry_run` only finds, the files of some patterns, without a progress bar."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    return functools.partial(
        snapshot_download,
        repository,
        revision=revision,
        allow_patterns=list(patterns),
        dry_run=dry_run,
        tqdm_class=functools.partial(tqdm, disable=True),
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _cause_of(error: BaseException) -> BaseException:
    """The error that `huggingface_hub` has wrapped in its own."""
    from huggingface_hub.errors import DryRunError, LocalEntryNotFoundError

    while isinstance(error, DryRunError | LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _may_pass(error: BaseException, under_way: bool) -> bool:
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


def _reason_of(error: BaseException, repository: str, revision: str | None) -> str:
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
