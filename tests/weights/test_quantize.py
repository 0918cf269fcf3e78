"""Unit, and multi-rank gloo: block weights in fp8, int8 and int4, quantised while loading or read from a folder.

The error of a value is bounded by its format: half a step of its row's (or group's) scale for integers, and for int4
what its scale loses in bfloat16, 2^-9 of 7.5 steps; half a unit of three mantissa bits, 2^-4 of the value, for float8.
What is loaded is compared bitwise with what was written. Forwards of weights that were quantised and multiplied as such
are compared in fp32 with the dequantised weights in a plain model, to 1e-5 of the range: the same products in another
order. In float8 that order can move an activation over the border between two of its values, so layouts are compared
with what float8 loses: at most half of it, or all of it where `--ffn-tp` gives activations other scales.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import HeliosTransformer3DModel
from safetensors.torch import load_file, save_file

from benchmarks.models.full_size import quantize_blocks
from benchmarks.ranks.pool import shared_pool
from helios_cp.config.checkpoint import Checkpoint, TransformerConfig
from helios_cp.config.errors import CheckpointError, RequestError
from helios_cp.config.execution import QUANTIZATIONS, Adapter, Execution, Target
from helios_cp.config.layout import Layout
from helios_cp.config.refusals import Setting, check_setting
from helios_cp.config.request import Request
from helios_cp.pipeline.pipeline import Pipeline
from helios_cp.weights.__main__ import main
from helios_cp.weights.check import _cpu_scales_by_row, check_execution
from helios_cp.weights.quantize import (
    assemble,
    components,
    is_block_linear,
    is_quantised,
    quantise,
)
from helios_cp.weights.quantize_folder import quantize_folder
from parallel.mesh import Degrees, Mesh
from tests.loading import load_transformer
from tests.weights.loading_memory import OwnMemory, mapped
from tests.weights.test_adapter_files import written
from tests.weights.test_lora import bits as bits_of
from tests.weights.test_lora import error, forward, inputs_for, same_bits

pytest.importorskip("torchao")

RUN_ON_CPU = [kind for kind in QUANTIZATIONS if kind != "fp8" or _cpu_scales_by_row()]
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_card])]
REQUEST = Request(prompt=("a fox",), height=64, width=64, num_frames=33, pyramid_num_inference_steps_list=(1, 1, 1))


@pytest.fixture(scope="module")
def checkpoint(presets) -> Checkpoint:
    return Checkpoint.read(presets["random-distilled"])


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory) -> dict[str, Path]:
    """The checkpoint, quantised once for all."""
    root = tmp_path_factory.mktemp("quantised")
    for kind in QUANTIZATIONS:
        quantize_folder(checkpoint, root / kind, kind)
    return {kind: root / kind for kind in QUANTIZATIONS}


# Values


def rows_of_all_sizes() -> torch.Tensor:
    """A weight `[6, 64]` whose rows differ by factors of ten, and a row of zeros."""
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    return weight * torch.tensor([1e-3, 1e-2, 0.1, 1.0, 10.0, 0.0]).unsqueeze(1)


def is_close(weight: torch.Tensor, found: torch.Tensor, scale: torch.Tensor, kind: str) -> bool:
    mistakes = (found - weight).abs()
    if kind == "fp8":
        return bool((mistakes <= weight.abs() / 16 + scale / 512).all())  # below, float8 has no full mantissa
    steps = scale.float().repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    return bool((mistakes <= (0.515 if kind == "int4" else 0.5001) * steps).all())


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_values(kind, device):
    weight = rows_of_all_sizes().to(device)
    found = quantise(weight, kind)
    values = assemble(found, kind, torch.float32).dequantize()
    assert is_close(weight, values, found["scale"], kind)
    assert (values[5] == 0).all()
    one_scale = quantise(weight.flatten().unsqueeze(0), "int8")  # for all rows, as a mistake to be seen
    wrong = assemble(one_scale, "int8", torch.float32).dequantize().view_as(weight)
    assert not is_close(weight, wrong, quantise(weight, kind)["scale"] * 1.0, kind)
    bytes_each = sum(part.nbytes for part in found.values()) / weight.numel()
    assert bytes_each == {"fp8": 1 + 4 / 64, "int8": 1 + 4 / 64, "int4": 0.5 + 2 / 32}[kind]


def test_int4_by_hand():
    weight = torch.arange(-8.0, 24.0).unsqueeze(0)  # the largest is 23, so that a step is 46 / 15
    found = quantise(weight, "int4")
    step = torch.tensor(46 / 15).bfloat16()
    assert found["scale"].item() == step
    values = torch.round(weight / step.float()).clamp(-8, 7)
    assert torch.equal(assemble(found, "int4", torch.float32).dequantize(), values * step.float())
    low, high = (values[0, 0::2] + 8).byte(), (values[0, 1::2] + 8).byte()
    assert torch.equal(found["qdata"][0], low | high << 4)


def tokens_in_float8(states: torch.Tensor) -> torch.Tensor:
    """Each token with a scale of its own, as each row of a weight."""
    rows = assemble(quantise(states.flatten(0, 1), "fp8"), "fp8", torch.float32)
    return rows.dequantize().double().view(states.shape)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_products(kind, device):
    """Of a layer, of some of its rows as the last block takes them, and without the bias."""
    if device == "cpu" and kind not in RUN_ON_CPU:
        pytest.skip("this torch has no product of float8 by rows on a CPU")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    weight, bias, states = (torch.randn(*shape, generator=generator) for shape in ((96, 64), (96,), (2, 5, 64)))
    weight, bias, states = weight.to(device), bias.to(device, dtype), states.to(device, dtype)
    states[0, 1] = 0
    quantised = assemble(quantise(weight, kind), kind, dtype)
    if kind == "fp8":  # the kernels do not depend on what else is installed
        from torchao.quantization.quantize_.common import KernelPreference

        assert quantised.kernel_preference == KernelPreference.TORCH
        assert quantised.act_quant_kwargs.kernel_preference == KernelPreference.TORCH
        assert quantised[32:64].kernel_preference == KernelPreference.TORCH
    exact = states.double() if kind != "fp8" else tokens_in_float8(states.float())
    expected = F.linear(exact, quantised.dequantize(torch.float32).double(), bias.double())
    tolerance = 2e-2 if device == "cuda" else 1e-5  # bfloat16 has 8 bits
    whole = F.linear(states, quantised, bias)
    assert whole.dtype == dtype and error(whole.double(), expected) <= tolerance
    rows = F.linear(states, quantised[32:64], bias[32:64])
    assert error(F.linear(states, quantised).double(), expected - bias.double()) <= tolerance
    if device == "cuda":  # where the kernel depends on the number of rows, and bfloat16 loses as much as 8 bits do
        assert error(rows.double(), whole[..., 32:64].double()) <= tolerance
    else:
        assert torch.equal(rows, whole[..., 32:64])
        assert error(F.linear(exact, weight.double(), bias.double()), expected) > tolerance  # were it not quantised


# A model


@pytest.mark.parametrize("kind", RUN_ON_CPU)
def test_loaded_quantised(checkpoint, kind):
    """Only linear layers of the blocks change; they are the same after loading, and in a model that is loaded."""
    plain = load_transformer(checkpoint, torch.bfloat16)
    model = load_transformer(checkpoint, torch.bfloat16, execution=Execution(quantize=kind))
    changed = {path for path, module in model.named_modules() if is_quantised(getattr(module, "weight", 0))}
    assert changed == {path for path, module in plain.named_modules() if is_block_linear(path, module)}
    assert len(changed) == 7 * checkpoint.transformer.num_layers
    for name, parameter in plain.named_parameters():
        if name.removesuffix(".weight") not in changed:
            assert torch.equal(model.get_parameter(name), parameter)
    exact = load_transformer(checkpoint, torch.float32)
    quantize_blocks(exact, kind)
    found, expected = bits_of(exact), bits_of(model)
    assert all(torch.equal(found[name], expected[name]) for name in found if name.endswith((".qdata", ".scale")))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_forward_has_the_values_of_the_weights(checkpoint, kind):
    model = load_transformer(checkpoint, torch.float32, execution=Execution(quantize=kind))
    exact = load_transformer(checkpoint, torch.float32)
    inputs = inputs_for(checkpoint)
    plain = forward(exact, inputs)
    for path, module in exact.named_modules():
        if is_block_linear(path, module):
            module.weight.copy_(model.get_submodule(path).weight.dequantize())
    assert error(forward(model, inputs), forward(exact, inputs)) <= 1e-5
    assert 1e-3 < error(forward(model, inputs), plain) < 0.2


def test_never_whole_in_memory(checkpoint, monkeypatch):
    """What is held is the quantised model, a quarter of that in float32, and besides one layer at work."""
    plain = load_transformer(checkpoint, torch.float32)
    layers = [module.weight for path, module in plain.named_modules() if is_block_linear(path, module)]
    others = sum(p.nbytes for p in plain.parameters()) - sum(weight.nbytes for weight in layers)
    whole = others + sum(weight.nbytes for weight in layers)
    own = others + sum(weight.nbytes // 4 + 4 * weight.shape[0] for weight in layers)
    work = 6 * max(weight.nbytes for weight in layers)
    monkeypatch.setattr("helios_cp.weights.transformer.read", mapped)
    with OwnMemory() as memory:
        model = load_transformer(checkpoint, torch.float32, execution=Execution(quantize="int8"))
    assert own <= memory.live_bytes <= 1.01 * own
    assert memory.peak_bytes <= own + work < whole
    del model
    with OwnMemory() as memory:  # as a mistake to be seen
        quantize_blocks(load_transformer(checkpoint, torch.float32), "int8")
    assert memory.peak_bytes >= whole


@pytest.mark.parametrize("kind", RUN_ON_CPU)
def test_compiled_without_a_break(checkpoint, kind):
    """Traced as a whole, with fewer rows too; run without code generation, so that bits are the same."""
    model = load_transformer(checkpoint, torch.float32, execution=Execution(quantize=kind))
    attention = model.blocks[2].attn1

    def layers(states: torch.Tensor) -> torch.Tensor:
        return attention.to_out[0](attention.to_qkv.project(attention.to_qkv(states)[..., :96], 0, 1))

    states = torch.randn(1, 7, 96, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layers, backend="aot_eager", fullgraph=True)(states), layers(states))


# Ranks


@torch.no_grad()
def run_ranks(rank: int, folders: list[str], kinds: list[str | None], degrees: Degrees) -> list:
    from helios_cp.pipeline.parallelize import load_parallel

    found = []
    for folder, kind in zip(folders, kinds, strict=True):
        checkpoint = Checkpoint.read(Path(folder))
        execution = Execution(quantize=kind)
        pipeline = load_parallel(
            checkpoint, Mesh.build(degrees), dtype=torch.float32, denoise_only=True, execution=execution
        )
        weights = {name: values.view(torch.uint8) for name, values in bits_of(pipeline.transformer).items()}  # to send
        found.append((weights, forward(pipeline.transformer, inputs_for(checkpoint))))
    return found


@pytest.mark.parametrize("degrees", [Degrees(ulysses=2, ffn_tp=2), Degrees(ring=3, ffn_tp=3)], ids=str)
def test_ranks_hold_parts_of_the_same_values(checkpoint, folders, degrees):
    """Of each kind, quantised while loading and from a folder; activations of fp8 are scaled by what a rank has."""
    sources = [str(checkpoint.folder), str(folders["int8"]), str(checkpoint.folder), str(folders["int4"])]
    kinds = ["int8", None, "int4", "int4"]
    alone = [values for _, values in run_ranks(0, sources, kinds, Degrees())]
    for ranks in shared_pool().run(run_ranks, sources, kinds, degrees, ranks=degrees.world):
        for (first, _), (second, _) in (ranks[:2], ranks[2:]):
            assert all(torch.equal(first[name], second[name]) for name in first)
        errors = [error(mine, other) for (_, mine), other in zip(ranks, alone, strict=True)]
        assert max(errors) <= 1e-5, errors


@pytest.mark.skipif("fp8" not in RUN_ON_CPU, reason="this torch has no product of float8 by rows on a CPU")
@pytest.mark.parametrize("degrees", [Degrees(ulysses=2), Degrees(ring=3), Degrees(ulysses=2, ffn_tp=2)], ids=str)
def test_ranks_in_float8(checkpoint, folders, degrees):
    """Weights have the same bits, from both sources. Results lie nearer to each other than to those without float8."""
    sources, kinds = [str(checkpoint.folder), str(folders["fp8"]), str(checkpoint.folder)], ["fp8", None, None]
    (_, alone), _, (_, plain) = run_ranks(0, sources, kinds, Degrees())
    lost = error(alone, plain)
    for (first, mine), (second, other), _ in shared_pool().run(run_ranks, sources, kinds, degrees, ranks=degrees.world):
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert torch.equal(mine, other)
        assert error(mine, alone) <= (1 if degrees.ffn_tp > 1 else 0.5) * lost
    assert lost > 1e-2


# A folder


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_folder_has_the_bits_of_loading(checkpoint, folders, kind):
    read = Checkpoint.read(folders[kind])
    for dtype in (torch.float32, torch.bfloat16):
        if kind in RUN_ON_CPU:
            expected = bits_of(load_transformer(checkpoint, dtype, execution=Execution(quantize=kind)))
            assert same_bits(load_transformer(read, dtype), expected)
    names = {file.relative_to(folders[kind]).as_posix() for file in folders[kind].rglob("*") if file.is_file()}
    original = {file.relative_to(checkpoint.folder).as_posix() for file in checkpoint.folder.rglob("*.*")}
    assert {name for name in names if "transformer/" not in name} == {
        name for name in original if "transformer/" not in name and (checkpoint.folder / name).is_file()
    }
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (folders[kind] / vae).samefile(checkpoint.folder / vae)  # a link takes no room
    assert all(Path(name).suffix in (".safetensors", ".json") for name in names)
    with pytest.raises(Exception, match="quant"):
        HeliosTransformer3DModel.from_pretrained(folders[kind] / "transformer")


def test_a_folder_in_several_files_with_an_adapter(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("helios_cp.weights.quantize_folder.SHARD_BYTES", 300_000)
    adapter = Adapter(str(written(tmp_path)), 0.5)
    quantize_folder(checkpoint, tmp_path / "out", "int8", [adapter])
    assert len(list((tmp_path / "out" / "transformer").glob("*.safetensors"))) > 3
    expected = bits_of(
        load_transformer(checkpoint, torch.bfloat16, execution=Execution(quantize="int8", lora=(adapter,)))
    )
    assert same_bits(load_transformer(Checkpoint.read(tmp_path / "out"), torch.bfloat16), expected)
    assert not same_bits(load_transformer(checkpoint, torch.bfloat16, execution=Execution(quantize="int8")), expected)


def test_the_command(cache, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HELIOS_CP_CACHE", str(cache))
    out = tmp_path / "new" / "out"
    assert main(["quantize", "random-distilled", str(out)]) == 0
    assert "int8" in capsys.readouterr().out
    pipeline = Pipeline.from_pretrained(str(out), dtype=torch.float32)
    direct = Pipeline.from_pretrained(
        "random-distilled", dtype=torch.float32, cache=cache, execution=Execution(quantize="int8")
    )
    latents = [next(iter(each.stream(REQUEST, output_type="latent"))).latents for each in (pipeline, direct)]
    assert torch.equal(*latents)

    (tmp_path / "adapter.pt").write_bytes(b"pickled")
    capsys.readouterr()
    for arguments, expected in (
        (["random-distilled", str(out)], f"OUT {out}: it exists"),
        (["random-distilled", str(tmp_path / "adapter.pt" / "x")], "is not a folder"),
        (["nothing", str(tmp_path / "x")], "error: IN nothing: no such folder"),
        ([str(tmp_path / "new"), str(tmp_path / "x")], f"error: IN {tmp_path / 'new'}: "),
        ([str(out), str(tmp_path / "x")], "its weights are quantised already"),
        (["random-distilled", str(tmp_path / "x"), "--lora", str(tmp_path / "adapter.pt")], "is a pickle"),
        (["random-distilled", str(tmp_path / "x"), "--quantize", "int3"], "invalid choice: 'int3'"),
        (["random-distilled", str(tmp_path / "x"), "--device", "abacus"], "--device abacus"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["quantize", *arguments])
        lines = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and len(lines) == 1 and expected in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.pt", "new"]


def test_nothing_half_written(checkpoint, tmp_path, monkeypatch):
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("helios_cp.weights.quantize_folder.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        quantize_folder(checkpoint, tmp_path / "out", "int8")
    assert not list(tmp_path.iterdir())


def edit_weights(folder: Path, change) -> None:
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    index = next((folder / "transformer").glob("*.index.json"))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file.name)}))


LAYER = "blocks.1.ffn.net.2.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensors: tensors.pop(f"{LAYER}.scale"), f"{LAYER}.scale is missing"),
        (lambda tensors: tensors.update({LAYER: torch.zeros(96, 192)}), f"{LAYER} has no place"),
        (lambda tensors: tensors.update({f"{LAYER}.scale": torch.zeros(96, 2)}), "it must be (96, 1)"),
        (lambda tensors: tensors.update({f"{LAYER}.qdata": torch.zeros(96, 192)}), "qdata is F32; int8 has I8"),
    ],
)
def test_a_damaged_folder(folders, tmp_path, change, expected):
    folder = shutil.copytree(folders["int8"], tmp_path / "damaged")
    edit_weights(folder, change)
    with pytest.raises(CheckpointError) as caught:
        load_transformer(Checkpoint.read(folder), torch.float32)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("marker", [{"kind": "int8"}, {"quant_method": "torchao"}, "int8"])
def test_a_folder_of_another_format(folders, tmp_path, marker):
    folder = shutil.copytree(folders["int8"], tmp_path / "other")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": marker}))
    with pytest.raises(CheckpointError, match="quantization_config"):
        load_transformer(Checkpoint.read(folder), torch.float32)


# Refused in one line


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--quantize", "int4"], "--quantize int4: the weights in {folder} are int8 already"),
        (["--lora", "{adapter}"], "--lora {adapter}: the weights in {folder} are int8 already and cannot be adapted"),
        (["--shard-weights"], "--shard-weights with --quantize int8: give one of the two"),
        (["--dtype", "float16"], "--quantize int8 with --dtype float16"),
    ],
)
def test_refused_on_the_command_line(folders, tmp_path, capsys, monkeypatch, no_weights, flags, expected):
    from helios_cp.generate.__main__ import main

    monkeypatch.chdir(tmp_path)
    names = {"folder": str(folders["int8"]), "adapter": str(written(tmp_path))}
    flags = [flag.format(**names) for flag in flags]
    with pytest.raises(SystemExit) as stopped:
        main(["--model", names["folder"], "--prompt", "a fox", "--height", "64", "--width", "64", *flags])
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and expected.format(**names) in lines[0]


FULL = Checkpoint(Path("14b"), "distilled", False, TransformerConfig())


@pytest.mark.parametrize(
    ("kind", "device", "dtype", "ffn_tp", "expected"),
    [
        ("fp8", "cuda", torch.float16, 1, "--quantize fp8 with --dtype float16: on CUDA only bfloat16"),
        ("fp8", "cuda", torch.bfloat16, 7, "ffn_dim over --ffn-tp 7 is 1975; a multiple of 16"),
        ("int4", "cpu", torch.bfloat16, 5, "ffn_dim over --ffn-tp 5 is 2765; a multiple of 32"),
        ("int4", "cpu", torch.bfloat16, 8, None),
        ("int8", "cpu", torch.bfloat16, 7, None),
        ("fp8", "cuda", torch.bfloat16, 8, None),
        (None, "cpu", torch.float16, 7, None),
    ],
)
def test_sizes_and_dtypes(kind, device, dtype, ffn_tp, expected):
    def check() -> None:
        layout = Layout(Degrees(ffn_tp=ffn_tp))
        check_execution(FULL, Execution(quantize=kind), torch.device("cpu"), dtype, layout, target=Target(device))

    if expected is None:
        check()
    else:
        with pytest.raises(RequestError) as caught:
            check()
        assert expected in str(caught.value)


def test_without_torchao(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match="it needs torchao; run `pip install torchao`"):
        check_execution(FULL, Execution(quantize="int8"), torch.device("cpu"), torch.bfloat16)


def test_sharded_weights_stay_as_they_are():
    with pytest.raises(RequestError, match="--shard-weights with --quantize fp8"):
        check_setting(Setting(Execution(quantize="fp8"), Layout(shard_weights=True)))


@pytest.mark.gpu
@needs_card
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_forward_on_a_card(checkpoint, kind):
    """Close to that of bfloat16, by what its weights (and activations, in fp8) lose."""
    if kind == "fp8" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs Hopper")
    inputs = inputs_for(checkpoint)
    inputs = type(inputs)(
        *(tensor.cuda() for tensor in (inputs.latents, inputs.timestep, inputs.text)),
        {name: tensor.cuda() for name, tensor in inputs.history.items()},
    )
    plain = forward(load_transformer(checkpoint, torch.bfloat16, "cuda"), inputs)
    model = load_transformer(checkpoint, torch.bfloat16, "cuda", Execution(quantize=kind))
    assert all(part.is_cuda for part in components(model.blocks[0].ffn.net[2].weight).values())
    assert 1e-4 < error(forward(model, inputs).float(), plain.float()) < 0.2
