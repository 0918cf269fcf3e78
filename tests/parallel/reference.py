"""Unsharded references that the tests of this folder compare with, and tensors to compare on."""

import torch
import torch.distributed as dist

from parallel.collectives import Group, Meter


def reference_attention(query, key, value):
    """Softmax attention written out in fp64, `[B, S, H, D]`, with the log-sum-exp of its scores `[B, H, Sq]`."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value), scores.logsumexp(-1)


def random_qkv(batch, queries, keys, heads, dim, dtype=torch.float64, device="cpu"):
    """The same query, key and value on every rank."""
    generator = torch.Generator().manual_seed(0)
    lengths = (queries, keys, keys)
    return [torch.randn(batch, n, heads, dim, generator=generator).to(device, dtype) for n in lengths]


def world_group(meter: Meter | None = None, stage: bool = False) -> Group:
    """All ranks of the running world, or a group of one where there is none."""
    if not dist.is_initialized():
        return Group(None, meter=meter, stage=stage)
    return Group.of(dist.group.WORLD, meter, stage)
