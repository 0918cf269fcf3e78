"""Command line: a server that makes videos live, on a Ray cluster.

python -m launchers.serve
python -m launchers.serve --model BestWishYsh/Helios-Distilled --groups 2 --decoders 2
"""

from __future__ import annotations

import sys

from helios_cp.config.arguments import OneLineParser
from helios_cp.config.console import unfailing_output
from helios_cp.config.imports import quiet_imports, without_collection
from helios_cp.generate.stopping import handled, stop_at_once
from launchers.generate.flags import parse_call
from launchers.serve.flags import ServeCall

PROGRAM = "launchers.serve"

EPILOG = (
    "When weights are loaded the address of its page is printed. Ctrl-C and SIGTERM save running sessions and end it; "
    "the next start in the same --data folder goes on with them, as it does after kill -9. "
    "HELIOS_CP_CACHE names the folder where the tiny models are kept (default: ~/.cache/helios_cp)."
)


def build_parser() -> OneLineParser:
    """The flags of `launchers.generate` but those of one video's text and files, and the server's own."""
    parser = OneLineParser(
        prog=PROGRAM,
        usage="python -m launchers.serve [--model MODEL] [--host HOST] [--port PORT] [flag ...]",
        description="Serve Helios live: watch videos in a browser while they are made, and steer them by typing.",
        epilog=EPILOG,
    )
    ServeCall.add_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 after a signal, 1 for a failure, 2 for bad flags."""
    parser = build_parser()
    call, cache = parse_call(parser, ServeCall, argv, alone="start this once, without torchrun")
    quiet_imports()
    # Imported here so that --help and misspelt flags need not wait for torch.
    with without_collection():
        from launchers.serve.run import run

    with unfailing_output(), handled(stop_at_once):
        return run(parser, call, cache)


if __name__ == "__main__":
    sys.exit(main())
