"""Processes of a ``torch.distributed`` job that measure together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

__all__ = ["agreed", "several_processes", "summed"]

T = TypeVar("T")


def several_processes() -> bool:
    """Whether there is a default process group of more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def agreed(value: T) -> T:
    """The value of rank 0, on every rank: for measurements that differ from process to process, such as times."""
    if not several_processes():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def summed(count: int, tensors: Sequence[torch.Tensor]) -> int:
    """Sums ``tensors`` in place, and the number, over all processes."""
    device = tensors[0].device if tensors else torch.device("cpu")
    total = torch.tensor([float(count)], dtype=torch.float64, device=device)
    for each in (total, *tensors):
        dist.all_reduce(each)
    return int(total.item())
