"""What a checkpoint is, read from its JSON files: the switches of its transformer, and which Helios it holds.

Nothing here imports torch: a request can be checked before anything heavy is loaded.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helios_cp.config.errors import RequestError
from helios_cp.config.json_types import from_json

VAE_SPATIAL = 8
VAE_TEMPORAL = 4

DTYPES = ("bfloat16", "float16", "float32")

CONFIG_FILES = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
WEIGHT_STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
"""The parts that have weights, and how the names of their safetensors files begin."""


@dataclass(frozen=True)
class TransformerConfig:
    """The switches of `HeliosTransformer3DModel`, under the names of its `config.json`.

    Defaults are those of Helios-14B. `added_kv_proj_dim` and other keys that never reach the forward pass are dropped
    by `from_dict`.
    """

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    eps: float = 1e-6
    rope_dim: tuple[int, int, int] = (44, 42, 42)
    rope_theta: float = 10000.0
    guidance_cross_attn: bool = True
    zero_history_timestep: bool = True
    has_multi_term_memory_patch: bool = True
    is_amplify_history: bool = False
    history_scale_mode: str = "per_head"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < 1:
                raise RequestError(f"{field.name} {value} must be at least 1")
        if sum(self.rope_dim) != self.attention_head_dim:
            raise RequestError(f"rope_dim {self.rope_dim} must add up to attention_head_dim {self.attention_head_dim}")
        if any(axis % 2 for axis in self.rope_dim):
            raise RequestError(f"rope_dim {self.rope_dim} must be even on every axis")
        if self.history_scale_mode not in ("per_head", "scalar"):
            raise RequestError(f"history_scale_mode {self.history_scale_mode!r}: allowed are 'per_head' and 'scalar'")

    @property
    def dim(self) -> int:
        """Width of the residual stream, H · D."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TransformerConfig:
        """Read a diffusers `transformer/config.json`.

        Raises `RequestError` for a value of the wrong type, or a switch that would change the computation and is not
        supported.
        """
        if values.get("added_kv_proj_dim") is not None:
            raise RequestError(
                f"transformer config: added_kv_proj_dim={values['added_kv_proj_dim']} is not used by any Helios; "
                "only null is supported"
            )
        if values.get("qk_norm", "rms_norm_across_heads") != "rms_norm_across_heads":
            raise RequestError(
                f"transformer config: qk_norm={values['qk_norm']!r}: only 'rms_norm_across_heads' exists for Helios"
            )
        names = {f.name for f in dataclasses.fields(cls)}
        known = {name: value for name, value in values.items() if name in names}
        known["out_channels"] = known.get("out_channels") or known.get("in_channels", cls.in_channels)
        try:
            return from_json(cls, known)
        except TypeError as error:
            raise RequestError(f"transformer config: {error}") from None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder in the diffusers layout, read from its JSON files only.

    `variant` comes from `model_index.json`: `HeliosPipeline` is base, `HeliosPyramidPipeline` is distilled if
    `is_distilled`, else mid. `rendered_world` says that it knows the rendered clips of `helios_cp.tiny` alone. `source`
    is what `--model` takes to mean the same files on any rank or machine: of a hub id it names the commit.
    """

    folder: Path
    variant: str
    is_cfg_zero_star: bool
    transformer: TransformerConfig
    random_weights: bool = False
    rendered_world: bool = False
    source: str = dataclasses.field(default="", compare=False)

    @property
    def is_pyramid(self) -> bool:
        return self.variant != "base"

    @property
    def is_distilled(self) -> bool:
        return self.variant == "distilled"

    @property
    def stages(self) -> int:
        """Stages that the scheduler is made for. Raises `RequestError` where its file cannot be read."""
        return _read_json(self.folder, "scheduler/scheduler_config.json").get("stages", 3)

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """Raises `RequestError` when the folder is no Helios checkpoint, or a part of it is missing."""
        index = _read_json(folder, "model_index.json")
        kind = index.get("_class_name")
        if kind not in ("HeliosPipeline", "HeliosPyramidPipeline"):
            raise RequestError(
                f"--model {folder}: model_index.json names {kind!r}; a Helios checkpoint has HeliosPipeline or "
                "HeliosPyramidPipeline"
            )
        missing = [part for part in CONFIG_FILES if not (folder / part).is_dir()]
        if missing:
            raise RequestError(f"--model {folder}: the folder(s) {', '.join(missing)} are missing from the checkpoint")
        configs = {part: _read_json(folder, f"{part}/{name}") for part, name in CONFIG_FILES.items()}
        try:
            transformer = TransformerConfig.from_dict(configs["transformer"])
        except RequestError as error:
            raise RequestError(f"--model {folder}: {error}") from None
        return cls(
            folder=folder,
            variant="base" if kind == "HeliosPipeline" else "distilled" if index.get("is_distilled") else "mid",
            is_cfg_zero_star=bool(index.get("is_cfg_zero_star", False)),
            transformer=transformer,
            random_weights=bool(index.get("random_weights", False)),
            rendered_world=bool(index.get("rendered_world", False)),
        )


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"--model {folder}: {name} is missing, so this is no Helios checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"--model {folder}: {name} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise RequestError(f"--model {folder}: {name} does not hold a JSON object")
    return values
