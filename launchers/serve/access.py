"""Who may do what: keys of the server, tokens of a session, and from which pages. Digests are kept, no key or token."""

from __future__ import annotations

import hashlib
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from helios_cp.config.errors import RequestError
from launchers.serve.flags import is_loopback
from launchers.serve.problems import Refusal

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",  # addresses of viewers hold a token
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Of every answer. There are none of CORS: no other site's page may read an answer."""

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
OPEN_TO_OTHERS = 0o027
"""Permission bits that the file of keys must not have: nobody but its owner writes it, and no stranger reads it."""


@dataclass(frozen=True)
class Access:
    """The digests of the server's keys; without one everybody who reaches the server may use it.

    `origins` are those of other sites whose pages may steer it, such as https://example.org.
    """

    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    @classmethod
    def of(cls, file: Path | None, origins: tuple[str, ...] = ()) -> Access:
        """Keys of a file, separated by white space; # begins a comment. Raises `RequestError`."""
        for origin in origins:
            if origin != _origin_of(origin):
                raise RequestError(f"--allow-origin {origin}: give scheme and host alone, such as https://example.org")
        return cls((), origins) if file is None else cls(tuple(map(digest, _keys_in(file))), origins)

    @property
    def needs_key(self) -> bool:
        return bool(self.keys)

    def admits(self, key: str | None) -> bool:
        """Whether the key is one of the server's, or none is needed."""
        return not self.keys or any([matches(key, each) for each in self.keys])  # all, so that time tells nothing

    def check_key(self, key: str | None) -> None:
        """Raises `Refusal`."""
        if not self.admits(key):
            raise Refusal("unauthorized", "a key of this server is needed: send the header Authorization: Bearer KEY")

    def check_page(self, headers: Mapping[str, str], method: str | None) -> None:
        """Raises `Refusal` for what a page of another site sends; `method` is `None` for a WebSocket.

        Programs send no Origin. Without keys the server is there for this machine alone, so the page's host must be
        this machine's too: a stranger's name that is made to point here (DNS rebinding) is no such host.
        """
        host, origin = headers.get("host", ""), headers.get("origin")
        allowed = [urlsplit(each).netloc for each in self.origins]
        if not self.keys and host not in allowed and not is_loopback(_name_in(host)):
            raise Refusal("forbidden", f"host {host!r}: without keys this server is for this machine alone")
        if origin is None or method in SAFE_METHODS or origin in self.origins:
            return
        if not host or _origin_of(origin) not in (f"http://{host}", f"https://{host}"):
            raise Refusal(
                "forbidden", f"origin {origin!r}: --allow-origin names the other sites that may use the server"
            )


def bearer(headers: Mapping[str, str]) -> str | None:
    """The key or token of the header `Authorization: Bearer`."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def new_token() -> str:
    return secrets.token_urlsafe(24)


def digest(token: str) -> str:
    """What is kept of a key or token: nobody can read it back from the disk."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def matches(token: str | None, kept: str) -> bool:
    """Whether a token is the one whose digest is `kept`."""
    return secrets.compare_digest(digest(token or ""), kept)


def _keys_in(file: Path) -> list[str]:
    try:
        mode = file.stat().st_mode
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise RequestError(f"--api-key-file {file}: it cannot be read ({error})") from None
    if stat.S_ISREG(mode) and mode & OPEN_TO_OTHERS:
        raise RequestError(
            f"--api-key-file {file}: other users can read or write it (mode {mode & 0o777:o}); chmod 600 {file}"
        )
    keys = [key for line in lines for key in line.partition("#")[0].split()]
    if not keys:
        raise RequestError(f"--api-key-file {file}: it holds no key; write one a line")
    for number, key in enumerate(keys, 1):
        if not (key.isascii() and key.isprintable()):
            raise RequestError(f"--api-key-file {file}: key {number} holds other letters than ASCII, as headers take")
    return keys


def _origin_of(address: str) -> str | None:
    try:
        parts = urlsplit(address)
    except ValueError:
        return None
    return f"{parts.scheme}://{parts.netloc}" if parts.scheme in ("http", "https") and parts.netloc else None


def _name_in(host: str) -> str:
    """A Host header without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
