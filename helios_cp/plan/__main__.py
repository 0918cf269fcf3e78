"""Command line: which layout of the ranks is fastest for a model, a size and a machine, before anything is run.

python -m helios_cp.plan --gpus 8 --hardware h100
python -m helios_cp.plan --model FOLDER --height 1440 --width 2560 --gpus 8 --nodes 2 --hardware profile.json --json

No model is built: tokens, FLOPs, bytes and messages follow from the config and the engine's own cuts of the sequence.
All times are modelled.
"""

from __future__ import annotations

import sys

from helios_cp.config.arguments import OneLineParser, add_flags, whole_number
from helios_cp.config.checkpoint import DTYPES
from helios_cp.config.console import quiet_imports
from helios_cp.config.errors import RequestError
from helios_cp.config.layout import MACHINES
from helios_cp.config.paths import user_path_text
from helios_cp.config.request import Request

PROGRAM = "helios_cp.plan"
REQUEST_FLAGS = ("height", "width", "num_frames", "num_inference_steps", "pyramid_num_inference_steps_list")
TOP = 12
"""Layouts that are printed."""


def build_parser() -> OneLineParser:
    parser = OneLineParser(
        prog=PROGRAM,
        usage="python -m helios_cp.plan [--gpus N] [--hardware NAME] [flag ...]",
        description="Predict FPS, memory and messages of every sensible layout of the ranks. All times are modelled.",
    )
    add = parser.add_argument
    add(
        "--model",
        default="14b",
        metavar="MODEL",
        help="14b (Distilled), 14b-mid or 14b-base, built in; or what helios_cp.generate takes (default: 14b)",
    )
    add_flags(parser, Request, REQUEST_FLAGS)
    add("--gpus", type=whole_number, default=1, metavar="N", help="GPUs of a node, or processes on a CPU (default: 1)")
    add("--nodes", type=whole_number, default=1, metavar="N", help="nodes of as many GPUs each (default: 1)")
    add(
        "--hardware",
        default="h100",
        type=user_path_text,
        metavar="NAME",
        help=f"{', '.join(MACHINES)}, or a JSON file of a calibration (default: h100)",
    )
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the transformer (default: bfloat16)")
    add("--top", type=whole_number, default=TOP, metavar="N", help=f"layouts to print (default: {TOP}); --json has all")
    add("--json", action="store_true", default=False, help="print JSON, with the counts that the times rest on")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0, 1 where no layout fits, 2 for bad input."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    quiet_imports()
    # Imported here so that --help and misspelt flags need not wait for torch.
    from helios_cp.plan.run import run

    try:
        return run(arguments)
    except RequestError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
