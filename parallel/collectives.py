"""Collectives of uneven parts whose sizes every rank knows beforehand, with a meter of calls and bytes.

Sizes come from the plan, so ranks exchange no sizes at run time, and nothing is padded. A group of one rank makes no
call. On gloo, CUDA tensors travel through pinned host memory, so several ranks can share one card.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from parallel import opaque


@dataclass
class Meter:
    """Counts this rank's calls, and the bytes that it sends to other ranks, by kind of collective."""

    calls: Counter[str] = field(default_factory=Counter)
    sent_bytes: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, sent_bytes: int) -> None:
        self.calls[kind] += 1
        self.sent_bytes[kind] += sent_bytes

    @property
    def total_calls(self) -> int:
        return sum(self.calls.values())

    @property
    def total_bytes(self) -> int:
        return sum(self.sent_bytes.values())

    def reset(self) -> None:
        self.calls.clear()
        self.sent_bytes.clear()


@dataclass
class Pending:
    """Messages under way. `wait` returns the received tensors, in the order in which they were asked for."""

    works: Sequence[dist.Work]
    sent: Sequence[torch.Tensor]  # a buffer must outlive its message
    received: Sequence[torch.Tensor]
    device: torch.device

    def wait(self) -> list[torch.Tensor]:
        for work in self.works:
            work.wait()
        self.sent = ()
        return [tensor.to(self.device) for tensor in self.received]


@dataclass(frozen=True, eq=False)
class Group:
    """Ranks that communicate, as an object that is passed to whatever needs it.

    `ranks` are global ranks; `rank` is this rank's index among them. `process_group` is None for a group of one.
    `stage` sends even host tensors through a staging buffer, as gloo does with CUDA tensors. `timeout` is that of the
    process group, for further groups of the same ranks. In compiled code `all_to_all`, `all_gather` and
    `reduce_scatter` become operators of `parallel.opaque`, which know the group by its `number`.
    """

    process_group: dist.ProcessGroup | None
    ranks: tuple[int, ...] = (0,)
    rank: int = 0
    meter: Meter | None = None
    stage: bool = False
    timeout: timedelta | None = None
    number: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "number", opaque.name(self))
        if self.process_group is None and len(self.ranks) > 1:
            raise ValueError(f"group of ranks {self.ranks}: more than one rank needs a process group")

    @classmethod
    def of(cls, process_group: dist.ProcessGroup, meter: Meter | None = None, stage: bool = False) -> Group:
        """Wrap a process group that this rank belongs to."""
        ranks = tuple(dist.get_process_group_ranks(process_group))
        return cls(process_group, ranks, dist.get_rank(process_group), meter, stage)

    @property
    def size(self) -> int:
        return len(self.ranks)

    def all_to_all(
        self, tensor: torch.Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], kind: str = "all_to_all"
    ) -> torch.Tensor:
        """Send consecutive pieces of a flat tensor to the ranks, and return the pieces received, flat, in rank order.

        Sizes are element counts per rank, this one included. Raises `ValueError` where they do not fit the tensor.
        """
        if tensor.dim() != 1 or tensor.numel() != sum(send_sizes) or len(send_sizes) != self.size:
            raise ValueError(
                f"all-to-all of shape {tuple(tensor.shape)} in pieces {tuple(send_sizes)} over {self.size} ranks: "
                "the tensor must be flat, with one piece a rank and nothing left over"
            )
        if self.size == 1:
            return tensor
        if torch.compiler.is_compiling():
            return opaque.all_to_all(tensor, list(send_sizes), list(receive_sizes), kind, self.number)
        self._count(kind, sum(send_sizes) - send_sizes[self.rank], tensor)
        wire = self._to_wire(tensor)
        received = self._buffer((sum(receive_sizes),), tensor)
        dist.all_to_all_single(received, wire, list(receive_sizes), list(send_sizes), group=self.process_group)
        return received.to(tensor.device)

    def all_gather(self, tensor: torch.Tensor, lengths: Sequence[int], dim: int) -> list[torch.Tensor]:
        """The parts of all ranks, in rank order. `lengths` are their sizes along `dim`; other dims are equal."""
        if len(lengths) != self.size or tensor.shape[dim] != lengths[self.rank]:
            raise ValueError(
                f"all-gather of shape {tuple(tensor.shape)} on rank {self.rank} of {self.size}: dim {dim} must follow "
                f"the lengths {tuple(lengths)}"
            )
        if self.size == 1:
            return [tensor]
        if torch.compiler.is_compiling():
            return list(opaque.all_gather(tensor, list(lengths), dim, self.number).split(list(lengths), dim))
        self._count("all_gather", tensor.numel() * (self.size - 1), tensor)
        shapes = [_with_length(tensor.shape, dim, length) for length in lengths]
        if self._on_gloo:
            # gloo's all_gather refuses parts of different size
            others = [rank for rank in range(self.size) if rank != self.rank]
            wire = self._to_wire(tensor)
            sends = [(rank, wire) for rank in others]
            parts = self._exchange(sends, [(rank, shapes[rank]) for rank in others], tensor).wait()
            return [*parts[: self.rank], tensor, *parts[self.rank :]]
        parts = [tensor.new_empty(shape) for shape in shapes]
        dist.all_gather(parts, tensor.contiguous(), group=self.process_group)
        return parts

    def reduce_scatter(self, tensor: torch.Tensor, lengths: Sequence[int], dim: int) -> torch.Tensor:
        """The sum over ranks of this rank's part along `dim`, where part r has `lengths[r]`.

        Parts travel in their own dtype and are added in rank order in fp32 (fp64 for fp64), in which the sum is
        returned: the same bits on every run, and a caller can add a bias before rounding.
        """
        if len(lengths) != self.size or tensor.shape[dim] != sum(lengths):
            raise ValueError(
                f"reduce-scatter of shape {tuple(tensor.shape)} over {self.size} ranks: dim {dim} must be the sum of "
                f"the lengths {tuple(lengths)}"
            )
        accumulator = torch.promote_types(tensor.dtype, torch.float32)
        if self.size == 1:
            return tensor.to(accumulator)
        if tensor.shape[:dim].numel() == 1:  # parts already lie one after the other
            sent = tensor.reshape(-1)
        else:
            sent = torch.cat([part.reshape(-1) for part in tensor.split(list(lengths), dim)])
        row = tensor.numel() // max(sum(lengths), 1)
        own = lengths[self.rank] * row
        received = self.all_to_all(sent, [length * row for length in lengths], [own] * self.size, "reduce_scatter")
        parts = received.view(self.size, *_with_length(tensor.shape, dim, lengths[self.rank]))
        total = parts[0].to(accumulator)
        for part in parts[1:]:
            total = total + part
        return total

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Rank `source`'s tensor on every rank of the group; the others pass one of equal shape, overwritten."""
        if self.size == 1:
            return tensor
        self._count("broadcast", tensor.numel() * (self.size - 1) * (self.rank == source), tensor)
        wire = self._to_wire(tensor)
        dist.broadcast(wire, group=self.process_group, group_src=source)
        return tensor if wire is tensor else tensor.copy_(wire)

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """Rank `source`'s picklable value on every rank, for what is small and rare, such as shapes; not metered."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.process_group, group_src=source)
        return box[0]

    def exchange(
        self,
        sends: Sequence[tuple[int, torch.Tensor]],
        receives: Sequence[tuple[int, Sequence[int]]],
        like: torch.Tensor,
        kind: str,
    ) -> Pending:
        """Start point-to-point messages: `sends` are (rank, tensor), `receives` (rank, shape), of the dtype of `like`.

        At most one message each way between two ranks. Returns at once; computing before `wait` overlaps the transfer.
        """
        if sends or receives:
            self._count(kind, sum(tensor.numel() for _, tensor in sends), like)
        return self._exchange(sends, receives, like)

    def ring_exchange(self, tensor: torch.Tensor, receive_shape: Sequence[int]) -> Pending:
        """Start passing a tensor to the next rank while receiving one of `receive_shape` from the rank before."""
        if self.size == 1:
            return Pending((), (), [tensor], tensor.device)
        return self.exchange(
            [((self.rank + 1) % self.size, tensor)], [((self.rank - 1) % self.size, receive_shape)], tensor, "ring"
        )

    def _exchange(
        self,
        sends: Sequence[tuple[int, torch.Tensor]],
        receives: Sequence[tuple[int, Sequence[int]]],
        like: torch.Tensor,
    ) -> Pending:
        # Both ends know every size, so empty messages are left out.
        outgoing = [(rank, self._to_wire(tensor)) for rank, tensor in sends if tensor.numel()]
        incoming = [(rank, self._buffer(shape, like)) for rank, shape in receives]
        messages = [
            dist.P2POp(operation, tensor, group=self.process_group, group_peer=rank)
            for operation, parts in ((dist.isend, outgoing), (dist.irecv, incoming))
            for rank, tensor in parts
            if tensor.numel()
        ]
        works = dist.batch_isend_irecv(messages) if messages else []
        return Pending(works, [tensor for _, tensor in outgoing], [tensor for _, tensor in incoming], like.device)

    @property
    def _on_gloo(self) -> bool:
        return dist.get_backend(self.process_group) == "gloo"

    def _is_staged(self, tensor: torch.Tensor) -> bool:
        return self.stage or (tensor.is_cuda and self._on_gloo)

    def _to_wire(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor that the backend can send."""
        if not self._is_staged(tensor):
            return tensor.contiguous()
        return self._buffer(tensor.shape, tensor).copy_(tensor)

    def _buffer(self, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        if self._is_staged(like):
            return torch.empty(shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)
        return like.new_empty(shape)

    def _count(self, kind: str, elements: int, tensor: torch.Tensor) -> None:
        if self.meter is not None:
            self.meter.add(kind, elements * tensor.element_size())


def pieces(flat: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Consecutive views of a flat tensor in the given shapes."""
    parts = flat.split([torch.Size(shape).numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _with_length(shape: torch.Size, dim: int, length: int) -> torch.Size:
    return torch.Size((*shape[:dim], length, *shape[dim + 1 :]))
