"""Command line: videos made on a Ray cluster, with the flags of `helios_cp.generate`.

python -m launchers.generate --groups 2 --decoders 2 --prompt-file prompts.txt --output videos
ray job submit --working-dir . -- python -m launchers.generate --address auto --ulysses 4 --prompt … --output fox.mp4
"""

from __future__ import annotations

import sys

from helios_cp.config.arguments import OneLineParser
from helios_cp.config.console import unfailing_output
from helios_cp.config.imports import quiet_imports, without_collection
from helios_cp.generate.__main__ import EPILOG
from helios_cp.generate.stopping import handled, stop_at_once
from launchers.generate.flags import ClusterCall, parse_call

PROGRAM = "launchers.generate"


def build_parser() -> OneLineParser:
    """The flags of `helios_cp.generate` with those of a cluster beside them."""
    parser = OneLineParser(
        prog=PROGRAM,
        usage="python -m launchers.generate [--address auto] --prompt TEXT [--output FILE] [flag ...]",
        description="Generate videos with Helios on a Ray cluster, denoising, decoding and writing side by side.",
        epilog=EPILOG,
    )
    ClusterCall.add_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: those of `helios_cp.generate`."""
    parser = build_parser()
    call, cache = parse_call(parser, ClusterCall, argv, alone="Ray starts the ranks here; start this without torchrun")
    quiet_imports()
    # Imported here so that --help and misspelt flags need not wait for torch.
    with without_collection():
        from launchers.generate.run import run

    with unfailing_output(), handled(stop_at_once):
        return run(parser, call, cache)


if __name__ == "__main__":
    sys.exit(main())
