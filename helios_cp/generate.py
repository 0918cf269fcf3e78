"""Command line: a prompt, picture or clip in, an MP4 out.

python -m helios_cp.generate --prompt "a red fox in the snow" --output fox.mp4
torchrun --nproc_per_node 1 -m helios_cp.generate --model BestWishYsh/Helios-Distilled --prompt … --output fox.mp4
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from helios_cp.arguments import OneLineParser, add_model_arguments, add_request_arguments, whole_number
from helios_cp.config import RequestError
from helios_cp.jobs import INTERPOLATE_TIME

PROGRAM = "helios_cp.generate"


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=PROGRAM,
        usage="python -m helios_cp.generate --prompt TEXT [--output FILE] [flag ...]",
        description="Generate videos with Helios, 33 frames a chunk, written to an MP4 as they come.",
        epilog="Ctrl-C stops after the step in hand and leaves a playable MP4 of the finished chunks. HELIOS_CP_CACHE "
        "names the folder where the tiny models are kept (default: ~/.cache/helios_cp).",
        argument_default=argparse.SUPPRESS,
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", type=Path, metavar="FILE", help="MP4 to write; with --prompt-file a folder (default: out.mp4)"
    )
    output.add_argument("--save-latents", type=Path, metavar="FILE", help="also write the latents, as safetensors")
    output.add_argument("--report", type=Path, metavar="FILE", help="also write times, FPS and memory, as JSON")
    output.add_argument(
        "--checkpoint-dir", type=Path, metavar="DIR", help="save the state after every chunk, to go on after a stop"
    )
    output.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="go on from the last finished chunk saved there; the other flags need not be repeated",
    )
    add_model_arguments(parser)
    add_request_arguments(parser)
    files = parser.add_argument_group("many videos")
    files.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help=".txt with a prompt a line, or .csv with id and prompt (and image_name, or prompt_index for interactive "
        "videos); writes NAME.mp4 each and skips those that exist",
    )
    files.add_argument(
        "--image-folder", type=Path, metavar="DIR", help="where image_name is looked up (default: beside the .csv)"
    )
    files.add_argument(
        "--interpolate-time",
        type=whole_number,
        metavar="CHUNKS",
        help=f"how long each prompt of an interactive .csv holds (default: {INTERPOLATE_TIME})",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0, 1 for a failure, 2 for bad input, 130 and 143 for a stop by SIGINT and SIGTERM."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        parser.error(f"WORLD_SIZE {world} (torchrun --nproc_per_node {world}): only 1 is allowed in this version")
    cache = os.environ.get("HELIOS_CP_CACHE")
    try:
        return _run(parser, arguments, Path(cache) if cache else None)
    except KeyboardInterrupt:
        print("stopped before the first chunk; nothing was written", file=sys.stderr)
        return 130


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace, cache: Path | None) -> int:
    # Imported here so that --help and misspelt flags need not wait for torch.
    from helios_cp.runner import run
    from helios_cp.session import check
    from helios_cp.weights import CheckpointError

    try:
        session = check(arguments, cache)
    except RequestError as error:
        parser.error(str(error))
    try:
        return run(session)
    except (CheckpointError, RequestError, OSError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
