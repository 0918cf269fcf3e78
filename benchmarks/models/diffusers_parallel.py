"""diffusers' own context parallelism, on CPU ranks too, and a count of what it sends.

By itself it runs on accelerators only and on models of exactly 40 blocks. Three repairs make it run here, and change
nothing that it computes or sends:

1. It numbers devices by `torch.accelerator.device_count()`, which is 0 on a CPU, and divides by that. It is told 1, and
   given a mesh of CPU ranks in place of the one that it would make on the accelerator.
2. Its plan of what to gather names blocks 0 to 39, and a model with fewer raises. The names of absent blocks are left
   out, by the `cp_plan` argument that it offers.
3. Where ranks hold unlike numbers of tokens it gathers tensors of unlike sizes in one call, which NCCL does by a
   broadcast from each rank and gloo refuses. The broadcasts are made by hand.

`ring_anything` runs on a GPU only: diffusers has no attention with log-sum-exps on a CPU.
"""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, HeliosTransformer3DModel
from diffusers.hooks import context_parallel
from diffusers.models._modeling_parallel import gather_size_by_comm
from diffusers.utils import logging
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.collectives import Meter

REPAIRS = (
    "device_count() is told to be 1 and a mesh of CPU ranks is given: it divides by the number of accelerators",
    "cp_plan without the blocks that the model lacks: its own names exactly 40",
    "tensors of unlike sizes are gathered by one broadcast a rank, as NCCL does: gloo refuses them",
)

_SILENT = {"_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}


PEERS = ("ulysses", "ulysses_anything", "ring_anything")
"""Ways in which diffusers spreads a sequence over ranks; the last two take tokens and heads that do not divide."""


def enable_parallelism(
    model: HeliosTransformer3DModel, ranks: int, peer: str = "ulysses", device_type: str = "cpu"
) -> None:
    """Turn on one of `PEERS` over all `ranks` of the world; every rank calls it, once a model."""
    is_ring = peer == "ring_anything"
    mesh = init_device_mesh(device_type, (ranks, 1) if is_ring else (1, ranks), mesh_dim_names=("ring", "ulysses"))
    options = {} if peer == "ulysses" else {peer: True}
    config = ContextParallelConfig(**{"ring_degree" if is_ring else "ulysses_degree": ranks}, mesh=mesh, **options)
    # torch 2.13 renames a collective that diffusers calls, and says so on every rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it calls itself experimental, on every rank
    try:
        devices = torch.accelerator.device_count() or 1
        with mock.patch.object(torch.accelerator, "device_count", lambda: devices):
            model.enable_parallelism(config=config, cp_plan=_plan_of_present_blocks(model))
    finally:
        logging.set_verbosity(verbosity)
    context_parallel._all_gather_anything = _gather


def _plan_of_present_blocks(model: HeliosTransformer3DModel) -> dict[str, Any]:
    present = {"*", *map(str, range(len(model.blocks)))}
    return {name: part for name, part in model._cp_plan.items() if name.split(".")[1] in present}


def _gather(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Stands in for diffusers' function: the tensors of all ranks of `group`, joined along `dim`."""
    tensor = tensor.contiguous()
    sizes = gather_size_by_comm(tensor.shape[dim], group)
    parts = [tensor.new_empty((*tensor.shape[:dim], size, *tensor.shape[dim:][1:])) for size in sizes]
    parts[dist.get_rank(group)] = tensor
    for rank, part in enumerate(parts):
        dist.broadcast(part, dist.get_global_rank(group, rank), group)
    return torch.cat(parts, dim)


class FunctionalCollectives(TorchDispatchMode):
    """Meters torch's functional collectives, which are what diffusers calls, inside a `with` block.

    Bytes are those that this rank sends to others, as `Meter` counts them for ours; "sizes" are the token counts that
    ranks tell each other before they send unlike numbers of them. Raises `RuntimeError` for a
    collective that it does not know, so that none goes uncounted.
    """

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_dispatch__(self, function: OpOverload, types, args=(), kwargs=None):
        name, kwargs = function.name().split(".")[0], kwargs or {}
        if function.namespace in ("c10d", "_c10d_functional") and name not in _SILENT:
            self._count(name.split("::")[1], *args, **kwargs)
        return function(*args, **kwargs)

    def _count(self, name: str, tensor: Tensor, *rest: Any) -> None:
        if name == "allgather_":  # (outputs by rank, inputs, …), each in a list
            (outputs,), (tensor,) = tensor, rest[0]
            what = "sizes" if tensor.dtype == torch.int64 else "all_gather"
            self.meter.add(what, tensor.numel() * tensor.element_size() * (len(outputs) - 1))
            return
        if name == "broadcast_":  # a part of `_gather`; the root's is counted, for all of it
            (tensor,), (_, root, *_) = tensor, rest
            if root == dist.get_rank():
                self.meter.add("all_gather", tensor.numel() * tensor.element_size() * (dist.get_world_size() - 1))
            return
        size = tensor.numel() * tensor.element_size()
        match name, rest:
            case "all_to_all_single", (_, sent, _):
                self.meter.add("all_to_all", size // sum(sent) * (sum(sent) - sent[dist.get_rank()]))
            case "all_gather_into_tensor", (ranks, _):
                self.meter.add("all_gather", size * (ranks - 1))
            case _:
                raise RuntimeError(f"collective {name}{rest}: the meter knows all-to-all and all-gather only")
