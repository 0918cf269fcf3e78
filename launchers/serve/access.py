"""Who may do what: keys of the server, tokens of a session. Digests are kept, compared in constant time."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from pathlib import Path

from helios_cp.config.errors import RequestError


@dataclass(frozen=True)
class Access:
    """The digests of the server's keys; without one everybody who reaches the server may use it."""

    keys: tuple[str, ...] = ()

    @classmethod
    def of(cls, file: Path | None) -> Access:
        """Keys of a file, one a line. Raises `RequestError`."""
        if file is None:
            return cls()
        try:
            keys = file.read_text(encoding="utf-8").split()
        except (OSError, ValueError) as error:
            raise RequestError(f"--api-key-file {file}: it cannot be read ({error})") from None
        if not keys:
            raise RequestError(f"--api-key-file {file}: it holds no key; write one a line")
        return cls(tuple(digest(key) for key in keys))

    @property
    def needs_key(self) -> bool:
        return bool(self.keys)

    def admits(self, key: str | None) -> bool:
        """Whether the key is one of the server's, or none is needed."""
        return not self.keys or any([matches(key, each) for each in self.keys])


def new_token() -> str:
    return secrets.token_urlsafe(24)


def digest(token: str) -> str:
    """What is kept of a key or token: nobody can read it back from the disk."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def matches(token: str | None, kept: str) -> bool:
    """Whether a token is the one whose digest is `kept`."""
    return secrets.compare_digest(digest(token or ""), kept)
