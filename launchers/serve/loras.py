"""The LoRAs of a server: clients choose them by name, and never by a path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Adapter
from helios_cp.config.request import Request
from helios_cp.weights.adapter_files import PICKLES
from helios_cp.weights.check import check_lora
from launchers.serve.problems import Refusal

SUFFIX = ".safetensors"
MOST_SCALE = 10.0
"""Of an adapter, in both directions; what is meant to be used is near 1."""
MOST_ADAPTERS = 8
"""Of one video."""
FORMS = 'a name, {"name": NAME, "scale": NUMBER}, or a list of these'


@dataclass(frozen=True)
class Loras:
    """`paths` has the file or folder of each adapter, by its name."""

    paths: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path | None, checkpoint: Checkpoint) -> Loras:
        """Every adapter in a folder, each a .safetensors file or a folder as PEFT writes it.

        Raises `RequestError` for a folder that cannot be read, and for an adapter that the checkpoint cannot have.
        """
        if folder is None:
            return cls()
        try:
            found = sorted(each.absolute() for each in folder.iterdir() if _is_adapter(each))
        except OSError as error:
            raise RequestError(f"--lora-folder {folder}: it cannot be read: {error.strerror}") from None
        paths: dict[str, str] = {}
        for path in found:
            name = path.name.removesuffix(SUFFIX)
            if name in paths:
                raise RequestError(f"--lora-folder {folder}: a file and a folder are both named {name}; keep one")
            try:
                check_lora(checkpoint, [Request(lora=(Adapter(str(path)),))])
            except RequestError as error:
                raise RequestError(f"--lora-folder: {str(error).removeprefix('--lora ')}") from None
            paths[name] = str(path)
        return cls(paths)

    @property
    def names(self) -> list[str]:
        return list(self.paths)

    def chosen(self, asked: Any) -> tuple[Adapter, ...]:
        """The adapters that a client asks for, in one of `FORMS`; an empty list is none. Raises `Refusal`."""
        each = [self._adapter(one) for one in (asked if isinstance(asked, list) else [asked])]
        if len(each) > MOST_ADAPTERS:
            raise _refusal(f"{len(each)} adapters: {MOST_ADAPTERS} at most are allowed")
        if len({adapter.path for adapter in each}) < len(each):
            raise _refusal("an adapter is given twice")
        return tuple(each)

    def _adapter(self, asked: Any) -> Adapter:
        given = {"name": asked} if isinstance(asked, str) else asked
        if not isinstance(given, dict) or "name" not in given or given.keys() - {"name", "scale"}:
            raise _refusal(f"{FORMS} is allowed")
        name, scale = given["name"], given.get("scale", 1.0)
        if not isinstance(name, str) or name not in self.paths:
            known = f"allowed are {', '.join(self.names)}" if self.paths else "this server has none"
            raise _refusal(f"{str(name)[:64]!r} is unknown; {known}")
        is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if not is_number or not -MOST_SCALE <= scale <= MOST_SCALE:  # false for NaN too
            raise _refusal(f"scale {str(scale)[:32]}: a number from {-MOST_SCALE:g} to {MOST_SCALE:g} is allowed")
        return Adapter(self.paths[name], float(scale))


def _is_adapter(path: Path) -> bool:
    """Or a pickle, which is refused where it is checked."""
    if path.name.startswith("."):
        return False
    files = path.iterdir() if path.is_dir() else [path]
    return any(each.suffix in (SUFFIX, *PICKLES) for each in files)


def _refusal(message: str) -> Refusal:
    return Refusal("invalid_request", f"lora: {message}", param="lora")
