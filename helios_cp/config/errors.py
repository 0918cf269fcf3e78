"""The errors for what a user can put right."""

from __future__ import annotations


class RequestError(ValueError):
    """Bad input, found before work starts. The message is one line: what was given, what is allowed, what to do."""


class CheckpointError(ValueError):
    """The files of a checkpoint are damaged, incomplete or do not fit together. The message names file and key."""
