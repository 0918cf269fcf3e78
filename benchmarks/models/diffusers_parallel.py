"""diffusers' own context parallelism, on CPU ranks too, and a count of what it sends.

By itself it runs on accelerators only and on models of exactly 40 blocks. Two repairs make it run here, and change
nothing that it computes or sends:

1. It numbers devices by `torch.accelerator.device_count()`, which is 0 on a CPU, and divides by that. It is told 1, and
   given a mesh of CPU ranks in place of the one that it would make on the accelerator.
2. Its plan of what to gather names blocks 0 to 39, and a model with fewer raises. The names of absent blocks are left
   out, by the `cp_plan` argument that it offers.
"""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import torch
from diffusers import ContextParallelConfig, HeliosTransformer3DModel
from diffusers.utils import logging
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.collectives import Meter

REPAIRS = (
    "device_count() is told to be 1 and a mesh of CPU ranks is given: it divides by the number of accelerators",
    "cp_plan without the blocks that the model lacks: its own names exactly 40",
)

_SILENT = {"_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}


def enable_ulysses(model: HeliosTransformer3DModel, degree: int, device_type: str = "cpu") -> None:
    """Turn on diffusers' Ulysses over all ranks of a world of `degree`; every rank calls it, once a model."""
    mesh = init_device_mesh(device_type, (1, degree), mesh_dim_names=("ring", "ulysses"))
    config = ContextParallelConfig(ulysses_degree=degree, mesh=mesh)
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


def _plan_of_present_blocks(model: HeliosTransformer3DModel) -> dict[str, Any]:
    present = {"*", *map(str, range(len(model.blocks)))}
    return {name: part for name, part in model._cp_plan.items() if name.split(".")[1] in present}


class FunctionalCollectives(TorchDispatchMode):
    """Meters torch's functional collectives, which are what diffusers calls, inside a `with` block.

    Bytes are those that this rank sends to others, as `Meter` counts them for ours. Raises `RuntimeError` for a
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
        size = tensor.numel() * tensor.element_size()
        match name, rest:
            case "all_to_all_single", (_, sent, _) if len(set(sent)) == 1:
                self.meter.add("all_to_all", size // len(sent) * (len(sent) - 1))
            case "all_gather_into_tensor", (ranks, _):
                self.meter.add("all_gather", size * (ranks - 1))
            case _:
                raise RuntimeError(f"collective {name}{rest}: the meter knows even all-to-all and all-gather only")
