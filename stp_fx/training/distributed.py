"""Values that must agree between the processes of a distributed job."""

from __future__ import annotations

from torch import nn

from stp_fx.errors import PlanError
from stp_fx.measure.distributed import gathered, rank_zeros, several_processes
from stp_fx.selection import PrunePlan

__all__ = ["assert_same_plan", "share_buffers"]


def share_buffers(model: nn.Module) -> None:
    """Gives all ranks rank 0's buffers, as DistributedDataParallel does before a forward: running statistics differ between
    two forwards, and measurements would depend on more than a checkpoint keeps."""
    if several_processes():
        for buffer in model.buffers():
            rank_zeros(buffer)


def assert_same_plan(plan: PrunePlan) -> None:
    """Every rank must have come to the same plan; does nothing outside ``torch.distributed``.

    Raises:
        PlanError: on all ranks, if one differs.
    """
    if not several_processes():
        return
    digests = gathered(plan.digest())
    if len(set(digests)) > 1:
        other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
        raise PlanError(
            f"ranks 0 and {other} came to different plans: their weights or their data's statistics differ; "
            "broadcast the model before training, and seed random criteria alike"
        )
