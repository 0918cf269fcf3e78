"""Command line: videos made on a Ray cluster, with the flags of `helios_cp.generate`.

python -m launchers.generate --groups 2 --decoders 2 --prompt-file prompts.txt --output videos
ray job submit --working-dir . -- python -m launchers.generate --address auto --ulysses 4 --prompt … --output fox.mp4
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

from helios_cp.config.arguments import DEFAULT_TIMEOUT, LONGEST_TIMEOUT, OneLineParser, number, whole_number
from helios_cp.config.console import unfailing_output
from helios_cp.config.errors import RequestError
from helios_cp.generate.__main__ import build_parser as build_single_parser
from helios_cp.generate.stopping import handled, stop_at_once
from launchers.cluster.address import address_of, check_address
from launchers.schedule.limits import check_workers

PROGRAM = "launchers.generate"
DEVICES = ("auto", "cpu", "cuda")


def build_parser() -> OneLineParser:
    """The parser of `helios_cp.generate` with the flags of a cluster beside its own."""
    parser = build_single_parser()
    parser.prog = PROGRAM
    parser.usage = "python -m launchers.generate [--address auto] --prompt TEXT [--output FILE] [flag ...]"
    parser.description = "Generate videos with Helios on a Ray cluster, denoising, decoding and writing side by side."
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument(
        "--address",
        default="local",
        metavar="WHERE",
        help="local: an instance of this call's own; auto: the cluster that RAY_ADDRESS names or that this machine "
        "belongs to; or HOST:PORT (default: local)",
    )
    cluster.add_argument(
        "--groups", type=whole_number, default=1, metavar="G", help="groups of ranks that denoise (default: 1)"
    )
    cluster.add_argument(
        "--ranks",
        type=whole_number,
        metavar="R",
        help="ranks of each group; degrees left out follow from it (default: the product of the degrees given; with "
        "--layout auto as many as are modelled as fastest, of those that have room beside decoders and text encoder)",
    )
    cluster.add_argument(
        "--decoders",
        type=whole_number,
        default=1,
        metavar="D",
        help="workers that decode; with 0 each group decodes on its first card, beside denoising (default: 1)",
    )
    cluster.add_argument(
        "--spread", action="store_true", default=False, help="put each part of --ring on a node of its own"
    )
    cluster.add_argument(
        "--gpus",
        type=number,
        nargs=3,
        metavar=("RANK", "DECODER", "TEXT"),
        help="cards of each rank, each decoder and the text encoder (default: 1 0.5 0.5 on CUDA)",
    )
    cluster.add_argument(
        "--undelivered",
        type=whole_number,
        default=3,
        metavar="N",
        help="chunks of a video that may lie between denoising and its file (default: 3)",
    )
    cluster.add_argument(
        "--wait",
        type=number,
        default=15.0,
        metavar="SECONDS",
        help="how long to wait for the cluster to answer, and then for nodes with what is needed; give more where "
        "nodes come on demand (default: 15)",
    )
    cluster.add_argument("--timeline", type=Path, metavar="FILE", help="also draw who worked when, as PNG")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: those of `helios_cp.generate`."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    cache = os.environ.get("HELIOS_CP_CACHE")
    try:
        check_cluster_flags(arguments)
        arguments.address = address_of(arguments.address, os.environ)
    except RequestError as error:
        parser.error(str(error))
    # Imported here so that --help and misspelt flags need not wait for torch.
    from launchers.generate.run import run

    with unfailing_output(), handled(stop_at_once):
        return run(parser, arguments, Path(cache) if cache else None)


def check_cluster_flags(arguments: argparse.Namespace) -> None:
    """What can be refused of a cluster's flags without looking anywhere. Raises `RequestError`."""
    check_address(arguments.address)
    if arguments.device not in DEVICES:
        raise RequestError(f"--device {arguments.device}: on a cluster allowed are {', '.join(DEVICES)}")
    check_workers(arguments.groups, arguments.decoders, getattr(arguments, "vae_parallel", 1))
    for name, least in (("undelivered", 1), ("wait", 1)):
        value = getattr(arguments, name)
        if not (math.isfinite(value) and value >= least):
            raise RequestError(f"--{name} {value:g}: at least {least} is allowed")
    timeout = getattr(arguments, "timeout", DEFAULT_TIMEOUT)
    if not 0 < timeout <= LONGEST_TIMEOUT:
        raise RequestError(f"--timeout {timeout:g}: above 0 and up to {LONGEST_TIMEOUT:g} seconds are allowed")
    gpus = getattr(arguments, "gpus", [])
    if not all(0 <= share <= 1 for share in gpus):
        given = " ".join(f"{share:g}" for share in gpus)
        raise RequestError(f"--gpus {given}: three numbers from 0 to 1 are allowed, parts of a card")
    for name in ("ranks", "cfg_parallel", "ring", "ulysses"):
        if getattr(arguments, name, 1) < 1:
            raise RequestError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: at least 1 is allowed")
    if arguments.spread and getattr(arguments, "layout", None) == "auto" and not hasattr(arguments, "ranks"):
        raise RequestError("--layout auto with --spread: say how many ranks a group has over all its nodes, by --ranks")


if __name__ == "__main__":
    sys.exit(main())
