"""Unit, and multi-rank gloo: adapters merged while loading and exchanged later, against diffusers and PEFT.

A forward is compared in fp32 to 1e-5 of its range: PEFT adds `B (A x)` to what the layer makes, we multiply by
`W + B A`, the same sum in another order. What is missing or scaled wrongly shows by more than 1e-2. Exchanged weights
are compared bitwise: they are computed anew from the files, in the same way as while loading.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from diffusers import HeliosPipeline, HeliosTransformer3DModel
from safetensors.torch import load_file

from benchmarks.models.models import Inputs, encode_history, run_ours, run_theirs
from benchmarks.ranks.pool import shared_pool
from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Adapter, Execution
from helios_cp.config.request import Request
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.pipeline.pipeline import Pipeline
from helios_cp.weights.lora import merged, read_updates, shapes_of
from helios_cp.weights.transformer import AdapterState
from parallel.mesh import Degrees, Mesh
from tests.loading import load_transformer

if TYPE_CHECKING:
    from peft import LoraConfig

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LAYERS = [*ATTENTION, "ffn.net.0.proj", "ffn.net.2"]
REQUEST = Request(prompt=("a fox",), height=64, width=64, num_frames=33, pyramid_num_inference_steps_list=(1, 1, 1))


@pytest.fixture(scope="module")
def checkpoint(presets) -> Checkpoint:
    return Checkpoint.read(presets["random-distilled"])


def theirs_with(checkpoint: Checkpoint, configs: dict[str, LoraConfig]) -> HeliosTransformer3DModel:
    """diffusers' transformer with adapters of random weights."""
    model = HeliosTransformer3DModel.from_pretrained(checkpoint.folder / "transformer").eval()
    for name, config in configs.items():
        model.add_adapter(config, adapter_name=name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def pair(checkpoint, tmp_path_factory) -> tuple[HeliosTransformer3DModel, tuple[Adapter, Adapter]]:
    """Two adapters of different layers, ranks and alphas, in diffusers' model and in files written by diffusers."""
    peft = pytest.importorskip("peft")
    configs = {
        "style": peft.LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS, init_lora_weights=False),
        "motion": peft.LoraConfig(
            r=2,
            lora_alpha=1,
            rank_pattern={"blocks.1.attn1.to_q": 5},
            alpha_pattern={"blocks.1.attn1.to_q": 15},
            target_modules=["to_q", "proj_out", "time_proj", "condition_embedder.text_embedder.linear_2"],
            lora_bias=True,
            init_lora_weights=False,
        ),
    }
    model = theirs_with(checkpoint, configs)
    folder = tmp_path_factory.mktemp("adapters")
    model.save_lora_adapter(folder / "style", adapter_name="style")
    HeliosPipeline.save_lora_weights(
        folder / "motion",
        peft.get_peft_model_state_dict(model, adapter_name="motion"),
        transformer_lora_adapter_metadata=json.loads(json.dumps(configs["motion"].to_dict(), default=sorted)),
    )
    return model, (Adapter(str(folder / "style"), 0.7), Adapter(str(folder / "motion"), -1.3))


def adapted(
    checkpoint: Checkpoint, adapters, dtype: torch.dtype = torch.float32, quantize: str | None = None
) -> HeliosTransformer:
    return load_transformer(checkpoint, dtype, execution=Execution(quantize=quantize, lora=tuple(adapters)))


def forward(model: HeliosTransformer, inputs: Inputs) -> torch.Tensor:
    return run_ours(model, inputs, model.encode_text(inputs.text), encode_history(model, inputs))


def inputs_for(checkpoint: Checkpoint) -> Inputs:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Inputs.random(checkpoint.transformer, (128, 128), 3, torch.device("cpu"), torch.float32)


def error(mine: torch.Tensor, other: torch.Tensor) -> float:
    return ((mine - other).abs().max() / (other.max() - other.min())).item()


def bits(model: HeliosTransformer) -> dict[str, torch.Tensor]:
    """A copy of every parameter, quantised ones as their components."""
    found = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "qdata"):
            found |= {f"{name}.qdata": parameter.qdata.clone(), f"{name}.scale": parameter.scale.clone()}
        else:
            found[name] = parameter.detach().clone()
    return found


def same_bits(model: HeliosTransformer, expected: dict[str, torch.Tensor]) -> bool:
    found = bits(model)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# The same as diffusers and PEFT


def test_merged_while_loading_as_diffusers(checkpoint, pair):
    """Two adapters with weights, from both kinds of file that diffusers writes; biases, patterns and all."""
    theirs, adapters = pair
    theirs.set_adapters(["style", "motion"], [adapter.weight for adapter in adapters])
    inputs = inputs_for(checkpoint)
    expected = run_theirs(theirs, inputs)
    assert error(forward(adapted(checkpoint, adapters), inputs), expected) <= 1e-5
    for wrong in ((), adapters[:1], adapters[1:], (Adapter(adapters[0].path), adapters[1])):
        assert error(forward(adapted(checkpoint, wrong), inputs), expected) > 1e-2


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_folder_of_peft(checkpoint, tmp_path, use_rslora):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=LAYERS, use_rslora=use_rslora, alpha_pattern={r"attn2\.to_k": 3}
    )
    theirs = peft.get_peft_model(HeliosTransformer3DModel.from_pretrained(checkpoint.folder / "transformer"), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    assert next(iter(load_file(tmp_path / "adapter_model.safetensors"))).startswith("base_model.model.")
    inputs = inputs_for(checkpoint)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        ours = adapted(checkpoint, [Adapter(str(path))])
        assert error(forward(ours, inputs), run_theirs(theirs, inputs)) <= 1e-5


OTHER_KINDS = {
    "DoRA": lambda peft: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=[*LAYERS, "patch_short"]),
    "LoHa": lambda peft: peft.LoHaConfig(r=4, alpha=6, target_modules=LAYERS),
    "LoKr": lambda peft: peft.LoKrConfig(r=4, alpha=2, rank_pattern={"to_q": 3}, target_modules=LAYERS),
    "LoKr, small factors": lambda peft: peft.LoKrConfig(r=2, alpha=1, decompose_both=True, target_modules=LAYERS),
    "LoKr, whole factors": lambda peft: peft.LoKrConfig(r=64, alpha=16, decompose_factor=8, target_modules=LAYERS),
}
STRENGTH = 0.7


@pytest.fixture(scope="module")
@torch.no_grad()
def kinds(checkpoint, tmp_path_factory) -> dict[str, tuple[torch.nn.Module, Adapter]]:
    """Adapters that are no plain LoRA: in PEFT's model over that of diffusers, and in a folder that PEFT wrote."""
    peft = pytest.importorskip("peft")
    generator, found = torch.Generator().manual_seed(2), {}
    for kind, config in OTHER_KINDS.items():
        model = HeliosTransformer3DModel.from_pretrained(checkpoint.folder / "transformer")
        theirs = peft.get_peft_model(model, config(peft)).eval()
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif any(word in name for word in ("lora_", "hada_", "lokr_")):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        folder = tmp_path_factory.mktemp("kind")
        theirs.save_pretrained(folder)
        for module in theirs.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(STRENGTH)
        found[kind] = theirs, Adapter(str(folder), STRENGTH)
    return found


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_as_peft(checkpoint, kinds, kind):
    theirs, adapter = kinds[kind]
    inputs = inputs_for(checkpoint)
    expected = run_theirs(theirs, inputs)
    ours, stronger = (adapted(checkpoint, [each]) for each in (adapter, Adapter(adapter.path)))
    assert error(forward(ours, inputs), expected) <= 1e-5
    assert error(forward(stronger, inputs), expected) > 1e-2


def test_several_kinds_as_in_diffusers(checkpoint, tmp_path):
    """A DoRA scales what adapters before it have added, so the order matters."""
    peft = pytest.importorskip("peft")
    configs = {
        "first": peft.LoraConfig(r=4, use_dora=True, target_modules=LAYERS),
        "second": peft.LoraConfig(r=2, target_modules=LAYERS),
        "third": peft.LoraConfig(r=3, use_dora=True, target_modules=ATTENTION),
    }
    strengths = {"first": 0.5, "second": 0.3, "third": 0.8}
    theirs = theirs_with(checkpoint, configs)
    for name in configs:
        theirs.save_lora_adapter(tmp_path / name, adapter_name=name)
    inputs, found = inputs_for(checkpoint), []
    for order in (["first", "second", "third"], ["third", "first", "second"]):
        theirs.set_adapters(order, [strengths[name] for name in order])
        ours = adapted(checkpoint, [Adapter(str(tmp_path / name), strengths[name]) for name in order])
        found.append(run_theirs(theirs, inputs))
        assert error(forward(ours, inputs), found[-1]) <= 1e-5
    assert error(*found) > 1e-2


# Exchanged between requests


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_exchanged_with_the_bits_of_loading(checkpoint, pair, kinds, quantize):
    """From none to one, to two, to other kinds, and back."""
    _, (style, motion) = pair
    dora, loha, lokr = (kinds[kind][1] for kind in ("DoRA", "LoHa", "LoKr"))
    execution = Execution(quantize=quantize)
    dtype = torch.bfloat16  # where taking an update off again would not give back the bits
    sets = [(), (motion,), (style, motion), (dora, motion), (loha, lokr), (), (style,)]
    expected = {adapters: bits(adapted(checkpoint, adapters, dtype, quantize)) for adapters in sets}
    pipeline = Pipeline.from_pretrained(checkpoint, dtype=dtype, execution=execution)
    model = pipeline.transformer
    memory = {name: parameter.data_ptr() for name, parameter in model.named_parameters() if parameter.is_contiguous()}
    assert same_bits(model, expected[()])
    for adapters in sets[1:]:
        pipeline.set_adapters(adapters)
        assert same_bits(model, expected[adapters])
    assert {name: p.data_ptr() for name, p in model.named_parameters() if p.is_contiguous()} == memory
    names = [name for name in expected[()] if not torch.equal(expected[()][name], expected[(style,)][name])]
    assert names and not same_bits(model, expected[()])


def test_untouched_weights_are_not_read(checkpoint, pair, monkeypatch):
    """Only those that the adapters until now or the new ones change; and none if they are there already."""
    _, (style, motion) = pair
    pipeline = Pipeline.from_pretrained(checkpoint, dtype=torch.float32, execution=Execution(lora=(style,)))
    read, fill = [], AdapterState.fill
    monkeypatch.setattr(AdapterState, "fill", lambda self, to, *rest: (read.append(to.name), fill(self, to, *rest)))
    pipeline.set_adapters([motion])
    updates = read_updates([style, motion], shapes_of(pipeline.transformer))
    assert sorted(read) == sorted(updates)
    pipeline.set_adapters([motion])
    assert len(read) == len(updates)


def test_a_pipeline_exchanges_them(checkpoint, pair):
    """Between two requests; a video then is that of a pipeline loaded with them."""
    pipeline = Pipeline.from_pretrained(checkpoint, dtype=torch.float32)
    videos = []
    for adapters in (pair[1], []):
        pipeline.set_adapters(adapters)
        loaded = Pipeline.from_pretrained(checkpoint, dtype=torch.float32, execution=Execution(lora=tuple(adapters)))
        mine, other = (next(iter(each.stream(REQUEST, output_type="latent"))).latents for each in (pipeline, loaded))
        assert torch.equal(mine, other)
        videos.append(mine)
    assert error(*videos) > 1e-2


def test_each_request_has_its_own(checkpoint, pair):
    """Also where two are made in turns, chunk by chunk; one that names none has those of the pipeline."""
    (style, motion), long = pair[1], replace(REQUEST, num_frames=66)
    pipeline = Pipeline.from_pretrained(checkpoint, dtype=torch.float32, execution=Execution(lora=(style,)))
    requests = {(style,): long, (motion,): replace(long, lora=(motion,)), (): replace(long, lora=())}
    streams = {lora: pipeline.stream(request, output_type="latent") for lora, request in requests.items()}
    found = {lora: [] for lora in requests}
    for _ in range(2):
        for lora, stream in streams.items():
            found[lora].append(next(stream).latents)
    for lora, latents in found.items():
        loaded = Pipeline.from_pretrained(checkpoint, dtype=torch.float32, execution=Execution(lora=lora))
        for mine, other in zip(latents, loaded.stream(long, output_type="latent"), strict=True):
            assert torch.equal(mine, other.latents)
    assert error(found[style,][0], found[motion,][0]) > 1e-2


def test_taking_an_update_off_would_change_bits(checkpoint, pair):
    """What the test of exchange would see if weights were not made anew."""
    _, (style, _) = pair
    model = adapted(checkpoint, [style], torch.bfloat16)
    updates = read_updates([style], shapes_of(model))
    plain = load_transformer(checkpoint, torch.bfloat16).state_dict()
    found = model.state_dict()
    for name in updates:
        weight = torch.zeros(found[name].shape)
        found[name].sub_(merged(weight, updates[name]).to(torch.bfloat16))
    assert not all(torch.equal(found[name], plain[name]) for name in plain)


def test_exchanged_when_the_files_are_gone(presets, pair, tmp_path):
    """They stay mapped into memory."""
    folder = shutil.copytree(presets["random-distilled"], tmp_path / "copy")
    pipeline = Pipeline.from_pretrained(str(folder), dtype=torch.float32)
    before = next(iter(pipeline.stream(REQUEST, output_type="latent"))).latents
    shutil.rmtree(folder / "transformer")
    pipeline.set_adapters(pair[1])
    adapted = next(iter(pipeline.stream(REQUEST, output_type="latent"))).latents
    pipeline.set_adapters([])
    assert torch.equal(next(iter(pipeline.stream(REQUEST, output_type="latent"))).latents, before)
    assert error(adapted, before) > 1e-2


def test_exchanged_in_host_memory(checkpoint, pair):
    """Where `--offload` has moved the weights, so that the next time they are brought they are the new ones."""
    expected = Pipeline.from_pretrained(checkpoint, dtype=torch.float32, execution=Execution(lora=pair[1]))
    wanted = next(iter(expected.stream(REQUEST, output_type="latent"))).latents
    execution = Execution(offload="group", lora=pair[1][:1])
    pipeline = Pipeline.from_pretrained(checkpoint, dtype=torch.float32, execution=execution)
    assert not torch.equal(next(iter(pipeline.stream(REQUEST, output_type="latent"))).latents, wanted)
    pipeline.set_adapters(pair[1])
    assert torch.equal(next(iter(pipeline.stream(REQUEST, output_type="latent"))).latents, wanted)


# On several ranks


@torch.no_grad()
def forwards(rank: int, folder: str, degrees: Degrees, sharded: bool, sets, quantize: str | None = None) -> list:
    """A forward after each exchange; the first adapters are merged while loading."""
    from helios_cp.pipeline.parallelize import load_parallel

    checkpoint = Checkpoint.read(Path(folder))
    execution = Execution(lora=sets[0], quantize=quantize)
    mesh = Mesh.build(degrees)
    pipeline = load_parallel(
        checkpoint, mesh, dtype=torch.float32, shard_weights=sharded, denoise_only=True, execution=execution
    )
    inputs, found = inputs_for(checkpoint), []
    for adapters in sets:
        pipeline.set_adapters(adapters)
        found.append(forward(pipeline.transformer, inputs))
    return found


@pytest.mark.parametrize(
    ("degrees", "sharded", "quantize"),
    [
        (Degrees(ulysses=2, ffn_tp=2), False, None),
        (Degrees(ring=3), True, None),
        (Degrees(ulysses=2, ffn_tp=2), False, "int8"),
    ],
    ids=str,
)
def test_every_layout(presets, pair, kinds, degrees, sharded, quantize):
    """Merged into narrowed and sharded weights, and before weights are quantised."""
    folder, (style, motion) = str(presets["random-distilled"]), pair[1]
    dora, loha, lokr = (kinds[kind][1] for kind in ("DoRA", "LoHa", "LoKr"))
    sets = [(style,), (), (motion, style), (dora,), (loha, lokr)]
    alone = forwards(0, folder, Degrees(), False, sets, quantize)
    for found in shared_pool().run(forwards, folder, degrees, sharded, sets, quantize, ranks=degrees.world):
        assert max(error(mine, other) for mine, other in zip(found, alone, strict=True)) <= 1e-5
    assert min(error(alone[index], alone[1]) for index in (0, 2, 3, 4)) > 1e-2


# What an exchange leaves


def test_a_failed_exchange_changes_nothing(checkpoint, pair, tmp_path):
    pipeline = Pipeline.from_pretrained(checkpoint, dtype=torch.float32, execution=Execution(lora=pair[1][:1]))
    before = bits(pipeline.transformer)
    with pytest.raises(RequestError, match="no such file"):
        pipeline.set_adapters([Adapter(str(tmp_path / "missing"))])
    assert same_bits(pipeline.transformer, before)
    pipeline.set_adapters([])
    assert same_bits(pipeline.transformer, bits(load_transformer(checkpoint, torch.float32)))


def test_an_interrupted_exchange_is_made_good(checkpoint, pair, monkeypatch):
    """The next call makes all weights anew that may be half of one and half of the other."""
    pipeline = Pipeline.from_pretrained(checkpoint, dtype=torch.float32)
    count, fill = [0], AdapterState.fill

    def fail(*arguments) -> None:
        count[0] += 1
        if count[0] == 5:
            raise KeyboardInterrupt
        fill(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterState, "fill", fail)
        with pytest.raises(KeyboardInterrupt):
            pipeline.set_adapters(pair[1])
    plain = bits(load_transformer(checkpoint, torch.float32))
    assert not same_bits(pipeline.transformer, plain)
    pipeline.set_adapters([])
    assert same_bits(pipeline.transformer, plain)


def test_a_resumed_run_keeps_its_adapters(tmp_path):
    from helios_cp.generate.check import check_same_run
    from helios_cp.generate.run_folder import Run

    runs = [
        Run(REQUEST, "random-distilled", "float32", (), Execution(lora=lora))
        for lora in ((Adapter("/a.safetensors", 0.5),), (Adapter("/a.safetensors"), Adapter("/b")), ())
    ]
    check_same_run(runs[0], runs[0], tmp_path)
    for other, expected in ((runs[1], "--lora /a.safetensors:1 /b:1"), (runs[2], "no --lora")):
        with pytest.raises(RequestError) as caught:
            check_same_run(runs[0], other, tmp_path)
        assert f"started with --lora /a.safetensors:0.5, not with {expected};" in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_exchanged_on_a_card(checkpoint, pair):
    pytest.importorskip("torchao")
    pipeline = Pipeline.from_pretrained(checkpoint, device="cuda", execution=Execution(quantize="int8"))
    for adapters in (pair[1], (), pair[1][:1]):
        pipeline.set_adapters(adapters)
        loaded = load_transformer(checkpoint, torch.bfloat16, "cuda", Execution(quantize="int8", lora=adapters))
        assert same_bits(pipeline.transformer, bits(loaded))
