"""Command line: what the pipelines of a Ray cluster are doing.

python -m launchers.status [--address auto] [--watch SECONDS] [--json]
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from typing import Any

from helios_cp.config.arguments import OneLineParser, number
from helios_cp.config.errors import RequestError
from launchers.cluster.address import address_of, check_address

PROGRAM = "launchers.status"
PATIENCE = 10.0
"""Seconds that a pipeline's board has to answer."""


def build_parser() -> OneLineParser:
    parser = OneLineParser(
        prog=PROGRAM,
        usage="python -m launchers.status [--address auto] [--watch SECONDS] [--json]",
        description="Show the pipelines of a Ray cluster: workers, where they are, what waits, chunks a second.",
    )
    parser.add_argument(
        "--address",
        default="auto",
        metavar="WHERE",
        help="auto: the cluster that RAY_ADDRESS names or that this machine belongs to; or HOST:PORT (default: auto)",
    )
    parser.add_argument("--watch", type=number, metavar="SECONDS", help="show it again every so many seconds")
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead: at each look a line, a list with an entry a pipeline"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0, 1 if there is no cluster or no pipeline, 2 for bad input."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        check_address(arguments.address, ("auto",))
        address = address_of(arguments.address, os.environ)
    except RequestError as error:
        parser.error(str(error))
    if arguments.watch is not None and not 0 < arguments.watch < math.inf:
        parser.error(f"--watch {arguments.watch:g}: a number of seconds above 0 is allowed")
    from launchers.cluster.cluster import ClusterError, connected

    try:
        with connected(address):
            while True:
                found = read_boards()
                if not found:
                    print(f"{PROGRAM}: no pipeline runs on this cluster", file=sys.stderr)
                    return 1
                print(json.dumps(found) if arguments.json else "\n\n".join(map(show, found)), flush=True)
                if arguments.watch is None:
                    return 0
                time.sleep(arguments.watch)
                if not arguments.json:
                    print()
    except ClusterError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def read_boards() -> list[dict[str, Any]]:
    """What each pipeline of the cluster last said of itself; one that does not answer is told on stderr."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    from launchers.driver.status import NAMESPACE

    found = []
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] != NAMESPACE or not actor["name"].startswith("status-"):
            continue
        try:
            status = ray.get(ray.get_actor(actor["name"], NAMESPACE).read.remote(), timeout=PATIENCE)
        except GetTimeoutError:
            print(f"{PROGRAM}: a pipeline is left out: it does not answer within {PATIENCE:g} s", file=sys.stderr)
            continue
        except (RayError, ValueError):  # it ended meanwhile
            continue
        if status:
            found.append(status)
    return found


def show(status: dict[str, Any]) -> str:
    """A status for a reader."""
    lines = [f"{status['model']}, {time.time() - status['time']:.0f} s ago"]
    for worker in status["workers"]:
        doing = ", ".join(worker["in hand"]) or ("idle" if worker["state"] == "ready" else worker["state"])
        lines.append(f"  {worker['name']:<12} {doing}")
        lines += [f"  {'':<12} {place}" for place in worker["places"]]
    waiting = ", ".join(f"{name} {count}" for name, count in status["queue"].items())
    lines.append(f"  queue        {waiting}")
    lines += [f"  video {key:<6} {progress}" for key, progress in status["videos"].items()]
    share = "nothing decoded yet" if status["overlap"] is None else f"{status['overlap']:.0%} beside denoising"
    lines.append(f"  rate         {status['chunks per second']:.2f} chunks a second; decoding and writing: {share}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
