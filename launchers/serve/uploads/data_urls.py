"""Data URLs (RFC 2397) of pictures and clips. No other address is read: a server fetches nothing for a stranger."""

from __future__ import annotations

import base64
import binascii
import re

from launchers.serve.problems import Refusal

FORM = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII)
SHOWN = 24
"""Characters of a wrong one that are repeated in the answer."""


def content_of(url: str, most_bytes: int, field: str) -> bytes:
    """What a data URL holds. Raises `Refusal`; one that is too large is not decoded."""
    head = FORM.match(url)
    if head is None:
        raise Refusal(
            "invalid_request",
            f"{field} {url[:SHOWN]!r}: a data URL is allowed, such as data:image/png;base64,...; nothing is fetched",
            param=field,
        )
    text = url[head.end() :]
    if len(text) > 4 * -(-most_bytes // 3):
        raise too_large(field, most_bytes)
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        reason = " ".join(str(error).split())
        raise Refusal("invalid_request", f"{field}: this is no base64 ({reason})", param=field) from None
    if len(content) > most_bytes:
        raise too_large(field, most_bytes)
    return content


def too_large(field: str, most_bytes: int) -> Refusal:
    return Refusal("too_large", f"{field}: it is larger than {most_bytes} bytes, which is what is allowed", param=field)
