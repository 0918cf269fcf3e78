"""Unit: README and docs say what the code does: links lead somewhere, commands parse, tables are up to date."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.report.modelled import GPUS, HARDWARE, STEPS, predict_lines
from helios_cp.plan import cards
from tests.flags_page import flags_page

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_LINES = 150
"""Of the README, which is a page."""

COMMAND = re.compile(
    r"(?:python|-m torch\.distributed\.run|torchrun)\b.*?-m ((?:helios_cp|launchers|benchmarks)[\w.]*)(.*)"
)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def commands(page: Path) -> list[tuple[str, str]]:
    """(module, arguments) of each command of ours in code blocks and code spans."""
    text = read(page).replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    found = [COMMAND.search(line) for line in lines]
    return [(match[1], match[2]) for match in found if match]


class Parsed(BaseException):
    """The command's flags were understood."""


@pytest.fixture
def only_parsing(monkeypatch):
    """Commands stop once their flags are parsed."""
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self, *arguments, **options):
        parse(self, *arguments, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page, only_parsing, capsys):
    for module, arguments in commands(page):
        words = [word for word in shlex.split(arguments, comments=True) if word not in ("…", "...")]
        try:
            main = importlib.import_module(f"{module}.__main__").main
        except ModuleNotFoundError:
            main = importlib.import_module(module).main
        with pytest.raises(BaseException) as ended:
            main(words)
        assert ended.type is Parsed, f"{page.name}: {module} {arguments}: {capsys.readouterr().err}"


def test_a_command_that_does_not_parse_is_seen(only_parsing):
    from helios_cp.generate.__main__ import main

    with pytest.raises(SystemExit):
        main(["--promt", "a fox"])


def test_pages_have_commands():
    assert sum(len(commands(page)) for page in PAGES) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http://", "https://"))]
    for link in links:
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name}: {link}"
        headings = {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in headings_of(target)}
        assert not heading or heading in headings, f"{page.name}: {link}"
    for path in re.findall(r"`((?:benchmarks|tests|docs|helios_cp|launchers|parallel)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{page.name}: {path}"


def headings_of(page: Path) -> list[str]:
    return re.findall(r"^#+ (.*)$", read(page), re.MULTILINE) if page.suffix == ".md" else []


def test_every_page_is_reached_from_the_readme():
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in read(PAGES[0]), page.name


def test_the_readme_is_a_page():
    assert len(read(PAGES[0]).splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_well_formed(page):
    tables = re.findall(r"(?:^\|.*\n)+", read(page), re.MULTILINE)
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(widths) == 1, f"{page.name}: {table[:200]}"


def test_the_page_of_flags_is_what_the_parsers_say():
    assert read(ROOT / "docs/flags.md") == flags_page(), "run `python -m tests.flags_page`"


def test_the_table_of_cards_is_what_its_command_prints(capsys):
    assert cards.main([]) == 0
    assert capsys.readouterr().out.strip() in read(ROOT / "docs/one-card.md")


def test_the_table_of_gpus_is_what_the_planner_predicts():
    lines = {(line.hardware, line.steps): line.points for line in predict_lines()}
    for count in GPUS:
        fps = [f"{lines[name, steps][count].fps:.1f}" for name in HARDWARE for steps in STEPS]
        assert f"| {count} | {' | '.join(fps)} |  |" in read(ROOT / "docs/layouts.md")
