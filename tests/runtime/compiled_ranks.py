"""What a rank runs in the tests of compilation: the same forwards eager and compiled, and what was counted of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from helios_cp.model.conditions import History
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.pipeline.parallelize import ShardedSequence, placement_of
from helios_cp.weights.load import resolve
from parallel.collectives import Meter
from parallel.mesh import Degrees, Mesh
from tests.loading import load_transformer

SIZES = ((2, 2), (4, 4))


@dataclass(frozen=True)
class Compared:
    """Outputs by size, eager and compiled; calls and bytes sent of each; and the graphs that were compiled."""

    eager: list[Tensor]
    compiled: list[Tensor]
    eager_traffic: tuple[int, int]
    compiled_traffic: tuple[int, int]
    graphs: int
    graphs_after: int


@torch.no_grad()
def compare(rank: int, folder: str | Path, degrees: Degrees, sharded: bool, backend: str) -> Compared:
    """Forwards of two sizes, eager and then compiled, twice each, in a layout and with weights sharded or whole."""
    from helios_cp.runtime.compilation import compile_blocks

    torch.compiler.reset()
    meter = Meter()
    mesh = Mesh.build(degrees, meter=meter)
    transformer = load_transformer(resolve(str(folder)), torch.float32, placement=placement_of(mesh, sharded))
    transformer.sequence = ShardedSequence(mesh)

    def run() -> tuple[list[Tensor], tuple[int, int]]:
        meter.reset()
        outputs = forwards(transformer)
        return outputs, (meter.total_calls, meter.total_bytes)

    eager, eager_traffic = run()
    counter = CompileCounterWithBackend(backend)
    compile_blocks(transformer.blocks, counter)
    compiled, compiled_traffic = run()
    graphs = counter.frame_count
    run()
    return Compared(eager, compiled, eager_traffic, compiled_traffic, graphs, counter.frame_count)


def forwards(transformer: HeliosTransformer, sizes: Sequence[tuple[int, int]] = SIZES) -> list[Tensor]:
    """One forward at each size, with every history part, and a batch of two whose timesteps differ."""
    generator = torch.Generator().manual_seed(0)
    text = transformer.encode_text(torch.randn(2, 11, 32, generator=generator))
    short, mid, long = (torch.randn(2, 16, frames, 4, 4, generator=generator) for frames in (2, 2, 16))
    history = transformer.encode_history(History(short, (0, 19), mid, (17, 18), long, tuple(range(1, 17))))
    return [
        transformer(
            torch.randn(2, 16, 9, *size, generator=generator),
            torch.tensor([700, 300]),
            text,
            history,
            tuple(range(20, 29)),
        )
        for size in sizes
    ]
