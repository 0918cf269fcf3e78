"""Command line: which layout of the ranks is fastest for a model, a size and a machine, before anything is run.

python -m helios_cp.plan --gpus 8 --hardware h100
python -m helios_cp.plan --model FOLDER --height 1440 --width 2560 --gpus 8 --nodes 2 --hardware profile.json --json

No model is built: tokens, FLOPs, bytes and messages follow from the config and the engine's own cuts of the sequence.
All times are modelled.
"""

from __future__ import annotations

import sys

from helios_cp.config.arguments import OneLineParser
from helios_cp.config.errors import RequestError
from helios_cp.config.imports import quiet_imports
from helios_cp.plan.flags import PlanCall

PROGRAM = "helios_cp.plan"


def build_parser() -> OneLineParser:
    parser = OneLineParser(
        prog=PROGRAM,
        usage="python -m helios_cp.plan [--gpus N] [--hardware NAME] [flag ...]",
        description="Predict FPS, memory and messages of every sensible layout of the ranks. All times are modelled.",
    )
    PlanCall.add_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0, 1 where no layout fits, 2 for bad input."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    quiet_imports()
    # Imported here so that --help and misspelt flags need not wait for torch.
    from helios_cp.plan.report import run

    try:
        return run(PlanCall.of(arguments))
    except RequestError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
