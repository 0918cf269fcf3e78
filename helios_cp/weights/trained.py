"""Parts of a checkpoint from single files of trained weights: a safetensors file a part, its config in the metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helios_cp.config.errors import RequestError


def read_trained(folder: Path, variant: str) -> tuple[Any, Any, Any]:
    """The transformer of a variant ("base", "mid" or "distilled"), the VAE and the text encoder, as diffusers has them.

    Raises `RequestError` when a file is missing or holds no such part.
    """
    import diffusers
    from transformers import UMT5Config, UMT5EncoderModel

    made = []
    for name, make in (
        (variant, lambda config: diffusers.HeliosTransformer3DModel(**config)),
        ("vae", lambda config: diffusers.AutoencoderKLWan(**config)),
        ("text_encoder", lambda config: UMT5EncoderModel(UMT5Config(**config))),
    ):
        path = folder / f"{name}.safetensors"
        try:
            made.append(_read(path, make))
        except FileNotFoundError:
            raise RequestError(f"{path}: the file is missing; helios_cp.tiny.train embed writes it") from None
        except Exception as error:  # whatever a foreign file brings up
            raise RequestError(f"{path}: holds no weights of such a part: {error}") from None
    return tuple(made)


def _read(path: Path, make) -> Any:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        module = make(json.loads((file.metadata() or {})["config"]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = {name: tensors[name].float() for name in module.state_dict() if name in tensors}
    missing = set(dict(module.named_parameters())) - set(state)
    if missing or len(state) < len(tensors):
        odd = min(missing or set(tensors) - set(state))
        raise ValueError(f"{odd} is not both in the file and in its config")
    module.load_state_dict(state, strict=False)  # tied parameters appear twice in the module and once in the file
    return module
