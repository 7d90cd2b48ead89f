"""RecalibrateBatchNorm: running statistics measured again (report, section 1.5.3)."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from stp_fx.checks import is_whole, shown
from stp_fx.errors import InputError
from stp_fx.measure.calibration import arguments_of, batches
from stp_fx.measure.distributed import several_processes, summed
from stp_fx.passes.base import GraphPass
from stp_fx.rewrite.slicing import copied
from stp_fx.typed import BatchNorm, modules_of

__all__ = ["RecalibrateBatchNorm"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RecalibrateBatchNorm(GraphPass):
    """Measures the running statistics of every BatchNorm again, on up to ``limit`` batches of ``calibration``.

    They are reset, then averaged over the batches with equal weights (not blended by momentum), without gradients, the
    BatchNorms in train mode and everything else in eval mode. Nothing else changes; train/eval flags and momenta are restored.
    Under ``torch.distributed`` every rank gives its own batches and gets the average over all.
    A graph without BatchNorm comes back unchanged. A batch needs more than one value a channel.

    Raises:
        InputError: no batch, one that does not fit, or one that leaves statistics that are not finite.
    """

    repairs: ClassVar[bool] = True
    calibration: Iterable[Any] = dataclasses.field(repr=False)
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and (not is_whole(self.limit) or not 1 <= self.limit <= sys.maxsize):
            raise InputError(f"the limit of a recalibration is a number of batches, at least 1; got {shown(self.limit)}")

    def call(self, gm: fx.GraphModule) -> PassResult:
        result = copied(gm)
        norms = dict(_norms(result))
        if not norms:
            _log.info("the graph has no BatchNorm with running statistics, so there is nothing to recalibrate")
            return PassResult(gm, False)
        momenta = {norm: norm.momentum for norm in norms.values()}
        flags = [(module, module.training) for module in result.modules()]
        result.eval()
        with torch.no_grad():
            for norm in norms.values():
                norm.reset_running_stats()
                norm.train().momentum = None  # torch's cumulative average
            for batch in islice(batches(result, self.calibration, "recalibrating BatchNorm"), self.limit):
                result(*arguments_of(result, batch))
            if several_processes():
                _merge(list(norms.values()))
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, flag in flags:
            module.training = flag
        _check_finite(norms)
        return PassResult(result, True)


def _norms(gm: nn.Module) -> Iterator[tuple[str, BatchNorm]]:
    for name, module in modules_of(gm):
        if isinstance(module, BatchNorm) and module.running_mean is not None:
            yield name, module


def _merge(norms: list[BatchNorm]) -> None:
    """Averages over the batches of all processes."""
    parts: list[torch.Tensor] = []
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        count = torch.as_tensor(norm.num_batches_tracked, device=norm.running_mean.device).double().reshape(1)
        parts += [count, norm.running_mean.double() * count, norm.running_var.double() * count]
    together = torch.cat(parts)
    summed(0, [together])
    found: tuple[torch.Tensor, ...] = torch.split(together, [len(part) for part in parts])  # pyright: ignore
    for norm, count, mean, variance in zip(norms, found[::3], found[1::3], found[2::3], strict=True):
        if count > 0 and norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.copy_(mean / count)
            norm.running_var.copy_(variance / count)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.fill_(int(count))


def _check_finite(norms: dict[str, BatchNorm]) -> None:
    for name, norm in norms.items():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        if not bool(torch.isfinite(norm.running_mean).all() and torch.isfinite(norm.running_var).all()):
            raise InputError(
                f"recalibrating left {name!r} with statistics that are not finite: the calibration data or the weights "
                "before it are not, or a batch had a single value a channel"
            )
