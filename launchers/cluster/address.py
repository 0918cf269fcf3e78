"""Where a cluster is: the forms of `--address`. Nothing here imports Ray, so a misspelt one is answered at once."""

from __future__ import annotations

import re
from collections.abc import Mapping

from helios_cp.config.errors import RequestError

PORTS = range(1024, 65536)
"""Those that Ray takes for a cluster's address."""


def host_and_port(address: str) -> tuple[str, int] | None:
    """Of HOST:PORT, or of [HOST]:PORT where the host is an IPv6 address; `None` for any other text."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:/\[\]]+)):([0-9]{4,5})", address)
    if found is None or int(found[3]) not in PORTS:
        return None
    return found[1] or found[2], int(found[3])


def check_address(address: str, names: tuple[str, ...] = ("local", "auto"), origin: str = "--address") -> None:
    """Raises `RequestError` unless it is one of `names` or HOST:PORT; `origin` is what the message starts with."""
    if address in names or host_and_port(address) is not None:
        return
    if "://" in address:
        reason = "a driver is part of its cluster, not a client of it; on one of its machines give"
    else:
        reason = "allowed are"
    allowed = [*names, f"HOST:PORT or [IPV6]:PORT with a port from {PORTS[0]} to {PORTS[-1]}"]
    raise RequestError(f"{origin} {address}: {reason} {', '.join(allowed)}")


def address_of(address: str, environment: Mapping[str, str]) -> str:
    """`address`, or what `RAY_ADDRESS` says of "auto". Raises `RequestError`."""
    given = environment.get("RAY_ADDRESS", "")
    if address != "auto" or given in ("", "auto"):
        return address
    check_address(given, (), "RAY_ADDRESS")
    return given
