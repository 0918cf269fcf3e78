"""Unit: from `--model` to loaded parts.

Weights are compared bitwise: loading copies and casts, and computes nothing. Memory is counted exactly: bytes of the
tensors that loading allocates, and of the files that it has mapped and read.
"""

from __future__ import annotations

import json
import mmap
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import AutoencoderKLWan, HeliosTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from helios_cp.config.checkpoint import Checkpoint, TransformerConfig
from helios_cp.config.errors import CheckpointError, RequestError
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.weights.load import (
    load_scheduler,
    load_text_encoder,
    load_vae,
    resolve,
)
from helios_cp.weights.presets import PRESETS, preset_folder
from tests.loading import load_transformer
from tests.weights.loading_memory import OwnMemory, mapped, mapped_bytes

INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def checkpoint(cache) -> Checkpoint:
    return resolve("random-mid", cache)


@pytest.fixture
def copied(cache, tmp_path) -> Checkpoint:
    """A checkpoint to damage."""
    return Checkpoint.read(shutil.copytree(preset_folder("random-mid", cache), tmp_path / "copied"))


def edit_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def shard_with(folder: Path, key: str) -> Path:
    index = folder / INDEX
    return folder / json.loads(index.read_text())["weight_map"][key] if index.exists() else next(folder.glob("*.safe*"))


def edit_shard(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


# Which checkpoint --model means


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_by_name(name, cache):
    checkpoint = resolve(name, cache)
    assert checkpoint.folder == preset_folder(name, cache)
    assert checkpoint.random_weights == name.startswith("random-")


def test_a_folder(checkpoint):
    assert resolve(str(checkpoint.folder)) == checkpoint


def test_a_folder_is_found_without_heavy_imports(checkpoint):
    code = (
        "import sys; from helios_cp.weights.load import resolve; resolve(sys.argv[1]);"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code, checkpoint.folder], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def refused(model: str, cache: Path | None = None) -> str:
    with pytest.raises(RequestError) as caught:
        resolve(model, cache)
    message = str(caught.value)
    assert "\n" not in message
    assert model in message
    return message


@pytest.mark.parametrize("model", ["/no/such/folder", "tiny-bas", "~nobody/x", "a/b/c", "a/b@", "x" * 5000, "\0"])
def test_neither_preset_nor_folder_nor_hub_id(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(model)
    assert all(name in message for name in PRESETS)


def test_a_file_is_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("")
    assert "no such folder" in refused("owner/name")


def test_an_unwritable_cache_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    assert "HELIOS_CP_CACHE" in refused("random-base", tmp_path / "file")


@pytest.fixture
def progress_bars():
    """Shown, whatever tests before have left."""
    logging = transformers.utils.logging
    were_shown = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    yield logging
    if not were_shown:
        logging.disable_progress_bar()


def test_a_preset_is_written_without_a_word(progress_bars, tmp_path, capfd):
    """The first time it is used, so that an error that follows is one line; bars are shown again afterwards."""
    preset_folder("random-distilled", tmp_path)
    assert capfd.readouterr() == ("", "")
    assert progress_bars.is_progress_bar_enabled()


VARIANTS = {
    "a variant": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model.fp16.safetensors"),
        ["text_encoder/model.safetensors is missing; model.fp16.safetensors has another name", "rename it"],
    ),
    "shards without their index": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors"),
        ["model-00001-of-00001.safetensors is a shard", "model.safetensors.index.json", "download that"],
    ),
    "a file of another program": (
        lambda folder: (folder / "model.safetensors").rename(folder / "umt5_xxl.safetensors"),
        ["umt5_xxl.safetensors has another name"],
    ),
    "a shard that is missing": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
        ["text_encoder/b.safetensors: this shard is missing, model.safetensors.index.json names it", "download it"],
    ),
    "nothing": (lambda folder: (folder / "model.safetensors").unlink(), ["model.safetensors is missing; download it"]),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_weights_under_another_name_are_named_before_anything_loads(case, copied):
    damage, said = VARIANTS[case]
    damage(copied.folder / "text_encoder")
    message = refused(str(copied.folder))
    assert all(words in message for words in said), message


# The transformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformer_holds_the_checkpoint_bit_by_bit(checkpoint, dtype):
    model = load_transformer(checkpoint, dtype)
    expected = HeliosTransformer3DModel.from_pretrained(checkpoint.folder / "transformer").state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        kept = HeliosTransformer.keeps_fp32(name)
        assert torch.equal(found[name], tensor if kept else tensor.to(dtype)), name
        assert found[name].dtype == (torch.float32 if kept else dtype), name


def test_transformer_is_ready_for_inference(checkpoint):
    model = load_transformer(checkpoint, torch.float32, "cpu")
    assert not model.training
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.requires_grad or tensor.is_meta for tensor in tensors)


def test_transformer_in_a_single_file(checkpoint, copied):
    folder = copied.folder / "transformer"
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    for file in folder.glob("*model*"):
        file.unlink()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    found, expected = (load_transformer(c, torch.float32).state_dict() for c in (copied, checkpoint))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_key_that_diffusers_ignores_is_ignored(copied):
    file = shard_with(copied.folder / "transformer", "proj_out.bias")
    edit_shard(file, lambda tensors: tensors.update({"blocks.0.attn2.norm_added_q.weight": torch.ones(96)}))
    load_transformer(copied, torch.float32)


def drop(tensors):
    del tensors["proj_out.bias"]


def drop_from_index(folder: Path) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    file = folder / weight_map.pop("proj_out.bias")
    edit_shard(file, drop)
    edit_json(folder / INDEX, weight_map=weight_map)


def damage(change):
    return lambda folder: edit_shard(shard_with(folder, "proj_out.bias"), change)


def duplicate(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        edit_shard(file, lambda tensors: tensors.update({"proj_out.bias": torch.zeros(64)}))


def cut(folder: Path) -> None:
    file = shard_with(folder, "proj_out.bias")
    file.write_bytes(file.read_bytes()[:-1])


def pickles_only(folder: Path) -> None:
    for file in folder.glob("*model*"):
        file.unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"never read")


BAD_TRANSFORMERS = {
    "key missing from its shard": (damage(drop), ["proj_out.bias", "00", ".safetensors"]),
    "key missing altogether": (drop_from_index, ["proj_out.bias", "missing"]),
    "key without a place": (
        damage(lambda tensors: tensors.update({"blocks.7.lora": torch.ones(1)})),
        ["blocks.7.lora", ".safetensors"],
    ),
    "wrong shape": (
        damage(lambda tensors: tensors.update({"proj_out.bias": torch.ones(63)})),
        ["proj_out.bias", ".safetensors", "(63,)", "(64,)"],
    ),
    "key in two shards": (duplicate, ["proj_out.bias", ".safetensors"]),
    "shard missing": (lambda folder: shard_with(folder, "proj_out.bias").unlink(), [".safetensors", "missing", INDEX]),
    "shard cut off": (cut, [".safetensors", "no intact"]),
    "shard of garbage": (
        lambda folder: shard_with(folder, "proj_out.bias").write_bytes(b"<html>503</html>" * 9),
        [".safetensors", "no intact"],
    ),
    "index damaged": (lambda folder: (folder / INDEX).write_text("{"), [INDEX]),
    "index empty": (lambda folder: (folder / INDEX).write_text("{}"), [INDEX, "weight_map"]),
    "pickles only": (pickles_only, ["diffusion_pytorch_model.bin", "pickle", "never read"]),
}


@pytest.mark.parametrize("case", BAD_TRANSFORMERS)
def test_a_damaged_transformer_is_refused(copied, case):
    spoil, named = BAD_TRANSFORMERS[case]
    load_transformer(copied, torch.float32)
    spoil(copied.folder / "transformer")
    with pytest.raises(CheckpointError) as caught:
        load_transformer(copied, torch.float32)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in named), message


def test_a_misfit_is_found_before_memory_is_taken(copied, monkeypatch):
    BAD_TRANSFORMERS["wrong shape"][0](copied.folder / "transformer")
    monkeypatch.setattr("helios_cp.weights.transformer.allocate", lambda *_, **__: pytest.fail("allocated"))
    with pytest.raises(CheckpointError):
        load_transformer(copied, torch.float32)


BIG = {"num_attention_heads": 4, "attention_head_dim": 128, "ffn_dim": 2048, "text_dim": 64, "num_layers": 11}


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Checkpoint:
    """A checkpoint of 200 MB."""
    folder = tmp_path_factory.mktemp("big")
    with torch.device("meta"):
        model = HeliosTransformer3DModel(**BIG)
    model.to_empty(device="cpu").save_pretrained(folder / "transformer", max_shard_size="8MB")
    assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) > 190e6
    return Checkpoint(folder, "base", False, TransformerConfig.from_dict(BIG))


class Reads:
    """Tensors as they are read, in memory of their own, so that they count; and the most bytes of files at a time."""

    def __init__(self, folder: Path, keeps_open: bool = False) -> None:
        self.folder = folder
        self.keeps_open = keeps_open
        self.kept = []
        self.count = 0
        self.most_mapped = 0

    def __call__(self, shard, name: str, part: tuple[slice, ...] = ()) -> torch.Tensor:
        self.count += 1
        if self.count % 16 == 0:  # the system takes its time to count
            self.most_mapped = max(self.most_mapped, mapped_bytes(self.folder))
        self.kept += [shard] * self.keeps_open
        return mapped(shard, name, part).clone()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loading_takes_one_tensor_and_one_file_beyond_the_weights(big, dtype, monkeypatch):
    reads = Reads(big.folder)
    monkeypatch.setattr("helios_cp.weights.transformer.read", reads)
    with OwnMemory() as memory:
        model = load_transformer(big, dtype)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    largest = 4 * max(parameter.numel() for parameter in model.parameters())  # as it is stored
    assert weights == memory.live_bytes < memory.peak_bytes <= weights + largest
    largest_file = max(file.stat().st_size for file in big.folder.rglob("*.safetensors"))
    assert 1e6 < reads.most_mapped <= largest_file + mmap.PAGESIZE  # whole pages are counted


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_the_measurement_notices_a_second_copy_and_open_files(big, monkeypatch):
    reads = Reads(big.folder, keeps_open=True)
    monkeypatch.setattr("helios_cp.weights.transformer.read", reads)
    with OwnMemory() as memory:
        files = sorted((big.folder / "transformer").glob("*.safetensors"))
        whole = {name: tensor.clone() for file in files for name, tensor in load_file(file).items()}
        model = load_transformer(big, torch.float32)
    assert memory.peak_bytes > sum(parameter.nbytes for parameter in model.parameters()) + 190e6 and whole
    assert reads.most_mapped > 100e6


# The other parts


def test_vae_holds_the_checkpoint_bit_by_bit(checkpoint):
    vae = load_vae(checkpoint)
    expected = AutoencoderKLWan.from_pretrained(checkpoint.folder / "vae").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in vae.state_dict().items())
    assert vae.dtype == torch.float32
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert load_vae(checkpoint, "cpu", torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"scale_factor_spatial": 16}, "scale_factor_spatial is 16"),
        ({"scale_factor_temporal": 8}, "scale_factor_temporal is 8"),
        ({"latents_mean": [0.0] * 15}, "latents_mean is 15"),
        ({"latents_std": [1.0] * 17}, "latents_std is 17"),
        ({"temperal_downsample": [False, False, True]}, "vae"),
        ({"z_dim": 8, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8}, "vae"),
        ({"num_res_blocks": 1}, "vae"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_vae_whose_config_is_off_is_refused(copied, values, named):
    edit_json(copied.folder / "vae" / "config.json", **values)
    with pytest.raises(CheckpointError, match=named):
        load_vae(copied)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"z_dim": 8, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8}, "z_dim is 8"),
        ({"dim_mult": [1, 1, 1], "temperal_downsample": [True, True], "scale_factor_spatial": 4}, "spatial is 4"),
        ({"temperal_downsample": [False, False, True], "scale_factor_temporal": 2}, "temporal is 2"),
    ],
)
def test_a_vae_that_does_not_suit_helios_is_refused(copied, options, named):
    small = {"z_dim": 16, "base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 0}
    shutil.rmtree(copied.folder / "vae")
    AutoencoderKLWan(**small | options).save_pretrained(copied.folder / "vae")
    with pytest.raises(CheckpointError, match=named):
        load_vae(copied)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
@pytest.mark.parametrize("case", ["missing", "unexpected", "shape", "cut", "pickle"])
def test_other_damaged_weights_are_refused(copied, part, case):
    load = {"vae": load_vae, "text_encoder": load_text_encoder}[part]
    file = next((copied.folder / part).glob("*.safetensors"))
    key = sorted(load_file(file))[0]
    if case == "missing":
        edit_shard(file, lambda tensors: tensors.pop(key))
    elif case == "unexpected":
        key = "stranger.weight"
        edit_shard(file, lambda tensors: tensors.update({key: torch.ones(2)}))
    elif case == "shape":
        edit_shard(file, lambda tensors: tensors.update({key: torch.ones(5)}))
    elif case == "cut":
        key = file.name
        file.write_bytes(file.read_bytes()[:-1])
    else:
        key = "pickle"
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(CheckpointError) as caught:
        load(copied)
    assert key in str(caught.value)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_encoder_holds_the_checkpoint_bit_by_bit(checkpoint, dtype):
    tokenizer, text_encoder = load_text_encoder(checkpoint, "cpu", dtype)
    expected = load_file(checkpoint.folder / "text_encoder" / "model.safetensors")
    found = text_encoder.state_dict()
    assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in expected.items())
    assert torch.equal(text_encoder.encoder.embed_tokens.weight, expected["shared.weight"].to(dtype))
    assert not text_encoder.training
    assert tokenizer("ab").input_ids == [100, 101, 1]


def test_token_embeddings_may_go_by_either_name(copied, checkpoint):
    file = copied.folder / "text_encoder" / "model.safetensors"
    edit_shard(file, lambda tensors: tensors.update({"encoder.embed_tokens.weight": tensors.pop("shared.weight")}))
    found, expected = (load_text_encoder(c)[1].encoder.embed_tokens.weight for c in (copied, checkpoint))
    assert torch.equal(found, expected)


def lose_embeddings(model: UMT5EncoderModel) -> None:
    model.encoder.embed_tokens.weight = torch.nn.Parameter(torch.zeros(384, 32))


def untie_embeddings(model: UMT5EncoderModel) -> None:
    model.encoder.embed_tokens.weight = torch.nn.Parameter(torch.ones(384, 32))


@pytest.mark.parametrize(("spoil", "named"), [(lose_embeddings, "all zeros"), (untie_embeddings, "differs")])
def test_a_library_that_loses_the_token_embeddings_is_noticed(checkpoint, monkeypatch, spoil, named):
    intact = UMT5EncoderModel.from_pretrained.__func__

    def from_pretrained(cls, *arguments, **options):
        model, report = intact(cls, *arguments, **options)
        spoil(model)
        return model, report

    monkeypatch.setattr(UMT5EncoderModel, "from_pretrained", classmethod(from_pretrained))
    with pytest.raises(CheckpointError, match=named):
        load_text_encoder(checkpoint)


def test_a_text_encoder_of_another_width_is_refused(copied):
    edit_json(copied.folder / "transformer" / "config.json", text_dim=64)
    with pytest.raises(CheckpointError, match="d_model is 32; it must be 64"):
        load_text_encoder(Checkpoint.read(copied.folder))


def test_a_missing_tokenizer_is_refused(copied):
    for file in (copied.folder / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_text_encoder(copied)


@pytest.mark.parametrize("name", PRESETS)
def test_scheduler_by_its_class_name(name, cache):
    scheduler = load_scheduler(resolve(name, cache))
    assert type(scheduler).__name__ == PRESETS[name].scheduler
    assert {key: scheduler.config[key] for key in PRESETS[name].scheduler_config} == PRESETS[name].scheduler_config


def test_another_scheduler_is_refused(copied):
    edit_json(copied.folder / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler")
    with pytest.raises(CheckpointError, match="'DDIMScheduler'; allowed are HeliosScheduler, HeliosDMDScheduler"):
        load_scheduler(copied)


def test_loading_never_touches_the_network(cache, monkeypatch):
    def connect(*_, **__):
        pytest.fail("the network was asked")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    with pytest.raises(pytest.fail.Exception):
        socket.create_connection(("hub.invalid", 443))
    checkpoint = resolve("random-base", cache)
    load_transformer(checkpoint, torch.float32)
    load_vae(checkpoint)
    load_text_encoder(checkpoint)
    load_scheduler(checkpoint)


def test_a_config_for_another_model_is_refused(copied):
    config = json.loads((copied.folder / "transformer" / "config.json").read_text())
    other = TransformerConfig.from_dict(config | {"num_layers": 2})
    spoiled = Checkpoint(copied.folder, "mid", True, other)
    with pytest.raises(CheckpointError, match=r"blocks\.2\."):
        load_transformer(spoiled, torch.float32)
