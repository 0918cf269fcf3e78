"""Command line: a prompt, picture or clip in, an MP4 out.

python -m helios_cp.generate --prompt "a red fox in the snow" --output fox.mp4
torchrun --nproc_per_node 4 -m helios_cp.generate --model BestWishYsh/Helios-Distilled --prompt … --output fox.mp4
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from helios_cp.config.arguments import OneLineParser
from helios_cp.config.call import Call
from helios_cp.config.console import say, unfailing_output
from helios_cp.config.errors import CheckpointError, RequestError
from helios_cp.config.imports import quiet_imports, without_collection
from helios_cp.config.json_types import from_json
from helios_cp.config.paths import cache_folder
from helios_cp.config.ranks import Ranks, parse_on_rank
from helios_cp.generate.stopping import exit_late, handled, stop_at_once

PROGRAM = "helios_cp.generate"
EPILOG = (
    "Ctrl-C stops after the step in hand and leaves a playable MP4 of the finished chunks. HELIOS_CP_CACHE names the "
    "folder where the tiny models are kept (default: ~/.cache/helios_cp)."
)


def build_parser() -> OneLineParser:
    parser = OneLineParser(
        prog=PROGRAM,
        usage="python -m helios_cp.generate --prompt TEXT [--output FILE] [flag ...]",
        description="Generate videos with Helios, 33 frames a chunk, written to an MP4 as they come.",
        epilog=EPILOG,
    )
    Call.add_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0, 1 for a failure, 2 for bad input, 128 + N for a stop by signal N, such as 130 for Ctrl-C.

    Under torchrun every rank calls it; rank 0 speaks, reads and writes for all.
    """
    parser = build_parser()
    with unfailing_output(), handled(stop_at_once), ExitStack() as claims:
        arguments, ranks = parse_on_rank(parser, argv, os.environ)
        try:
            call, cache = Call.of(arguments), cache_folder(os.environ)
        except RequestError as error:
            parser.error(str(error))
        try:
            return _run(parser, call, cache, ranks, claims)
        except KeyboardInterrupt as reason:
            if not parser.is_quiet:
                say("stopped before the first chunk; nothing was written")
            return getattr(reason, "exit_code", 130)


def _run(parser: OneLineParser, call: Call, cache: Path | None, ranks: Ranks, claims: ExitStack) -> int:
    quiet_imports()
    # Imported here so that --help and misspelt flags need not wait for torch.
    with without_collection():
        from helios_cp.device.device import card_of_rank, pick_device
        from helios_cp.generate.check import Session, Work, check
        from helios_cp.generate.claims import claimed
        from helios_cp.generate.run import PATIENCE, follow, run
        from helios_cp.pipeline.environment import prepare
        from helios_cp.pipeline.world import World, end_process
        from helios_cp.weights.load import resolve

    session: Session | None = None

    def decide() -> dict[str, Any]:
        nonlocal session
        try:
            session = check(call, cache, ranks)
            if not session.has_prompt_file:
                claims.enter_context(claimed(session.jobs[0]))
        except RequestError as error:
            return {"refused": str(error)}
        return {"work": asdict(session.work)}

    try:
        world = World(ranks, call.layout.timeout)
    except RequestError as error:
        parser.is_quiet = False  # the others may not have it
        parser.error(str(error))
    try:
        decided = world.share(decide)
        if "refused" in decided:
            parser.error(decided["refused"])
        work = from_json(Work, decided["work"])
        prepare(work.execution, ranks.size, os.environ)
        if session is not None:
            device = session.device
        else:
            exit_late(PATIENCE)  # rank 0 stops for all
            device = card_of_rank(pick_device(call.device), ranks.local_rank)
        if work.requests:
            world.prepare(lambda: resolve(work.model, cache))  # with its weights, which may take long
        with world.connected(work.backend, device):
            if session is None:
                follow(work, device, cache, world)
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
