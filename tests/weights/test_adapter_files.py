"""Unit: files of adapters in the formats of several trainers, and those that are refused.

Updates are compared exactly: factors are small integers, whose products fp32 holds. Where diffusers converts a format,
its conversion is the reference; it scales the factors first, so that the last bits may differ.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import HeliosPipeline
from safetensors.torch import save_file

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Adapter, Execution
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.weights.adapter_files import layer_names
from helios_cp.weights.lora import check_adapters, merged, read_updates, shapes_of
from tests.loading import load_transformer

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def checkpoint(presets) -> Checkpoint:
    return Checkpoint.read(presets["random-distilled"])


WAN = {f"attn{index}.{ours}": f"{name}_attn.{wan}" for index, name in ((1, "self"), (2, "cross"))
       for ours, wan in zip(ATTENTION, "qkvo", strict=True)}  # fmt: skip
WAN |= {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}


def named_as_wan(layer: str) -> str:
    """`blocks.0.attn1.to_q` -> `blocks.0.self_attn.q`."""
    blocks, index, inner = layer.split(".", 2)
    return f"{blocks}.{index}.{WAN[inner]}"


@pytest.fixture(scope="module")
def shapes(checkpoint) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return shapes_of(HeliosTransformer(checkpoint.transformer))


@pytest.fixture(scope="module")
def factors(shapes) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Down and up, of rank 4, for each linear layer of each block; in values that float8 can say exactly."""
    generator = torch.Generator().manual_seed(3)
    return {
        layer: tuple(torch.randint(-3, 4, size, generator=generator).float() for size in ((4, columns), (rows, 4)))
        for name, (rows, *rest) in shapes.items()
        for layer in [name.removesuffix(".weight")]
        for columns in rest
        if name.endswith(".weight") and layer.split(".", 2)[-1] in WAN
    }


def musubi(factors) -> dict[str, torch.Tensor]:
    tensors = {}
    for layer, (down, up) in factors.items():
        name = f"lora_unet_{named_as_wan(layer).replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    return tensors


def comfy(factors, down_word: str = "lora_A", up_word: str = "lora_B") -> dict[str, torch.Tensor]:
    tensors = {}
    for layer, (down, up) in factors.items():
        name = f"diffusion_model.{named_as_wan(layer)}"
        tensors |= {f"{name}.{down_word}.weight": down, f"{name}.{up_word}.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors


def without_alpha(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if "alpha" not in key}


def in_float8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.to(torch.float8_e4m3fn) for key, tensor in tensors.items()}


FORMATS = {
    "musubi": musubi,
    "musubi without alpha": lambda factors: without_alpha(musubi(factors)),
    "musubi in float8": lambda factors: in_float8(musubi(factors)),
    "ComfyUI": comfy,
    "ComfyUI without alpha": lambda factors: without_alpha(comfy(factors)),
    "ComfyUI in float8": lambda factors: in_float8(comfy(factors)),
    "ComfyUI, down and up": lambda factors: comfy(factors, "lora_down", "lora_up"),
}
SOME_LAYERS = {
    "all": lambda layer: True,
    "attention": lambda layer: "attn" in layer,
    "feed-forward": lambda layer: "ffn" in layer,
    "not block 1": lambda layer: "blocks.1." not in layer,
}


@pytest.mark.parametrize("some", SOME_LAYERS)
@pytest.mark.parametrize("name", FORMATS)
def test_names_of_other_trainers(shapes, factors, tmp_path, name, some):
    factors = {layer: pair for layer, pair in factors.items() if SOME_LAYERS[some](layer)}
    save_file(FORMATS[name](factors), tmp_path / "adapter.safetensors")
    found = read_updates([Adapter(str(tmp_path / "adapter.safetensors"))], shapes)
    assert found.keys() == {f"{layer}.weight" for layer in factors}
    for layer, (down, up) in factors.items():
        product = merged(torch.zeros(shapes[f"{layer}.weight"]), found[f"{layer}.weight"])
        assert torch.equal(product, (1.0 if "without alpha" in name else 0.5) * up @ down)


@pytest.mark.parametrize("name", ["musubi", "ComfyUI", "ComfyUI without alpha", "ComfyUI, down and up"])
def test_names_as_diffusers_converts_them(shapes, factors, tmp_path, name):
    """Where its conversion serves; it fails for the other formats."""
    tensors = FORMATS[name](factors)
    files = tmp_path / "before.safetensors", tmp_path / "after.safetensors"
    save_file(tensors, files[0])
    save_file(HeliosPipeline.lora_state_dict(dict(tensors)), files[1])
    found, expected = (read_updates([Adapter(str(file))], shapes) for file in files)
    assert found.keys() == expected.keys()
    for parameter in found:
        products = [merged(torch.zeros(shapes[parameter]), each[parameter]) for each in (found, expected)]
        torch.testing.assert_close(*products, rtol=1e-5, atol=1e-6)


def test_each_layer_has_names_of_its_own(shapes):
    """No name stands for two layers, and each layer has its name in diffusers."""
    names = layer_names(shapes)
    layers = {layer: [name for name in names if names[name] == layer] for layer in names.values()}
    assert all(layer in found for layer, found in layers.items())
    assert sum(map(len, layers.values())) == len(names)
    assert names["blocks.1.norm3"] == names["blocks_1_norm3"] == "blocks.1.norm2"
    assert names["blocks.0.modulation"] == "blocks.0.scale_shift_table" and names["head.head"] == "proj_out"


def test_lycoris_writes_wan_names(checkpoint, shapes, tmp_path):
    """LoKr of two whole matrices: its alpha says nothing, as LyCORIS and ComfyUI take it; and `dora_scale` of rows."""
    left, right, rows = torch.randn(4, 2), torch.randn(24, 48), torch.rand(96, 1)
    prefix = "lycoris_blocks_0_self_attn_q"
    tensors = {f"{prefix}.lokr_w1": left, f"{prefix}.lokr_w2": right, f"{prefix}.alpha": torch.tensor(16.0)}
    weight = load_transformer(checkpoint, torch.float32).state_dict()["blocks.0.attn1.to_q.weight"]
    for scales, expected in (
        ({}, weight + torch.kron(left, right)),
        ({f"{prefix}.dora_scale": rows}, rows * torch.nn.functional.normalize(weight + torch.kron(left, right), dim=1)),
    ):
        save_file(tensors | scales, tmp_path / "adapter.safetensors")
        updates = read_updates([Adapter(str(tmp_path / "adapter.safetensors"))], shapes)
        torch.testing.assert_close(merged(weight, updates["blocks.0.attn1.to_q.weight"]), expected)


def test_differences(checkpoint, shapes, tmp_path):
    """`.diff` of any parameter, norms too, and `.diff_b` of a bias: added as they are, at the adapter's strength."""
    keys = {
        "diffusion_model.blocks.0.norm3.diff": "blocks.0.norm2.weight",
        "diffusion_model.blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "diffusion_model.blocks.1.self_attn.norm_q.diff": "blocks.1.attn1.norm_q.weight",
        "diffusion_model.blocks.1.modulation.diff": "blocks.1.scale_shift_table",
        "lycoris_blocks_2_norm3.w_norm": "blocks.2.norm2.weight",
        "lycoris_blocks_2_norm3.b_norm": "blocks.2.norm2.bias",
        "diffusion_model.blocks.2.ffn.0.diff_b": "blocks.2.ffn.net.0.proj.bias",
        "diffusion_model.head.head.diff": "proj_out.weight",
        "diffusion_model.patch_embedding.diff": "patch_embedding.weight",
    }
    tensors = {key: torch.randn(shapes[parameter]) for key, parameter in keys.items()}
    save_file(tensors, tmp_path / "adapter.safetensors")
    adapter = Adapter(str(tmp_path / "adapter.safetensors"), 0.5)
    plain = load_transformer(checkpoint, torch.float32).state_dict()
    found = load_transformer(checkpoint, torch.float32, execution=Execution(lora=(adapter,))).state_dict()
    expected = plain | {parameter: plain[parameter] + 0.5 * tensors[key] for key, parameter in keys.items()}
    assert all(torch.equal(found[name], expected[name]) for name in plain)


def test_the_name_of_an_adapter_in_the_key(shapes, factors, tmp_path):
    """As PEFT writes it while an adapter is in its model."""
    down, up = factors["blocks.0.attn1.to_q"]
    prefix = "base_model.model.blocks.0.attn1.to_q"
    save_file(
        {f"{prefix}.lora_A.default.weight": down, f"{prefix}.lora_B.default.weight": up}, tmp_path / "a.safetensors"
    )
    (update,) = read_updates([Adapter(str(tmp_path / "a.safetensors"))], shapes)["blocks.0.attn1.to_q.weight"]
    ((left, right),) = update.sides
    assert torch.equal(left, up) and torch.equal(right, down) and update.scale == 1


# Refused in one line, before weights are loaded


def written(folder: Path, change=lambda tensors: None, **metadata: str) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "transformer.blocks.0.attn1.to_q.lora_A.weight": torch.randn(4, 96, generator=generator),
        "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.randn(96, 4, generator=generator),
    }
    change(tensors)
    save_file(tensors, folder / "adapter.safetensors", metadata=metadata or None)
    return folder / "adapter.safetensors"


def put(key: str, *shape: int):
    return lambda tensors: tensors.update({f"transformer.blocks.0.{key}": torch.zeros(shape)})


def put_all(layer: str, words: dict[str, tuple[int, ...]]):
    added = {f"transformer.blocks.0.{layer}.{word}": torch.zeros(shape) for word, shape in words.items()}
    return lambda tensors: tensors.update(added)


DAMAGES = [
    (put("attn3.to_q.lora_A.weight", 4, 96), {}, "attn3.to_q.lora_A.weight belongs to no layer"),
    (put("attn1.to_k.lora_magnitude_vector", 96), {}, "to_k.lora_magnitude_vector has no lora_A.weight beside it"),
    (put("attn1.to_q.lora_magnitude_vector", 95), {}, "lora_magnitude_vector has shape (95,); it must be (96,)"),
    (put("attn1.to_q.dora_scale", 1, 96), {}, "dora_scale: the kind is DoRA of columns; only DoRA of rows"),
    (put("attn1.to_q.hada_w1_a", 96, 4), {}, "to_q.hada_w1_a is of a layer with adapters of two kinds"),
    (put("attn1.to_k.hada_w1_a", 96, 4), {}, "to_k.hada_w1_a has no hada_w1_b beside it"),
    (put("attn1.to_k.lokr_w1", 4, 4), {}, "to_k.lokr_w1 has no lokr_w2_a beside it"),
    (put("attn1.to_k.lokr_t2", 4, 4, 1, 1), {}, "lokr_t2: the kind is LoKr with a Tucker core"),
    (put("attn1.to_k.lora_mid.weight", 4, 4, 1, 1), {}, "lora_mid.weight: the kind is LoRA with a Tucker core"),
    (put("attn1.to_k.oft_blocks", 4, 24, 24), {}, "oft_blocks: the kind is OFT"),
    (put("attn1.to_k.ia3_l", 96), {}, "ia3_l: the kind is IA3"),
    (put("attn1.to_k.diff", 96), {}, "to_k.diff has shape (96,); it must be (96, 96)"),
    (put("attn1.norm_q.diff_b", 96), {}, "norm_q.diff_b is for the bias of a layer that has none"),
    (put("attn1.to_k.bias", 96), {}, "to_k.bias is a whole parameter (modules_to_save or bias of PEFT)"),
    (put("attn1.to_k.something", 96), {}, "to_k.something belongs to no layer of the model, or is of an unknown kind"),
    (put("attn1.to_q.lora_up.weight", 96, 4), {}, "says the same as"),
    (put("attn1.norm_q.lora_A.weight", 4, 96), {}, "norm_q.lora_A.weight belongs to no layer"),
    (put("attn1.to_k.lora_A.weight", 4, 96), {}, "to_k.lora_A.weight has no lora_B.weight beside it"),
    (put("attn1.to_q.lora_A.weight", 3, 96), {}, "lora_B.weight (96, 4): these shapes"),
    (put("attn1.to_q.lora_A.weight", 4, 97), {}, "lora_A.weight (4, 97), "),
    (put("attn1.to_q.lora_B.weight", 95, 4), {}, "lora_B.weight (95, 4): these shapes make no weight (96, 96)"),
    (put("attn1.to_q.lora_B.weight", 1, 4), {}, "lora_B.weight (1, 4): these shapes make no weight (96, 96)"),
    (put("attn1.to_q.lora_B.weight", 96), {}, "lora_B.weight (96,): these shapes make no weight (96, 96)"),
    (put_all("attn1.to_k", {"lora_A.weight": (8, 48), "lora_B.weight": (192, 8)}), {}, "(192, 8): these shapes"),
    (put_all("attn1.to_k", {"lora_A.weight": (0, 96), "lora_B.weight": (96, 0)}), {}, "lora_A.weight is of rank 0"),
    (put_all("attn1.to_k", {"lokr_w1": (4, 4), "lokr_w2": (24, 23)}), {}, "lokr_w2 (24, 23): these shapes"),
    (put("attn1.to_q.lora_B.bias", 95), {}, "lora_B.bias has shape (95,); it must be (96,)"),
    (put("attn1.to_q.alpha", 2), {}, "to_q.alpha has shape (2,); it must be one number"),
    (lambda tensors: None, {"lora_adapter_metadata": "["}, "lora_adapter_metadata in its header is no JSON object"),
    (lambda tensors: None, {"lora_adapter_metadata": '{"use_dora": true}'}, "no lora_magnitude_vector beside it"),
    (lambda tensors: None, {"lora_adapter_metadata": '{"peft_type": "IA3"}'}, "its kind (peft_type) is IA3"),
    (lambda tensors: None, {"lora_adapter_metadata": '{"init_lora_weights": "pissa"}'}, "(init_lora_weights) is pissa"),
    (lambda tensors: None, {"lora_adapter_metadata": '{"use_qalora": true}'}, "use_qalora is set"),
    (lambda tensors: None, {"lora_adapter_metadata": '{"lora_alpha": Infinity}'}, "has an alpha of inf"),
    (lambda tensors: tensors.clear(), {}, "holds no adapter"),
]


@pytest.mark.parametrize(("change", "metadata", "expected"), DAMAGES, ids=[expected for *_, expected in DAMAGES])
def test_a_file_that_does_not_fit(checkpoint, tmp_path, change, metadata, expected):
    file = written(tmp_path, change, **metadata)
    with pytest.raises(RequestError) as caught:
        check_adapters([Adapter(str(file))], checkpoint.transformer)
    message = str(caught.value)
    assert message.startswith(f"--lora {file}: ") and expected in message and "\n" not in message


def test_paths_that_hold_no_adapter(checkpoint, tmp_path):
    (tmp_path / "adapter.bin").write_bytes(b"pickled")
    (tmp_path / "empty").mkdir()
    torn = tmp_path / "torn" / "adapter.safetensors"
    torn.parent.mkdir()
    torn.write_bytes(written(tmp_path).read_bytes()[:-7])
    shutil.copy(tmp_path / "adapter.safetensors", torn.with_name("another.safetensors"))
    for path, expected in (
        (tmp_path / "adapter.bin", "is a pickle, which could run code and is never read"),
        (tmp_path / "missing", "there is no such file or folder"),
        (tmp_path / "empty", "0 .safetensors files"),
        (torn.parent, "2 .safetensors files"),
        (torn, "no intact safetensors file"),
    ):
        with pytest.raises(RequestError, match=expected):
            check_adapters([Adapter(str(path))], checkpoint.transformer)
    (tmp_path / "adapter.safetensors").unlink()
    with pytest.raises(RequestError, match=r"adapter\.bin is a pickle"):
        check_adapters([Adapter(str(tmp_path))], checkpoint.transformer)


def test_refused_on_the_command_line(cache, tmp_path, capsys, monkeypatch, no_weights):
    from helios_cp.generate.__main__ import main

    monkeypatch.setenv("HELIOS_CP_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, put("attn1.to_q.lora_A.weight", 3, 96))
    with pytest.raises(SystemExit) as stopped:
        main(["--prompt", "a fox", "--height", "64", "--width", "64", "--lora", f"{file}:0.5"])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "attn1.to_q.lora_B.weight (96, 4)" in lines[0]
    assert not list(tmp_path.glob("*.mp4"))
