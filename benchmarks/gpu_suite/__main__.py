"""Everything worth knowing of one big GPU in one command of under 9 minutes; results are written as they come.

python -m benchmarks.gpu_suite --output results      full size, random weights, no download
python -m benchmarks.gpu_suite --dry-run             all phases on a CPU with tiny sizes, to prove that they run

It takes the checkout, torch and transformers, and of those packages that such a machine may lack, wheels on PYTHONPATH:
pip install --no-index --no-deps --target SITE diffusers-*.whl av-*.whl ftfy-*.whl …

Optional wheels: torchao, without which fp8 is skipped; rich, hypothesis, peft and scikit-image, without which some GPU
tests are. The rates and one rank's shares make a profile of the card: python -m helios_cp.plan --hardware
results/gpu_profile.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
import time
from pathlib import Path

from helios_cp.config.arguments import OneLineParser, number, whole_number
from helios_cp.config.errors import RequestError
from helios_cp.config.paths import user_path
from helios_cp.files.whole_files import check_folder_target

NEEDED = ("torch", "transformers", "accelerate", "diffusers", "av", "ftfy", "PIL", "numpy", "safetensors")
SECONDS = 525.0
"""From the start to the end of the last phase, so that the command ends within 9 minutes."""
STARTING = 15.0
"""Of these, for imports and a first touch of the device."""


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="benchmarks.gpu_suite", description="FPS, VAE, shares of ranks and memory at full size on one GPU."
    )
    add = parser.add_argument
    add(
        "--output",
        type=user_path,
        default=Path("outputs/gpu_suite"),
        metavar="DIR",
        help="one gpu_*.json for each phase",
    )
    add("--phases", nargs="+", metavar="NAME", help="only these, in the suite's order (default: all)")
    add("--seconds", type=number, metavar="S", help=f"in all (default: {SECONDS:g}; in a dry run as many as it takes)")
    add("--chunks", type=whole_number, default=4, metavar="N", help="timed, of each program (default: 4)")
    add("--device", default="auto", metavar="NAME", help="a CUDA device (default: auto)")
    add("--dry-run", action="store_true", help="all phases on a CPU with tiny sizes, and nothing compiled")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 if every phase finished, 1 if one did not, 2 for bad input."""
    start = time.monotonic()
    parser = build_parser()
    arguments = parser.parse_args(argv)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{', '.join(missing)}: not installed; put wheels on PYTHONPATH, see --help")
    from benchmarks.gpu_suite.phases import PHASES, gpu_test_files
    from benchmarks.gpu_suite.runner import Record, run_phases
    from benchmarks.gpu_suite.scope import Scope
    from helios_cp.device.device import pick_device

    names = [phase.name for phase in PHASES]
    try:
        check_folder_target("--output", arguments.output)
        unknown = [name for name in arguments.phases or [] if name not in names]
        if unknown:
            raise RequestError(f"--phases {unknown[0]}: allowed are {', '.join(names)}")
        if arguments.chunks < 2:
            raise RequestError(f"--chunks {arguments.chunks}: must be 2 or more")
        if arguments.seconds is not None and not 0 < arguments.seconds < 1e6:
            raise RequestError(f"--seconds {arguments.seconds:g}: a number above 0 is allowed")
        device = "cpu" if arguments.dry_run else pick_device(arguments.device).type
        if device == "cpu" and not arguments.dry_run:
            raise RequestError(f"--device {arguments.device}: this is a CPU, and full size takes a GPU; use --dry-run")
    except RequestError as error:
        parser.error(str(error))
    scope = Scope("14b", device, "bfloat16", arguments.chunks, True, gpu_test_files())
    if arguments.dry_run:
        scope = Scope("tiny", device, "float32", arguments.chunks, False, ("tests/parallel/test_attention.py",))
    # Imports then count cards without touching them, and phases can be forked after all imports.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    chosen = [phase for phase in PHASES if arguments.phases is None or phase.name in arguments.phases]
    seconds = arguments.seconds or (math.inf if arguments.dry_run else SECONDS)
    statuses = run_phases(chosen, scope, arguments.output, start + seconds, device)
    for name, status in statuses.items():
        error = Record.read(arguments.output, name).values.get("error")
        print(f"{name}: {status}" + (f": {error}" if error else ""))
    print(f"written to {arguments.output}")
    return 0 if set(statuses.values()) == {"finished"} else 1


if __name__ == "__main__":
    sys.exit(main())
