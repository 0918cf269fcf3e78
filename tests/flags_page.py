"""Writes docs/flags.md from the parsers, so that help is stated once: `python -m tests.flags_page`."""

from __future__ import annotations

from pathlib import Path

from launchers.generate import __main__ as generate
from launchers.serve import __main__ as serve

PAGE = Path(__file__).parents[1] / "docs" / "flags.md"

HEAD = """# Every flag

`python -m launchers.generate` takes all of these but the groups "Server" and "Limits"; `python -m helios_cp.generate`
takes none of "Cluster" either. `python -m launchers.serve` takes all that do not name one video or its files. The text
is that of `--help`. A flag that is left out has the checkpoint's own value, or the default that the table names.
"""


def flags_page() -> str:
    lines, written = [HEAD], set()
    groups = [*generate.build_parser()._action_groups, *serve.build_parser()._action_groups]
    for group in groups:
        flags = [action for action in group._group_actions if action.option_strings and action.dest != "help"]
        flags = [action for action in flags if action.dest not in written]
        if not flags:
            continue
        lines += [f"## {group.title[:1].upper()}{group.title[1:]}", "", "| flag | meaning |", "|---|---|"]
        for action in flags:
            written.add(action.dest)
            names = action.metavar if isinstance(action.metavar, tuple) else (action.metavar or "",)
            value = "" if action.nargs == 0 else " ".join(("", *names)).rstrip()
            meaning = (action.help or "").replace("%%", "%").replace("|", "\\|")
            lines.append(f"| `{action.option_strings[0]}{value}` | {meaning} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(flags_page(), encoding="utf-8")
