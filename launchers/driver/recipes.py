"""Which workers a pipeline has, and what each asks of the cluster."""

from __future__ import annotations

from dataclasses import dataclass

from helios_cp.device.device import dtype_name
from launchers.cluster.cluster import Needs
from launchers.cluster.worker import Recipe
from launchers.schedule.terms import Stage, check_offload, check_spread, check_workers
from launchers.workers.decoder import VaeDecoder
from launchers.workers.denoiser import DenoiserRank
from launchers.workers.loading import Loading
from launchers.workers.text_encoder import TextEncoder
from launchers.workers.writer import VideoWriter

DECODER_CAPACITY = {Stage.DECODE: 1, Stage.START: 1}
WRITER_CAPACITY = 4


@dataclass(frozen=True)
class Resources:
    """GPUs of each rank, each decoder and the text encoder; a CPU each beside them."""

    rank_gpus: float = 0.0
    decoder_gpus: float = 0.0
    text_gpus: float = 0.0

    @classmethod
    def of(cls, device: str) -> Resources:
        """A card for each rank; the text encoder shares one with a decoder."""
        return cls(1.0, 0.5, 0.5) if device == "cuda" else cls()


def text_gpus(shard_weights: bool, offload: str, resources: Resources) -> float:
    """GPUs of the text encoder. Beside sharded weights it is on the CPU, as in `pipeline.parallelize.load_parallel`,
    where the same prompt gives the same bits; beside offloaded ones too, as no card there has room to keep it."""
    return 0.0 if shard_weights or offload != "none" else resources.text_gpus


def recipes(
    loading: Loading, groups: int, decoders: int, resources: Resources, spread: bool, driver_node: str
) -> list[Recipe]:
    """Text encoder, denoiser groups, decoders and writer. Raises `RequestError` for what no pipeline can have."""
    check_workers(groups, decoders, loading.layout.degrees.vae)
    check_spread(spread, loading.layout.degrees.ring)
    check_offload(loading.execution.offload, decoders)
    gpus = text_gpus(loading.layout.shard_weights, loading.execution.offload, resources)
    device, dtype = loading.device if gpus else "cpu", dtype_name(loading.torch_dtype())
    text = Recipe(
        "text",
        ((TextEncoder, (loading.model, device, dtype, loading.cache), 0),),
        Needs((bundle(1, gpus),)),
        {Stage.TEXT: 1},
    )
    found = [text]
    found += [_group(f"group-{index}", loading, decoders == 0, resources, spread) for index in range(groups)]
    for index in range(decoders):
        needs = Needs((bundle(1, resources.decoder_gpus),))
        found.append(Recipe(f"decoder-{index}", ((VaeDecoder, (loading,), 0),), needs, DECODER_CAPACITY))
    writer = Recipe(
        "writer", ((VideoWriter, (), 0),), Needs((bundle(0, 0),)), {Stage.WRITE: WRITER_CAPACITY}, node=driver_node
    )
    return [*found, writer]


def _group(name: str, loading: Loading, decodes: bool, resources: Resources, spread: bool) -> Recipe:
    degrees = loading.layout.degrees
    ring = degrees.ring if spread else 1
    per_bundle = degrees.world // ring
    whole = bundle(per_bundle, per_bundle * resources.rank_gpus)
    places = [rank // degrees.ulysses % degrees.ring if spread else 0 for rank in range(degrees.world)]
    return Recipe(
        name,
        tuple((DenoiserRank, (loading, rank, decodes), place) for rank, place in enumerate(places)),
        Needs((whole,) * ring, "STRICT_SPREAD" if ring > 1 else "STRICT_PACK"),
        {Stage.DENOISE: 1, **(DECODER_CAPACITY if decodes else {})},
        threads={"decode": 1} if decodes else {},
    )


def bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
