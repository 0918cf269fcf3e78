"""Command line of `python -m helios_cp.weights`: a checkpoint folder with weights that are quantised once and for all.

python -m helios_cp.weights quantize BestWishYsh/Helios-Distilled helios-int8 --quantize int8
python -m helios_cp.generate --model helios-int8 --prompt …
"""

from __future__ import annotations

import os
import sys

from helios_cp.config.arguments import OneLineParser
from helios_cp.config.errors import CheckpointError, RequestError
from helios_cp.config.execution import QUANTIZATIONS, Adapter
from helios_cp.config.imports import quiet_imports
from helios_cp.config.paths import cache_folder, user_path
from helios_cp.files.whole_files import check_folder_target

PROGRAM = "helios_cp.weights"


def build_parser() -> OneLineParser:
    parser = OneLineParser(
        prog=PROGRAM,
        description="Work on the weights of a checkpoint.",
        epilog="HELIOS_CP_CACHE names the folder where the tiny models are kept (default: ~/.cache/helios_cp).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    quantize = commands.add_parser(
        "quantize",
        help="write a checkpoint folder with quantised weights",
        description="Write a checkpoint folder whose transformer is quantised as --quantize would while loading it.",
    )
    quantize.add_argument("model", metavar="IN", help="what --model takes: a folder, a hub id, or a preset")
    quantize.add_argument("output", metavar="OUT", type=user_path, help="the folder to write; it must not exist")
    quantize.add_argument("--quantize", choices=QUANTIZATIONS, default="int8", help="default: int8")
    quantize.add_argument("--lora", action="append", default=[], metavar="PATH[:WEIGHT]", help="merge an adapter first")
    quantize.add_argument("--device", default="cpu", metavar="NAME", help="where to compute (default: cpu)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0, 1 for a failure, 2 for bad input."""
    parser = build_parser()
    options = parser.parse_args(argv)
    quiet_imports()
    try:
        if os.path.lexists(options.output):
            raise RequestError(f"OUT {options.output}: it exists; give the name of a new folder")
        check_folder_target("OUT", options.output)
        adapters = [Adapter.parse(text) for text in options.lora]

        from helios_cp.device.device import pick_device
        from helios_cp.weights.load import resolve
        from helios_cp.weights.quantize_folder import quantize_folder

        checkpoint = resolve(options.model, cache_folder(os.environ))
        device = pick_device(options.device)
        size = quantize_folder(checkpoint, options.output, options.quantize, adapters, device)
    except (RequestError, CheckpointError) as error:
        message = str(error)
        parser.error(f"IN {message.removeprefix('--model ')}" if message.startswith("--model ") else message)
    except OSError as error:
        print(f"{PROGRAM}: error: {options.output}: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {options.quantize}, {size / 1e9:.3g} GB of weights in the transformer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
