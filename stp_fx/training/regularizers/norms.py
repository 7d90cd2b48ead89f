"""Penalties on norms of weights: group lasso, L2,1 of the layers, L1 of BatchNorm scales. Each as a loss and as gradients."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import fx

from stp_fx.analysis.groups import Axis
from stp_fx.training.regularizers.base import BaseRegularizer, Groups, check_number, register
from stp_fx.training.regularizers.sums import RowNorms, cached, rows_of

__all__ = ["BNScaleL1", "GroupLasso", "WeightL21"]


@dataclasses.dataclass(frozen=True)
class _NormPenalty(BaseRegularizer):
    strength: float = 1e-4
    forms: ClassVar[tuple[str, ...]] = ("loss", "gradients")
    _by_position: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("strength", self.strength, 0.0)

    def _wanted(self, axis: Axis) -> bool:
        raise NotImplementedError

    def _rows(self, gm: fx.GraphModule, groups: Groups) -> RowNorms:
        return cached(
            gm, groups, type(self), lambda graph, chosen: rows_of(gm, graph, chosen, self._wanted, by_position=self._by_position)
        )

    def loss(self, gm: fx.GraphModule, groups: Groups = None) -> torch.Tensor:
        return self._rows(gm, groups).loss(_parameters(gm), self.strength)

    def apply_gradients(self, gm: fx.GraphModule, groups: Groups = None) -> float:
        return self._rows(gm, groups).apply_gradients(_parameters(gm), self.strength)


def _parameters(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    return dict(gm.named_parameters(remove_duplicate=False))


@register("group_lasso")
@dataclasses.dataclass(frozen=True)
class GroupLasso(_NormPenalty):
    """``strength`` times the sum over all units of the L2 norm of everything coupled to the unit: rows and columns of
    weights, biases, norm scales (Fang et al., "DepGraph", CVPR 2023, equations 4 and 5; report, section 1.4.1)."""

    def _wanted(self, axis: Axis) -> bool:
        return True


@register("weight_l21")
@dataclasses.dataclass(frozen=True)
class WeightL21(_NormPenalty):
    """``strength`` times the sum, over every layer whose output channels may be removed, of those channels' weight norms, each
    layer by itself (report, section 1.4.2). Transposed, grouped and depthwise convolutions are layers like others."""

    _by_position: ClassVar[bool] = True

    def _wanted(self, axis: Axis) -> bool:
        return axis.role == "weight" and axis.side in ("out", "both")


@register("bn_scale_l1")
@dataclasses.dataclass(frozen=True)
class BNScaleL1(_NormPenalty):
    """``strength`` times the sum of |scale| over the norms' scales that may be removed (Liu et al., "Learning efficient
    convolutional networks through network slimming", ICCV 2017). Scales of LayerNorm, GroupNorm and layer scales count as
    well."""

    _by_position: ClassVar[bool] = True

    def _wanted(self, axis: Axis) -> bool:
        return axis.role == "scale"
