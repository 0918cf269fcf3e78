"""What the commands of the benchmarks share: the flag of the file that they write, and tables in a file or a pipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measuring.machine import RESULTS, write_result
from helios_cp.config.paths import user_path

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 118
"""Of tables where there is no terminal."""


def add_output(parser: argparse.ArgumentParser, name: str, about: str = "JSON to write") -> None:
    """`--output`, which is `name`.json among the results that are kept unless told otherwise."""
    default = RESULTS / f"{name}.json"
    about = f"{about} (default: benchmarks/results/{name}.json)"
    parser.add_argument("--output", type=user_path, default=default, metavar="FILE", help=about)


def write_output(path: Path, results: Any) -> Path:
    """As `write_result`, to the file that the user gave."""
    return write_result(path.stem, results, path.parent)


def table_console() -> Console:
    from rich.console import Console  # which may be missing where GPU tests import the benchmarks

    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
