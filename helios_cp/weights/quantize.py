"""Linear layers of the blocks with weights of 8 or 4 bits, by torchao.

`fp8`: weights and activations are float8, and so are their products. A row of a weight and a token of the activations
have a scale each. `int8`, `int4`: weights only. A row of int8 and 32 values of int4 have a scale each; activations and
products stay in the dtype of the model.

Embeddings, norms, modulation and the output layer are not quantised, because they are 2 % of the 14B model. Every row
is quantised alone and in fp32, whatever the dtype of the model. So fused layers, and ranks that hold some rows or
columns, have the values of the whole layer. With float8 activations, layouts differ by rounding: the last bit of a sum
decides between two values, and with `--ffn-tp` a rank scales a token by the hidden features that it has.

torchao is imported where it is used, because that takes a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from helios_cp.config.errors import CheckpointError
from helios_cp.config.execution import FEATURE_MULTIPLES
from helios_cp.files.tensor_files import Slices, StoredTensor, read_json

COMPONENTS = ("qdata", "scale")
Components = dict[str, Tensor]
"""`qdata` `[N, K]`, or `[N, K/2]` where two values share a byte, and `scale` `[N, K/g]`, of groups of g values."""

MARKER = "quantization_config"
METHOD = "helios_cp"
FORMAT = 1
INT4_GROUP = FEATURE_MULTIPLES["int4"]
"""Values of a row that share a scale."""
SMALLEST = 1e-12
"""The least that the largest value of a row or token counts as. A scale of 0 would turn zeros into NaN in float8."""
DTYPES = {
    "fp8": {"qdata": (torch.float8_e4m3fn, "F8_E4M3"), "scale": (torch.float32, "F32")},
    "int8": {"qdata": (torch.int8, "I8"), "scale": (torch.float32, "F32")},
    "int4": {"qdata": (torch.uint8, "U8"), "scale": (torch.bfloat16, "BF16")},
}
"""Dtypes of the components of each kind, and what safetensors calls them."""


def is_block_linear(path: str, module: nn.Module) -> bool:
    """Whether `--quantize` changes the weight of this module of a transformer."""
    return path.startswith("blocks.") and isinstance(module, nn.Linear)


def quantise(weight: Tensor, kind: str) -> Components:
    """A weight `[N, K]` of any float dtype, on its device."""
    weight = weight.float()
    if kind == "int4":
        from helios_cp.weights.int4 import quantise_int4

        return dict(zip(COMPONENTS, quantise_int4(weight, INT4_GROUP), strict=True))
    from torchao.quantization import Float8Tensor, Int8Tensor, PerRow
    from torchao.quantization.quantize_.common import KernelPreference

    if kind == "int8":
        quantised = Int8Tensor.from_hp(weight, PerRow())
    else:
        # torchao would take another library where one is installed, and that may round differently.
        quantised = Float8Tensor.from_hp(
            weight, torch.float8_e4m3fn, PerRow(), hp_value_lb=SMALLEST, kernel_preference=KernelPreference.TORCH
        )
    return components(quantised)


def assemble(found: Components, kind: str, dtype: torch.dtype) -> Tensor:
    """The weight that a linear layer of a model in `dtype` can use, over the memory of its components."""
    qdata, scale = (found[name] for name in COMPONENTS)
    if kind == "int4":
        from helios_cp.weights.int4 import Int4Weight

        return Int4Weight(qdata, scale, dtype)
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, Int8Tensor, PerRow
    from torchao.quantization.quantize_.common import KernelPreference
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    block = [1, qdata.shape[1]]
    if kind == "int8":
        return Int8Tensor(qdata, scale, block, dtype)
    return Float8Tensor(
        qdata,
        scale,
        block_size=block,
        mm_config=Float8MMConfig(use_fast_accum=True),
        act_quant_kwargs=QuantizeTensorToFloat8Kwargs(
            torch.float8_e4m3fn, PerRow(), hp_value_lb=SMALLEST, kernel_preference=KernelPreference.TORCH
        ),
        kernel_preference=KernelPreference.TORCH,  # as in `quantise`
        dtype=dtype,
    )


def components(weight: Tensor) -> Components:
    """What a quantised weight consists of."""
    return {name: getattr(weight, name) for name in COMPONENTS}


def is_quantised(weight: Tensor) -> bool:
    return all(hasattr(weight, name) for name in COMPONENTS)


def component_shapes(rows: int, columns: int, kind: str) -> dict[str, tuple[int, int]]:
    """The shapes of the components of a weight `[rows, columns]`."""
    if kind == "int4":
        return {"qdata": (rows, columns // 2), "scale": (rows, columns // INT4_GROUP)}
    return {"qdata": (rows, columns), "scale": (rows, 1)}


def empty_components(rows: int, columns: int, kind: str, device: torch.device) -> Components:
    shapes = component_shapes(rows, columns, kind)
    return {name: torch.empty(shapes[name], dtype=dtype, device=device) for name, (dtype, _) in DTYPES[kind].items()}


def part_of_component(part: Slices, name: str, kind: str) -> Slices:
    """Which part of a component belongs to part of a weight; int4 is cut at whole groups."""
    if len(part) < 2:
        return part  # rows are the same in both
    rows, columns = part
    if name == "scale":
        if kind != "int4":
            return (rows,)  # a row's scale holds for each part of it
        return rows, slice(columns.start // INT4_GROUP, columns.stop // INT4_GROUP)
    return rows, slice(columns.start // 2, columns.stop // 2) if kind == "int4" else columns


def stored_quantization(folder: Path) -> str | None:
    """How the weights of a checkpoint folder are quantised, as the config of its transformer says.

    Raises `CheckpointError` if another program, or another version of this one, quantised them.
    """
    file = folder / "transformer" / "config.json"
    if not file.is_file():
        return None  # a config that is built in
    marker = read_json(file).get(MARKER)
    if marker is None:
        return None
    kind = marker.get("kind") if isinstance(marker, dict) else None
    if marker != quantization_marker(str(kind)) or kind not in DTYPES:
        raise CheckpointError(
            f"{file}: {MARKER} is {marker}; only what `python -m helios_cp.weights quantize` writes in format "
            f"{FORMAT} is supported"
        )
    return kind


def quantization_marker(kind: str) -> dict[str, Any]:
    return {"quant_method": METHOD, "format": FORMAT, "kind": kind}


def with_components(expected: Mapping[str, tuple[int, ...]], layers: set[str], kind: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a quantised checkpoint's tensors, from those of one that is not; `layers` are quantised."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in expected.items():
        if name in layers:
            shapes |= {f"{name}.{component}": size for component, size in component_shapes(*shape, kind).items()}
        else:
            shapes[name] = shape
    return shapes


def check_stored(stored: Mapping[str, StoredTensor], layers: set[str], kind: str) -> None:
    """Raises `CheckpointError` where components are of another dtype than their kind has."""
    for name in layers:
        for component, (_, dtype) in DTYPES[kind].items():
            where = stored[f"{name}.{component}"]
            if where.dtype != dtype:
                raise CheckpointError(f"{where.file}: {name}.{component} is {where.dtype}; {kind} has {dtype} there")
