"""Command line: videos made on a Ray cluster, with the flags of `helios_cp.generate`.

python -m launchers.generate --groups 2 --decoders 2 --prompt-file prompts.txt --output videos
ray job submit --working-dir . -- python -m launchers.generate --address auto --ulysses 4 --prompt … --output fox.mp4
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from helios_cp.config.arguments import OneLineParser
from helios_cp.config.console import quiet_imports, unfailing_output
from helios_cp.config.errors import RequestError
from helios_cp.config.paths import cache_folder
from helios_cp.config.ranks import parse_on_rank
from helios_cp.generate.__main__ import EPILOG
from helios_cp.generate.stopping import handled, stop_at_once
from launchers.cluster.address import address_of
from launchers.generate.flags import ClusterCall

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
    arguments, ranks = parse_on_rank(parser, argv, os.environ)
    try:
        if ranks.size > 1:
            raise RequestError(
                f"WORLD_SIZE {ranks.size} in the environment: Ray starts the ranks here; start this without torchrun"
            )
        call, cache = ClusterCall.of(arguments), cache_folder(os.environ)
        call = replace(call, address=address_of(call.address, os.environ))
    except RequestError as error:
        parser.error(str(error))
    quiet_imports()
    # Imported here so that --help and misspelt flags need not wait for torch.
    from launchers.generate.run import run

    with unfailing_output(), handled(stop_at_once):
        return run(parser, call, cache)


if __name__ == "__main__":
    sys.exit(main())
