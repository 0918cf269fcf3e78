"""Paths as people type them: `~` is a home folder wherever it comes from, a shell, a YAML file or a job's script."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from helios_cp.config.errors import RequestError


def expand(text: str) -> Path:
    """With `~` or `~name` at its beginning replaced by the home folder. Raises `RequestError` where there is none."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise RequestError(f"{text}: there is no such home folder; give the whole path") from None


def user_path(text: str) -> Path:
    """For `type=` of a flag: as `expand`, with the error that argparse shows after the flag's name."""
    try:
        return expand(text)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def user_path_text(text: str) -> str:
    """As `user_path`, as text."""
    return str(user_path(text))


def absolute_path_text(text: str) -> str:
    """As `user_path`, from the root on, so that it holds from elsewhere too."""
    return os.path.abspath(user_path(text))


def cache_folder(environment: Mapping[str, str]) -> Path | None:
    """Where the tiny models are kept, if HELIOS_CP_CACHE says so."""
    text = environment.get("HELIOS_CP_CACHE")
    try:
        return expand(text) if text else None
    except RequestError as error:
        raise RequestError(f"HELIOS_CP_CACHE {error}") from None
