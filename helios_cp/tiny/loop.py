"""The loop of a training stage: repeatable steps, progress, and a state that a stop cannot lose.

A step's random numbers come from the stage's seed and the step's number alone, so a run that was stopped and one that
was not see the same samples.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from helios_cp.files.whole_files import write_tensors

WARM_UP = 30
SAVE_SECONDS = 60


@dataclass(frozen=True)
class Rates:
    """Learning rates of hidden matrices (Muon) and of all else (Adam), and the share of steps over which they fall."""

    matrices: float = 0.02
    others: float = 2e-3
    fall: float = 0.5

    def factor(self, step: int, steps: int) -> float:
        left = 1 - step / steps
        return min(1.0, (step + 1) / WARM_UP) * min(1.0, 0.02 + left / self.fall)


class Learner:
    """The weights of a module with their optimisers, their moving average, and the number of steps done.

    Muon (Jordan et al. 2024) turns hidden matrices and convolutions, Adam all else: at this size that takes about half
    the steps of Adam alone. `is_matrix` says by name which parameters are hidden; Muon sees convolutions as matrices.
    """

    def __init__(self, module: nn.Module, is_matrix: Callable[[str], bool], rates: Rates) -> None:
        self.module, self.rates, self.step, self.seconds = module, rates, 0, 0.0
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        hidden = {name for name, p in self.parameters.items() if p.ndim > 1 and is_matrix(name)}
        self.flat = {name: p.detach().reshape(p.shape[0], -1) for name, p in self.parameters.items() if name in hidden}
        others = [p for name, p in self.parameters.items() if name not in hidden]
        self.muon = torch.optim.Muon(self.flat.values(), lr=rates.matrices, weight_decay=0.0)
        self.adam = torch.optim.Adam(others, lr=rates.others, betas=(0.9, 0.98))

    def update(self, loss: Tensor, steps: int) -> None:
        """One step of gradient descent on `loss`, of `steps` in all."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        factor = self.rates.factor(self.step, steps)
        for optimizer, rate in ((self.muon, self.rates.matrices), (self.adam, self.rates.others)):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        for name, flat in self.flat.items():
            flat.grad = self.parameters[name].grad.reshape(flat.shape)
        self.muon.step()
        self.adam.step()
        with torch.no_grad():
            for name, flat in self.flat.items():
                self.parameters[name].copy_(flat.view_as(self.parameters[name]))
        self.module.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(0.998, self.step / (self.step + 20))
        with torch.no_grad():
            for name, value in self.parameters.items():
                self.average[name].lerp_(value, 1 - decay)

    def save(self, path: Path) -> None:
        """Weights, average and optimisers as one safetensors file, which appears whole or not at all."""
        tensors = {f"weights.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        for name, optimizer in (("muon", self.muon), ("adam", self.adam)):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{name}.{index}.{key}": value for key, value in state.items()}
        metadata = {"step": str(self.step), "seconds": f"{self.seconds:.0f}"}
        write_tensors(path, {key: value.contiguous() for key, value in tensors.items()}, metadata)

    def load(self, path: Path) -> None:
        """What `save` wrote."""
        states: dict[str, dict[int, dict[str, Tensor]]] = {"muon": defaultdict(dict), "adam": defaultdict(dict)}
        with safe_open(path, "pt") as file, torch.no_grad():
            self.step, self.seconds = int(file.metadata()["step"]), float(file.metadata()["seconds"])
            for key in file.keys():  # noqa: SIM118
                kind, name = key.split(".", 1)
                value = file.get_tensor(key)
                if kind == "weights":
                    self.parameters[name].copy_(value)
                    if name in self.flat:
                        self.flat[name].copy_(value.reshape(self.flat[name].shape))
                elif kind == "average":
                    self.average[name].copy_(value)
                else:
                    index, entry = name.split(".", 1)
                    states[kind][int(index)][entry] = value
        for kind, optimizer in (("muon", self.muon), ("adam", self.adam)):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(states[kind])})


def average_of(path: Path) -> dict[str, Tensor]:
    """The moving average of the weights in a state that `Learner.save` wrote."""
    with safe_open(path, "pt") as file:
        names = [key.removeprefix("average.") for key in file.keys() if key.startswith("average.")]  # noqa: SIM118
        return {name: file.get_tensor(f"average.{name}") for name in names}


def run(
    learner: Learner,
    loss_of: Callable[[random.Random], tuple[Tensor, Mapping[str, float]]],
    state: Path,
    *,
    steps: int,
    seed: int,
    report_every: int = 50,
) -> None:
    """Train up to `steps` steps in all, going on from `state` where it exists.

    `loss_of` draws a batch with the generator it is given and with torch's own, and returns the loss and figures for
    the progress lines.
    """
    if state.exists():
        learner.load(state)
        print(f"{state}: goes on from step {learner.step}", flush=True)
    figures: dict[str, list[float]] = defaultdict(list)
    saved = before = time.monotonic()
    while learner.step < steps:
        generator = random.Random(f"{seed} {learner.step}")
        torch.manual_seed(generator.getrandbits(63))
        loss, seen = loss_of(generator)
        learner.update(loss, steps)
        for name, value in seen.items():
            figures[name].append(value)
        now = time.monotonic()
        learner.seconds, before = learner.seconds + now - before, now
        if learner.step % report_every == 0:
            means = " ".join(f"{name} {sum(values) / len(values):.4g}" for name, values in sorted(figures.items()))
            print(f"step {learner.step} of {steps}, {learner.seconds:.0f} s: {means}", flush=True)
            figures.clear()
        if now - saved > SAVE_SECONDS or learner.step == steps:
            learner.save(state)
            saved = now
