"""Unit and multi-rank gloo: compiled blocks and decoder against eager ones; graphs, breaks and recompilations counted.

Where the generator of code does not matter the backend is `aot_eager`: what Dynamo captured, functionalised and run by
PyTorch. `fullgraph=True` makes any graph break an error. Inductor itself is tried on one small video.

Tolerances, of the range: a forward 1e-5, a whole video 1e-4, frames one grey level, as for ranks in
`tests/test_parallelize.py`. Compiled code adds up norms in another order and multiplies real pairs in place of complex
numbers, units in the last place of fp32; a wrong token or row differs by more than 1e-2.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from benchmarks.ranks.pool import shared_pool
from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Execution
from helios_cp.config.refusals import Setting, check_setting
from helios_cp.config.request import Request
from helios_cp.generate.__main__ import main
from helios_cp.model import layers
from helios_cp.pipeline.environment import prepare
from helios_cp.pipeline.pipeline import Pipeline
from helios_cp.runtime import compilation
from helios_cp.runtime.compilation import compile_blocks, compile_parts, compile_vae
from helios_cp.weights.load import load_vae
from parallel.mesh import Degrees
from tests.loading import load_transformer
from tests.runtime.compiled_ranks import SIZES, compare, forwards

STEPS = {
    "random-base": {"num_inference_steps": 2, "guidance_scale": 3.0},
    "random-distilled": {"pyramid_num_inference_steps_list": (1, 1, 1)},
}
VAE_GRAPHS = 2  # for each number of channels, of which a tiny VAE has two
MOST_VAE_GRAPHS = 3  # with one more where two sizes happen to be equal the first time
LAYOUTS = [(Degrees(ring=2), False), (Degrees(ulysses=3, ffn_tp=3), False), (Degrees(ulysses=2), True)]


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def request_for(preset: str, **fields) -> Request:
    return Request(prompt=("a fox",), height=64, width=64, num_frames=66, **{**STEPS[preset], **fields})


def error(result: Tensor, reference: Tensor) -> float:
    return ((result - reference).abs().max() / (reference.max() - reference.min())).item()


class Recorded(CompileCounterWithBackend):
    """Runs graphs as `aot_eager` does; counts them, and keeps the names of their operations."""

    def __init__(self) -> None:
        super().__init__("aot_eager")
        self.operations: set[str] = set()

    def __call__(self, graph, inputs):
        self.operations |= {getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes}
        return super().__call__(graph, inputs)

    @property
    def waits(self) -> set[str]:
        """Operations that have the host wait for the device."""
        return self.operations & {"item", "tolist", "nonzero", "cpu", "numpy", "_local_scalar_dense", "masked_select"}


@pytest.mark.parametrize("preset", STEPS)
def test_whole_video(presets, preset):
    """Two chunks: as eager, with the graphs of each stage and of the decoder, and none anew in the second chunk."""
    pipeline = Pipeline.from_pretrained(Checkpoint.read(presets[preset]), dtype=torch.float32)
    eager = list(pipeline.stream(request_for(preset)))
    recorded = Recorded()
    compile_parts(pipeline.transformer, pipeline.codec.vae, backend=recorded)
    stages, graphs = 1 if preset == "random-base" else 3, []
    for index, (mine, theirs) in enumerate(zip(pipeline.stream(request_for(preset)), eager, strict=True)):
        assert error(mine.latents, theirs.latents) <= 1e-4
        assert (mine.frames.int() - theirs.frames.int()).abs().max() <= 1
        graphs.append(recorded.frame_count)
        assert 2 * stages + VAE_GRAPHS <= graphs[index] <= 2 * stages + MOST_VAE_GRAPHS
        assert graphs[index] == graphs[0]
    assert not counters["graph_break"]
    assert "scaled_dot_product_attention" in recorded.operations and not recorded.waits


def test_blocks_share_graphs_and_sizes_do_not(presets):
    """Three blocks make two graphs a size; a size that comes again makes none."""
    transformer = load_transformer(Checkpoint.read(presets["random-mid"]), torch.float32)
    counter = CompileCounterWithBackend("eager")
    compile_blocks(transformer.blocks, counter)
    for _ in range(2):
        forwards(transformer)
        assert len(transformer.blocks) == 3 and counter.frame_count == 2 * len(SIZES)


def test_more_sizes_than_there_is_room_for(presets, monkeypatch, caplog):
    """Graphs are dropped at the limit, which is told, and sizes go on; one that comes again is compiled again."""
    monkeypatch.setattr(compilation, "MOST_COMPILED", 3)
    transformer = load_transformer(Checkpoint.read(presets["random-mid"]), torch.float32)
    sizes = ((2, 2), (2, 4), (4, 4), (2, 2))
    eager = forwards(transformer, sizes)
    counter = CompileCounterWithBackend("eager")
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        caplog.at_level("WARNING", logger="helios_cp.runtime.compilation"),
    ):
        compile_blocks(transformer.blocks, counter)
        assert max(map(error, forwards(transformer, sizes), eager)) <= 1e-5
    assert counter.frame_count == 2 * len(sizes)
    told = [record.getMessage() for record in caplog.records if record.name == "helios_cp.runtime.compilation"]
    assert told == ["3 graphs are compiled; all are dropped, to compile anew what is asked for"] * 2


def test_a_graph_of_another_size_shows(presets, monkeypatch):
    """Where history ends is part of what is compiled: a graph with a stale place gives other results, and is not taken.

    So would results of one size differ if Dynamo took a graph of another for it.
    """
    transformer = load_transformer(Checkpoint.read(presets["random-mid"]), torch.float32)
    eager = forwards(transformer)
    per_token = layers._per_token
    monkeypatch.setattr(
        layers, "_per_token", lambda rows, length, history: per_token(rows, length, max(history - 4, 0))
    )
    compile_blocks(transformer.blocks, "eager")
    assert min(map(error, forwards(transformer), eager)) > 1e-3


@pytest.mark.parametrize("decides", [True, False])
def test_reading_a_value_shows(presets, monkeypatch, decides):
    """A block that decides by a value cannot be one graph, which is an error; one that only reads it waits for it."""
    attend = layers.CrossAttention.forward

    def reads(self, states, keys_values):
        return attend(self, states * float(states.sum()), keys_values)

    def decides_by_it(self, states, keys_values):
        return attend(self, states * 2 if float(states.sum()) > 0 else states, keys_values)

    monkeypatch.setattr(layers.CrossAttention, "forward", decides_by_it if decides else reads)
    transformer = load_transformer(Checkpoint.read(presets["random-mid"]), torch.float32)
    recorded = Recorded()
    compile_blocks(transformer.blocks, recorded)
    try:
        forwards(transformer)
    except Exception as raised:
        assert "torch._dynamo" in type(raised).__module__
    else:
        assert not decides and recorded.waits


@pytest.mark.parametrize(("degrees", "sharded"), LAYOUTS, ids=str)
def test_ranks(presets, degrees, sharded):
    """Collectives inside of the graphs: results, calls and bytes are those of eager code; no graph is made twice."""
    results = shared_pool().run(
        compare, presets["random-mid"], degrees, sharded, "aot_eager", ranks=degrees.world, timeout=600
    )
    for found in results:
        assert max(map(error, found.compiled, found.eager)) <= 1e-5
        assert found.compiled_traffic == found.eager_traffic and (sharded or found.eager_traffic[0] > 0)
        assert found.graphs == found.graphs_after == 2 * len(SIZES)


START = """
import dataclasses, sys, torch
from pathlib import Path
from torch._dynamo.utils import counters
from helios_cp.config.checkpoint import Checkpoint
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.runtime.compilation import compile_blocks, keep_in
from tests.runtime.compiled_ranks import SIZES, forwards
torch.set_num_threads(1)
torch.manual_seed(0)
checkpoint = Checkpoint.read(Path(sys.argv[1]))
transformer = HeliosTransformer(dataclasses.replace(checkpoint.transformer, num_layers=1))
with torch.no_grad():
    (eager,) = forwards(transformer, SIZES[:1])
    keep_in(sys.argv[2])
    compile_blocks(transformer.blocks)
    (compiled,) = forwards(transformer, SIZES[:1])
error = (compiled - eager).abs().max() / (eager.max() - eager.min())
print(float(error), counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


def test_inductor_and_its_cache(presets, tmp_path):
    """Inductor's own code for a block; a second process generates none of it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR")}
    for is_first in (True, False):
        command = [sys.executable, "-c", START, str(presets["random-mid"]), str(tmp_path / "compiled")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        largest, hits, misses = map(float, done.stdout.split())
        assert largest <= 1e-5
        assert (hits == 0 and misses >= 1) if is_first else (hits >= 1 and misses == 0)


def test_the_folder_of_compiled_code_is_set_by_who_starts_the_process(presets, tmp_path, monkeypatch):
    """Loading a pipeline leaves the environment alone, and says when compiled code would go elsewhere."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "other"))
    execution = Execution(compile=True, compile_cache=str(tmp_path / "compiled"))
    checkpoint = Checkpoint.read(presets["random-mid"])
    with pytest.warns(UserWarning, match="other and not to .*compiled: call helios_cp.pipeline.environment.prepare"):
        Pipeline.from_pretrained(checkpoint, dtype=torch.float32, execution=execution)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "other")
    environment = {}
    prepare(execution, 1, environment)
    assert environment == {"TORCHINDUCTOR_CACHE_DIR": execution.compile_cache}
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", execution.compile_cache)
    pipeline = Pipeline.from_pretrained(checkpoint, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_parts(pipeline.transformer, pipeline.codec.vae, execution.compile_cache, "eager")


def test_the_command_line_sets_it(cache, tmp_path, monkeypatch):
    """Before anything is loaded; nothing is computed here."""
    monkeypatch.setenv("HELIOS_CP_CACHE", str(cache))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "other"))
    monkeypatch.setattr("helios_cp.generate.run.run", lambda session, world: 0)
    folder = str(tmp_path / "compiled")
    size = ["--prompt", "fox", "--height", "64", "--width", "64", "--num-frames", "33"]
    assert main([*size, "--output", str(tmp_path / "a.mp4"), "--compile", "--compile-cache", folder]) == 0
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == folder


def test_refused():
    with pytest.raises(RequestError, match="--compile-cache cache: only allowed beside --compile"):
        check_setting(Setting(Execution(compile_cache="cache")))


def test_one_graph_of_the_vae_serves_all_sizes_and_groups(presets):
    """Of norm and SiLU together; the same when it encodes."""
    vae = load_vae(Checkpoint.read(presets["random-mid"]))
    counter = CompileCounterWithBackend("inductor")
    compile_vae(vae, counter)
    with torch.no_grad():
        for frames, rows, group in ((3, 4, None), (9, 6, 3)):
            latents = torch.randn(1, 16, frames, rows, 5)
            eager = load_vae(Checkpoint.read(presets["random-mid"])).decode(latents, group)
            assert error(vae.decode(latents, group), eager) <= 1e-5
        vae.encode(torch.rand(1, 3, 9, 32, 40))
    assert counter.frame_count <= MOST_VAE_GRAPHS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("preset", STEPS)
def test_on_a_card(presets, preset):
    """In fp32 without TF32: latents of two chunks, and frames within one grey level."""
    checkpoint = Checkpoint.read(presets[preset])
    options = {"dtype": torch.float32, "device": "cuda"}
    eager, compiled = (
        Pipeline.from_pretrained(checkpoint, **options, execution=Execution(compile=compiled, tf32=False))
        for compiled in (False, True)
    )
    videos = (pipeline.stream(request_for(preset)) for pipeline in (compiled, eager))
    for mine, theirs in zip(*videos, strict=True):
        assert error(mine.latents, theirs.latents) <= 1e-4
        assert (mine.frames.int() - theirs.frames.int()).abs().max() <= 1
