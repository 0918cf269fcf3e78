"""Unit: which flags do not go together, by one table that commands and the Python API read alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helios_cp.config.call import Call
from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Adapter, Execution, Target
from helios_cp.config.layout import Layout
from helios_cp.config.refusals import Setting, check_call, check_setting
from helios_cp.generate.__main__ import main
from helios_cp.pipeline.parallelize import load_parallel
from helios_cp.pipeline.pipeline import Pipeline
from parallel.mesh import Degrees, Mesh

CUDA = Target("cuda", (8, 0))
SHARDED = Layout(Degrees(ulysses=2), shard_weights=True)

REFUSED = {
    "--quantize fp4: allowed are fp8, int8, int4": Setting(Execution(quantize="fp4")),
    "--offload disk: allowed are none, model, group": Setting(Execution(offload="disk")),
    "--vae-dtype int8: allowed are": Setting(Execution(vae_dtype="int8")),
    "--block-cache 0: a finite number above 0": Setting(Execution(block_cache=0.0)),
    "--compile-cache a: only allowed beside --compile": Setting(Execution(compile_cache="a")),
    "--cuda-graphs: not on cpu": Setting(Execution(cuda_graphs=True), target=Target("cpu")),
    "--cuda-graphs with --offload model": Setting(Execution(cuda_graphs=True, offload="model")),
    "--cuda-graphs with --block-cache 0.1": Setting(Execution(cuda_graphs=True, block_cache=0.1)),
    "--cuda-graphs with --backend gloo": Setting(
        Execution(cuda_graphs=True), Layout(Degrees(ring=2)), CUDA, backend="gloo"
    ),
    "--cuda-graphs with --shard-weights": Setting(Execution(cuda_graphs=True), SHARDED, CUDA),
    "--cuda-graphs with --attention xfuser": Setting(Execution(cuda_graphs=True), Layout(attention="xfuser"), CUDA),
    "--shard-weights with --offload group": Setting(Execution(offload="group"), SHARDED),
    "--shard-weights with --quantize int8": Setting(Execution(quantize="int8"), SHARDED),
    "--shard-weights with --ffn-tp 2": Setting(layout=replace(SHARDED, degrees=Degrees(ulysses=2, ffn_tp=2))),
    "--block-cache 0.1: Helios-Distilled": Setting(Execution(block_cache=0.1), is_distilled=True),
    "--lora /none: there is no such file": Setting(Execution(lora=(Adapter("/none"),))),
    "--quantize int8: the weights in model are fp8 already": Setting(
        Execution(quantize="int8"), folder=Path("model"), stored="fp8"
    ),
    "--lora /: the weights in model are fp8 already": Setting(
        Execution(lora=(Adapter("/"),)), folder=Path("model"), stored="fp8"
    ),
    "--shard-weights with --quantize fp8": Setting(layout=SHARDED, stored="fp8"),
    "--quantize fp8: this card has compute capability 8.0": Setting(Execution(quantize="fp8"), target=CUDA),
    "--quantize fp8 with --dtype float16": Setting(
        Execution(quantize="fp8"), target=Target("cuda", (9, 0)), dtype="float16"
    ),
    "--quantize int8 with --dtype float16": Setting(Execution(quantize="int8"), dtype="float16"),
    "--quantize int4: ffn_dim is 40; a multiple of 32": Setting(
        Execution(quantize="int4"), features=(("width", 32), ("ffn_dim", 40))
    ),
    "--attention flash: it is not here": Setting(unavailable={"--attention flash": "it is not here"}),
}


@pytest.mark.parametrize("said", REFUSED)
def test_refused(said):
    with pytest.raises(RequestError) as refused:
        check_setting(REFUSED[said])
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)


def test_what_is_not_known_refuses_nothing():
    check_setting(Setting())
    check_setting(Setting(Execution(cuda_graphs=True, quantize="fp8", compile=True, compile_cache="a")))
    check_setting(Setting(Execution(quantize="fp8"), target=Target("cuda"), dtype="bfloat16", stored="fp8"))
    check_setting(Setting(Execution(quantize="fp8"), target=Target("cpu"), features=(("ffn_dim", 7),)))


FILES = {
    "--resume a and --checkpoint-dir b: give one": Call(resume=Path("a"), checkpoint_dir=Path("b")),
    "--image-folder a: only allowed beside --prompt-file": Call(image_folder=Path("a")),
    "--interpolate-time 3: only allowed beside --prompt-file": Call(interpolate_time=3),
    "--save-latents a: not with --prompt-file": Call(prompt_file=Path("p.txt"), save_latents=Path("a")),
    "--output a.MP4: with --prompt-file this is a folder": Call(prompt_file=Path("p.txt"), output=Path("a.MP4")),
    "--resume /none: there is no such folder": Call(prompt_file=Path("p.txt"), resume=Path("/none")),
}


@pytest.mark.parametrize("said", FILES)
def test_files_that_do_not_go_together(said):
    with pytest.raises(RequestError) as refused:
        check_call(FILES[said])
    assert str(refused.value).startswith(said)


def test_files_that_go_together():
    check_call(Call())
    check_call(Call(prompt_file=Path("p.txt"), output=Path("videos"), image_folder=Path("a"), interpolate_time=3))
    check_call(Call(prompt_file=Path("p.txt"), resume=Path("/")))


@pytest.mark.parametrize(
    ("flags", "execution"),
    [
        ("--cuda-graphs", Execution(cuda_graphs=True)),
        ("--cuda-graphs --offload model", Execution(cuda_graphs=True, offload="model")),
        ("--block-cache 0.1", Execution(block_cache=0.1)),
        ("--block-cache nan", Execution(block_cache=float("nan"))),
        ("--compile-cache /tmp/c", Execution(compile_cache="/tmp/c")),
        ("--lora /none", Execution(lora=(Adapter("/none"),))),
        ("--quantize int8 --dtype float16", Execution(quantize="int8")),
    ],
)
def test_the_command_and_the_python_api_refuse_in_the_same_words(flags, execution, cache, presets, monkeypatch, capsys):
    monkeypatch.setenv("HELIOS_CP_CACHE", str(cache))
    with pytest.raises(SystemExit) as ended:
        main(["--prompt", "fox", "--height", "64", "--width", "64", "--output", "/tmp/none.mp4", *flags.split()])
    assert ended.value.code == 2
    line = capsys.readouterr().err.removeprefix("helios_cp.generate: error: ").removesuffix("\n")
    checkpoint = Checkpoint.read(presets["random-distilled"])
    dtype = torch.float16 if "float16" in flags else torch.float32
    for load in (
        lambda: Pipeline.from_pretrained(checkpoint, dtype=dtype, execution=execution),
        lambda: load_parallel(checkpoint, Mesh.build(Degrees()), dtype=dtype, execution=execution),
    ):
        with pytest.raises(RequestError) as refused:
            load()
        assert str(refused.value) == line
