"""Command line: a prompt, picture or clip in, an MP4 out.

python -m helios_cp.generate --prompt "a red fox in the snow" --output fox.mp4
torchrun --nproc_per_node 4 -m helios_cp.generate --model BestWishYsh/Helios-Distilled --prompt … --output fox.mp4
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from helios_cp.config.arguments import (
    DEFAULT_TIMEOUT,
    LONGEST_TIMEOUT,
    OneLineParser,
    add_execution_arguments,
    add_layout_arguments,
    add_model_arguments,
    add_request_arguments,
    whole_number,
)
from helios_cp.config.console import say, unfailing_output
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Execution
from helios_cp.generate.prompt_files import INTERPOLATE_TIME
from helios_cp.generate.stopping import exit_late, handled, stop_at_once

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
        "--checkpoint-dir",
        type=Path,
        metavar="DIR",
        help="save every chunk there, and go on with the run that is there already: the same call may be made again "
        "and again, as batch systems do",
    )
    output.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="go on with the run that is kept there; refuses a folder without one; the other flags need not be "
        "repeated",
    )
    add_model_arguments(parser)
    add_request_arguments(parser)
    add_layout_arguments(parser)
    add_execution_arguments(parser)
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
    """Exit codes: 0, 1 for a failure, 2 for bad input, 128 + N for a stop by signal N, such as 130 for Ctrl-C.

    Under torchrun every rank calls it; rank 0 speaks, reads and writes for all.
    """
    parser = build_parser()
    parser.is_quiet = os.environ.get("RANK", "0") != "0"
    with unfailing_output(), handled(stop_at_once), ExitStack() as claims:
        arguments = parser.parse_args(argv)
        cache = os.environ.get("HELIOS_CP_CACHE")
        try:
            return _run(parser, arguments, Path(cache) if cache else None, claims)
        except KeyboardInterrupt as reason:
            if not parser.is_quiet:
                say("stopped before the first chunk; nothing was written")
            return getattr(reason, "exit_code", 130)


def _run(parser: OneLineParser, arguments: argparse.Namespace, cache: Path | None, claims: ExitStack) -> int:
    # Imported here so that --help and misspelt flags need not wait for torch.
    from helios_cp.config.errors import CheckpointError
    from helios_cp.device.device import pick_device
    from helios_cp.generate.check import Followed, Session, check
    from helios_cp.generate.claims import claimed
    from helios_cp.generate.run import PATIENCE, follow, run
    from helios_cp.pipeline.environment import prepare
    from helios_cp.pipeline.world import Ranks, World, device_of_rank, end_process
    from helios_cp.weights.load import resolve

    session: Session | None = None

    def decide() -> dict[str, Any]:
        nonlocal session
        try:
            session = check(arguments, cache, ranks)
            if not session.has_prompt_file:
                claims.enter_context(claimed(session.jobs[0], session.run_folders[0]))
        except RequestError as error:
            return {"refused": str(error)}
        return session.for_followers()

    timeout = getattr(arguments, "timeout", DEFAULT_TIMEOUT)
    if not 0 < timeout <= LONGEST_TIMEOUT:
        parser.error(f"--timeout {timeout:g}: a number of seconds above 0 and up to {LONGEST_TIMEOUT:g} is allowed")
    try:
        ranks = Ranks.of(os.environ)
        world = World(ranks, timeout)
    except RequestError as error:
        parser.error(str(error))
    decided = world.share(decide)
    if "refused" in decided:
        parser.error(decided["refused"])
    prepare(Execution.from_json(decided["execution"]), ranks.size, os.environ)
    if session is not None:
        device = session.device
    else:
        exit_late(PATIENCE)  # rank 0 stops for all
        device = device_of_rank(pick_device(arguments.device), ranks)
    try:
        if decided["requests"]:
            world.prepare(lambda: resolve(decided["model"], cache))  # with its weights, which may take long
        with world.connected(decided["backend"], device):
            if session is None:
                follow(Followed.from_json(decided, device, cache), world)
                return 0
            with claims:  # given up before this process ends, in whatever way
                code = run(session, world)
            if code > 1 and ranks.size > 1:
                end_process(code)  # the others are in the middle of a chunk and will not come to an end
            return code
    except (CheckpointError, RequestError, OSError) as error:
        if world.claim_end():
            say(f"{PROGRAM}: error: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
