"""First-block residual caching: where the first block does much the same as before, a step reuses the other blocks.

After block 0 of the branch of the prompt, its residual r (what it added to the noisy tokens) is compared with that of
the last step that was computed in full: mean |r − r'| / mean |r'|. Below the threshold the other blocks are left out,
and their sum of that step is added again. This is not exact. Nothing is reused across chunks or pyramid stages.

One decision holds for both branches of guidance and all ranks, so all ranks run the same collectives in each step. It
takes one message of a few bytes, and the host waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from helios_cp.model.transformer import BlockInputs

Total = Callable[[Tensor], Tensor]
"""From sums `[2]` over this rank's tokens to those over all tokens of the prompt's branch, equal on all ranks."""


def own_total(sums: Tensor) -> Tensor:
    """Where all tokens are here."""
    return sums


class BlockCache:
    """A transformer's body that leaves blocks out. Its forwards come as in `Pipeline`: step by step, and in each step
    the texts of the branches in the same order.

    `steps` counts the steps of the chunk so far, and `skipped` has the numbers of those that left blocks out; a step
    without forwards, as CFG-Zero* has, does not count. A batch is one: its samples are skipped together.
    """

    def __init__(self, threshold: float, total: Total = own_total) -> None:
        self.threshold = threshold
        self.total = total
        self.start_chunk()

    def start_chunk(self) -> None:
        """Forget everything."""
        self.steps = 0
        self.skipped: list[int] = []
        self._first: int | None = None  # the text whose forward comes first in each step
        # What the first block and all others added to the noisy tokens `[B, S, dim]`, by the number of the text.
        self._residuals: dict[int, tuple[Tensor, Tensor]] = {}
        self._skips = False

    def __call__(self, blocks: nn.ModuleList, states: Tensor, inputs: BlockInputs) -> Tensor:
        if len(inputs.keys_values) < 2:
            return inputs.run(blocks, states)
        if self._first is None:
            self._first = inputs.text
        before = states[:, inputs.history :].clone()  # blocks write over it
        states = inputs.run(blocks[:1], states)
        after = states[:, inputs.history :]
        first = after - before
        last, others = self._residuals.get(inputs.text, (None, None))
        if inputs.text == self._first:
            is_alike = last is not None and last.shape == first.shape
            self._skips = is_alike and self._change(first, last) < self.threshold
            if self._skips:
                self.skipped.append(self.steps)
            self.steps += 1
        if self._skips:
            return after + others
        after = after.clone()
        states = inputs.run(blocks[1:], states, first=1)
        self._residuals[inputs.text] = first, states - after
        return states

    def _change(self, residual: Tensor, last: Tensor) -> float:
        """mean |residual − last| / mean |last| over all tokens; 0 where both are 0, infinite where `last` alone is."""
        norms = [torch.linalg.vector_norm(each, 1, dtype=torch.float32) for each in (residual - last, last)]
        difference, size = self.total(torch.stack(norms)).tolist()
        if size:
            return difference / size
        return math.inf if difference else 0.0
