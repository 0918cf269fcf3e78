"""A checkpoint folder written anew with quantised weights.

Only the weights of the transformer change. A quantised tensor `NAME` becomes two plain ones, `NAME.qdata` and
`NAME.scale`. `transformer/config.json` says so under `quantization_config`, so that other programs refuse the folder.
Each row is quantised alone. So q, k and v keep their names, and every rank can read its part.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from helios_cp.config.checkpoint import CONFIG_FILES, Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Adapter, Execution
from helios_cp.files.tensor_files import Reader, read_json
from helios_cp.files.whole_files import write_json, write_tensors
from helios_cp.model.transformer import empty_model
from helios_cp.weights.check import check_execution
from helios_cp.weights.lora import merged, read_updates, shapes_of
from helios_cp.weights.quantize import MARKER, quantise, quantization_marker, stored_quantization
from helios_cp.weights.transformer import STEM, Updates, check_transformer, quantised_layers, stored_transformer

SHARD_BYTES = 2_000_000_000


@torch.no_grad()
def quantize_folder(
    checkpoint: Checkpoint,
    output: Path,
    kind: str,
    adapters: Sequence[Adapter] = (),
    device: torch.device | None = None,
) -> int:
    """Write `output`, whole or not at all; returns the bytes of the transformer's weights in it.

    2 GB of weights are in memory at a time. Raises `RequestError` for weights that are quantised already or adapters
    that do not fit, `CheckpointError` for damaged files, and `OSError` where it cannot be written.
    """
    source = checkpoint.folder / "transformer"
    if stored_quantization(checkpoint.folder) is not None:
        raise RequestError(f"IN {checkpoint.folder}: its weights are quantised already; give what they were made from")
    # Values are the same on every device. Loading checks whether a device can multiply by them.
    check_execution(checkpoint, Execution(quantize=kind), torch.device("meta"), torch.bfloat16)
    model = empty_model(checkpoint.transformer, torch.float32)
    shapes, layers, stored = shapes_of(model), quantised_layers(model), stored_transformer(checkpoint)
    check_transformer(checkpoint, stored, shapes, layers, None)
    updates = read_updates(adapters, shapes)

    output = Path(os.path.abspath(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        folder = Path(temporary) / output.name
        _copy_rest(checkpoint.folder, folder)
        tensors = _quantised(Reader(stored), layers, kind, updates, device or torch.device("cpu"))
        size = _write_files(tensors, folder / "transformer")
        config = read_json(source / "config.json") | {MARKER: quantization_marker(kind)}
        write_json(folder / "transformer" / "config.json", config)
        os.rename(folder, output)  # fails where something has appeared there meanwhile
    return size


def _quantised(
    read: Reader, layers: set[str], kind: str, updates: Updates, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the new transformer, on the CPU, in the order of the old one's files."""
    for name in read.stored:
        tensor = read(name)
        if name in updates:
            tensor = merged(tensor.to(device), updates[name])
        if name in layers:
            for component, values in quantise(tensor.to(device), kind).items():
                yield f"{name}.{component}", values.cpu()
        else:
            yield name, tensor.cpu()


def _write_files(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> int:
    """Files of up to 2 GB, or of one tensor, and last the index that says what is where; returns all their bytes."""
    weight_map: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    files = total = size = 0

    def write() -> None:
        nonlocal files
        files += 1
        name = f"{STEM}-{files:05d}.safetensors"
        write_tensors(folder / name, held)
        weight_map.update(dict.fromkeys(held, name))

    for name, tensor in tensors:
        if held and size + tensor.nbytes > SHARD_BYTES:
            write()
            held, size = {}, 0
        held[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    write()
    write_json(folder / f"{STEM}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def _copy_rest(source: Path, target: Path) -> None:
    """All but the transformer. Weights are linked where the file system can, other files copied."""
    target.mkdir()
    shutil.copyfile(source / "model_index.json", target / "model_index.json")
    for part in CONFIG_FILES:
        for file in sorted(path for path in (source / part).rglob("*") if path.is_file() and part != "transformer"):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # another disk, or a file system without links
                if file.suffix == ".safetensors":  # such files are never written to
                    os.link(os.path.realpath(file), copy)
                    continue
            shutil.copyfile(file, copy)
