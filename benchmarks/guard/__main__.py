"""Guards what the engine does against change: FLOPs, bytes, kernels and collectives, which no machine's speed alters.

python -m benchmarks.guard             say what differs from expected_counts.json; exit code 1 if anything does
python -m benchmarks.guard --update    write that file anew, where a change is meant
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from benchmarks.guard.counts import CountTree, count_all
from helios_cp.config.arguments import OneLineParser
from helios_cp.files.whole_files import write_json

EXPECTED = Path(__file__).parent / "expected_counts.json"
UPDATE = "python -m benchmarks.guard --update"


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="benchmarks.guard", description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help=f"write {EXPECTED.name} anew")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 where a count differs and the file is not to be written anew."""
    options = build_parser().parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    found = count_all()
    changes = compare(found, read_expected())
    console.print(*changes or ["every count is as expected"], sep="\n")
    if changes and options.update:
        write_json(EXPECTED, found)
        console.print(f"written to {EXPECTED}", style="dim")
    elif changes:
        console.print(f"if this is meant: {UPDATE}")
    return int(bool(changes) and not options.update)


def read_expected() -> CountTree:
    """Nothing where there is no file."""
    return json.loads(EXPECTED.read_text(encoding="utf-8")) if EXPECTED.exists() else {}


def compare(found: CountTree, expected: CountTree) -> list[str]:
    """One line for each count that is new, gone, or has another value; none where all are as expected."""
    now, before = dict(flat(found)), dict(flat(expected))
    return [
        f"{name}: {_change(before.get(name), now.get(name))}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]


def flat(counts: CountTree, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Every count with the names that lead to it."""
    for name, value in counts.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}, ")
        else:
            yield prefix + name, value


def _change(before: int | None, now: int | None) -> str:
    if before is None:
        return f"{now:,}, which is new"
    if now is None:
        return f"no longer counted, was {before:,}"
    share = f" ({100 * (now - before) / before:+.3g} %)" if before else ""
    return f"{now:,}, expected {before:,}: {now - before:+,}{share}"


if __name__ == "__main__":
    sys.exit(main())
