"""Writes docs/flags.md from the parsers, so that help is stated once: `python -m tests.flags_page`."""

from __future__ import annotations

from pathlib import Path

from launchers.generate.__main__ import build_parser

PAGE = Path(__file__).parents[1] / "docs" / "flags.md"

HEAD = """# Every flag

`python -m launchers.generate` takes all of these; `python -m helios_cp.generate` takes all but the group "Cluster". The
text is that of `--help`. A flag that is left out has the checkpoint's own value, or the default that the table names.
"""


def flags_page() -> str:
    lines = [HEAD]
    for group in build_parser()._action_groups:
        flags = [action for action in group._group_actions if action.option_strings and action.dest != "help"]
        if not flags:
            continue
        lines += [f"## {group.title[:1].upper()}{group.title[1:]}", "", "| flag | meaning |", "|---|---|"]
        for action in flags:
            names = action.metavar if isinstance(action.metavar, tuple) else (action.metavar or "",)
            value = "" if action.nargs == 0 else " ".join(("", *names)).rstrip()
            meaning = (action.help or "").replace("%%", "%").replace("|", "\\|")
            lines.append(f"| `{action.option_strings[0]}{value}` | {meaning} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(flags_page(), encoding="utf-8")
