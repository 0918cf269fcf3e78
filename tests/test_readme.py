"""Unit: the README says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.report.modelled import GPUS, HARDWARE, STEPS, predict_lines
from helios_cp.generate.__main__ import build_parser
from helios_cp.plan import cards

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_flag_is_in_the_readme():
    flags = {option for action in build_parser()._actions for option in action.option_strings}
    expected = {flag for flag in flags if flag.startswith("--") and not flag.startswith("--no-")} - {"--help"}
    assert not {flag for flag in expected if not re.search(rf"`[^`]*{flag}\b(?!-)", README)}


def test_every_flag_in_the_readme_exists():
    known = {option for action in build_parser()._actions for option in action.option_strings}
    torchrun = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"}
    pip, presets = {"-c", "-e"}, {"--write"}
    commands = "\n".join(
        line for line in README.splitlines() if "helios_cp.generate" in line or line.startswith("| `--")
    )
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", commands))
    assert not mentioned - known - torchrun - pip - presets


def test_files_that_the_readme_names_exist():
    for path in re.findall(r"\]\(([\w./-]+)\)|`((?:benchmarks|tests|docs)/[\w./-]+)`", README):
        assert (ROOT / (path[0] or path[1])).exists(), path


def test_tables_are_well_formed():
    rows = [line for line in README.splitlines() if line.startswith("|")]
    assert rows and all(line.endswith("|") for line in rows)


def test_the_table_of_cards_is_what_its_command_prints(capsys):
    assert cards.main([]) == 0
    assert capsys.readouterr().out.strip() in README


def test_the_table_of_gpus_is_what_the_planner_predicts():
    lines = {(line.hardware, line.steps): line.points for line in predict_lines()}
    for count in GPUS:
        fps = [f"{lines[name, steps][count].fps:.1f}" for name in HARDWARE for steps in STEPS]
        assert f"| {count} | {' | '.join(fps)} |  |" in README
