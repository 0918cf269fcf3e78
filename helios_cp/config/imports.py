"""How commands import what others wrote: quietly, and no more of it than Helios uses."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

NOISY = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
"""diffusers imports torchao wherever it is installed, which then warns of its binaries for other cards."""


def quiet_imports() -> None:
    """For commands, before anything imports diffusers: a library leaves the loggers of others alone.

    What the user's environment says of them holds.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


UNUSED = ("scipy", "torchao")
"""transformers imports them with every model, for losses and for weights of kinds that no text encoder here has."""


def import_text_encoder() -> None:
    """For the processes of commands, before they load a text encoder: import transformers' without `UNUSED`.

    That saves 2.2 s of CPU time. transformers takes the two as not installed from then on, so a library, whose
    process may want them of transformers, does not do this.
    """
    with without_collection(), without(UNUSED), suppress(ImportError, RuntimeError):  # who needs them is imported later
        from transformers import UMT5EncoderModel  # noqa: F401


def import_schedulers() -> None:
    """As `import_text_encoder`, before diffusers is imported for its schedulers alone, which compile nothing.

    That saves 0.8 s of CPU time. diffusers takes torch for one that cannot compile from then on.
    """
    with without_collection(), without(("torch._dynamo",)), suppress(ImportError, RuntimeError):
        import diffusers  # noqa: F401


@contextmanager
def without_collection() -> Iterator[None]:
    """Inside, Python looks for no garbage: modules stay, and to look through them takes a quarter of their import."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def without(packages: tuple[str, ...]) -> Iterator[None]:
    """Inside, packages that are not imported yet cannot be, and are not found either."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """transformers draws one for each load and save, however small; its setting is that of the whole process."""
    from transformers.utils import logging

    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()
