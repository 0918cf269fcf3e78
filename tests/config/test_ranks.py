"""Unit: a process's place in a job, and what is said of an environment that no launcher sets."""

from __future__ import annotations

import pytest

from helios_cp.config.arguments import OneLineParser
from helios_cp.config.errors import RequestError
from helios_cp.config.ranks import Ranks, parse_on_rank

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}

BAD = [
    ({"RANK": "1"}, "RANK 1 ", "WORLD_SIZE is not set"),
    ({"LOCAL_RANK": "3"}, "LOCAL_RANK 3 ", "WORLD_SIZE is not set"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE 0 ", "at least 1"),
    ({"WORLD_SIZE": "-1"}, "WORLD_SIZE '-1' ", "whole number"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE 'two' ", "whole number"),
    ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE 0 ", "at least 1"),
    ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK 5 ", "WORLD_SIZE is 2"),
    ({"RANK": "", "WORLD_SIZE": "2"}, "RANK '' ", "whole number"),
    ({**TORCHRUN, "LOCAL_RANK": "4"}, "LOCAL_RANK 4 ", "LOCAL_WORLD_SIZE is 4"),
    ({"SLURM_STEP_NUM_TASKS": "2"}, "srun started 2 tasks ", "torchrun"),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 tasks ", "torchrun"),
    ({"PMI_SIZE": "2"}, "mpirun started 2 tasks ", "WORLD_SIZE=1"),
]


def test_what_launchers_set():
    assert Ranks.of({}) == Ranks.of({"RANK": "0", "LOCAL_RANK": "0"}) == Ranks()
    assert Ranks.of(TORCHRUN) == Ranks(5, 1, 4, 8)
    assert Ranks.of({"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}) == Ranks(3, 3, 1, 4), (
        "set by hand, as for srun"
    )
    assert Ranks.of({"SLURM_NTASKS": "2"}) == Ranks(), "of a batch script, whose own process is one"
    assert Ranks.of({"SLURM_STEP_NUM_TASKS": "1"}) == Ranks()
    assert Ranks.of({"SLURM_STEP_NUM_TASKS": "2", **TORCHRUN}) == Ranks(5, 1, 4, 8)
    assert Ranks.of({"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "1"}) == Ranks(), "separate calls"


@pytest.mark.parametrize(("environment", "begins", "says"), BAD)
def test_a_bad_environment_is_one_line_on_every_rank(environment, begins, says, capsys):
    with pytest.raises(RequestError) as refused:
        Ranks.of(environment)
    assert str(refused.value).startswith(begins) and says in str(refused.value)
    with pytest.raises(SystemExit) as ended:
        parse_on_rank(OneLineParser(prog="program"), [], environment)
    assert ended.value.code == 2 and capsys.readouterr().err == f"program: error: {refused.value}\n"


@pytest.mark.parametrize(("environment", "lines"), [({"RANK": "1"}, 1), (TORCHRUN, 0), ({}, 1)])
def test_a_misspelt_flag_is_told_by_rank_0_or_where_no_other_rank_tells_it(environment, lines, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_on_rank(OneLineParser(prog="program"), ["--promt", "fox"], environment)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == lines and ("--promt" in told) == bool(lines)
