"""Tokens of Ray clusters: the one that this process sends, and the one that locks an instance of its own.

A cluster demands a token of everybody, or of nobody. A process in the wrong mode does not get in, or gets in and finds
its actors dead. Ray guesses the mode from what lies in the home folder, and for HOST:PORT not even that; here the
cluster is asked. The token is that of `RAY_AUTH_TOKEN`, the file `RAY_AUTH_TOKEN_PATH` or `~/.ray/auth_token`:
https://docs.ray.io/en/latest/ray-security/token-auth.html
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc
from ray._private import services
from ray._raylet import AuthenticationTokenLoader, Config
from ray.exceptions import AuthenticationError

MODE = "RAY_AUTH_MODE"
SOURCES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")

OWN_TOKENS = "tmp/ray-*/auth_token"
"""Below the root: of instances that `own_token` locks, so that `launchers.status` of the same user finds them."""

ANSWER_SECONDS = 10.0
"""For one short question to a cluster that listens."""


class TokenError(RuntimeError):
    """A cluster and this process do not agree on a token. The message says what to do."""


@contextlib.contextmanager
def token_for(address: str) -> Iterator[None]:
    """Inside, this process sends its token to the cluster at HOST:PORT or "auto", if that demands one.

    Raises `TokenError` where it would not get in.
    """
    with _restored():
        try:
            place = services.canonicalize_bootstrap_address(address)
        except (ConnectionError, ValueError):
            place = None  # there is no cluster, which Ray says better
        if place is not None:
            _enter(place, Path("/").glob(OWN_TOKENS) if address == "auto" else ())
        yield


@contextlib.contextmanager
def own_token(folder: Path) -> Iterator[None]:
    """Inside, an instance that this process starts demands a token that is kept in `folder`.

    Ray itself would write one into the home folder, which other clusters of the user's then demand too. What the
    environment says about tokens is left as it is.
    """
    with _restored():
        if os.environ.get(MODE, "token") == "token" and not any(os.environ.get(name) for name in SOURCES):
            file = folder / "auth_token"
            file.touch(mode=0o600)
            file.write_text(secrets.token_hex(32))
            _set(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(file))
        yield


def _enter(place: str, others: Iterable[Path]) -> None:
    """Set the mode that gets into the cluster at `place`, with the token of this process or of one of the files."""
    asked = os.environ.get(MODE)
    if not _is_refused(place, None):
        if asked == "token":
            raise TokenError(f"it takes no tokens, and {MODE} is token; unset {MODE}")
        return _set(RAY_AUTH_MODE="disabled")
    if asked == "disabled":
        raise TokenError(f"it demands a token, and {MODE} is disabled; unset {MODE}")
    loader = AuthenticationTokenLoader.instance()
    try:
        has_one = loader.has_token(ignore_auth_mode=True)
    except AuthenticationError:
        file = os.environ.get("RAY_AUTH_TOKEN_PATH")
        raise TokenError(f"it demands a token, and RAY_AUTH_TOKEN_PATH {file} cannot be read, or is empty") from None
    if has_one and not _is_refused(place, loader.get_raw_token(ignore_auth_mode=True)):
        return _set(RAY_AUTH_MODE="token")
    for file in others:
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            if not _is_refused(place, file.read_text()):
                return _set(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(file))
    raise TokenError(
        f"it demands a token, and {'has another than the one' if has_one else 'there is none'} here; take the file "
        "~/.ray/auth_token of its head node's user, or set RAY_AUTH_TOKEN_PATH to a copy of it"
    )


def _is_refused(place: str, token: str | None) -> bool:
    """Whether a cluster turns this token away, or whoever has none. Ray's own clients would knock for a minute."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(place) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            ask(b"", timeout=ANSWER_SECONDS, metadata=metadata)
        except grpc.RpcError as error:
            return error.code() == grpc.StatusCode.UNAUTHENTICATED
    return False


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """What is set inside of the environment's words on tokens is gone afterwards; Ray sets some too."""
    before = {name: os.environ[name] for name in (MODE, *SOURCES) if name in os.environ}
    try:
        yield
    finally:
        for name in (MODE, *SOURCES):
            os.environ.pop(name, None)
        _set(**before)


def _set(**variables: str) -> None:
    """Set variables of Ray's, and make it read its environment again, which it does once by itself."""
    if "RAY_AUTH_TOKEN_PATH" in variables:
        os.environ.pop("RAY_AUTH_TOKEN", None)  # it would go first
    os.environ |= variables
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
