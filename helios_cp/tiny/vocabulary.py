"""Which words the embedded models know, and what to say of a prompt with others."""

from __future__ import annotations

import re
from collections.abc import Iterable

from helios_cp.tiny import captions
from helios_cp.tiny.world import COLOURS, DIRECTIONS

KNOWN = (
    "the embedded models know a ball, balloon, boat, bird or car, in red, yellow, green, blue, pink or white, on the "
    "sea, a meadow, a desert or snow, by day, at sunset or at night, going to the left or right"
)
PLAIN = "a an the is to with view over landscape of and"
"""Words of the captions' sentences that name nothing."""


def _words(texts: Iterable[str]) -> set[str]:
    return {word for text in texts for word in re.findall(r"[^\W\d_]+", text.lower())}


def _known() -> set[str]:
    tables = (
        captions.GROUND_WORDS,
        captions.TIME_WORDS,
        captions.NOUNS,
        captions.VERBS,
        captions.PREPOSITIONS,
    )
    lists = (captions.OPENINGS, captions.FILLERS, COLOURS, DIRECTIONS, [PLAIN])
    return _words(text for table in tables for texts in table.values() for text in texts) | _words(
        text for texts in lists for text in texts
    )


WORDS = frozenset(_known())
"""All words that training captions are made of, in lower case."""


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt that no caption has, in order and each once."""
    words = re.findall(r"[^\W\d_]+", prompt.lower())
    return [word for word in dict.fromkeys(words) if word not in WORDS]


def outside(prompt: str) -> str | None:
    """One line about a prompt that leaves the models' world, or `None`."""
    words = unknown_words(prompt)
    if not words:
        return None
    shown = ", ".join(words[:5]) + (", …" if len(words) > 5 else "")
    return f"prompt {prompt[:60]!r}: {shown}: outside of the world of the embedded models; {KNOWN}"
