"""The simple oracle for removal: the original network with its consumers' input columns zeroed, and nothing else.

For every axis of a plan that is the input axis of a contraction's weight, the removed columns of a copy of the original are
set to zero. The removed channels still flow, whatever they hold (0.5 behind a sigmoid, a shift behind a norm), but nobody
reads them. That is complete where every consumer of a removed channel is such a column. It is not where channels meet
channels (a head dimension of q and k), where they are added up by an op without a weight, or where one weight's rows are
columns elsewhere: blocks that do so say ``columns_suffice = False``, and :mod:`stp_fx.testing.absent` is their oracle.

Which axis of which tensor is an input axis is taken from the modules, not from the library.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from stp_fx.analysis.plan import PrunePlan
from stp_fx.testing.recipe import Block

__all__ = ["all_channels_named", "columns_suffice", "input_axes", "run_silenced", "silenced_copy"]


def input_axes(module: nn.Module) -> dict[str, int]:
    """The input axis of every contraction weight: parameter name to dimension. Tied parameters are listed by all names."""
    axes: dict[str, int] = {}
    for prefix, each in module.named_modules(remove_duplicate=False):
        for name, dim in _own_input_axes(each).items():
            axes[f"{prefix}.{name}" if prefix else name] = dim
    return axes


def _own_input_axes(module: nn.Module) -> dict[str, int]:
    if isinstance(module, _ConvTransposeNd):
        return {"weight": 0}
    if isinstance(module, (_ConvNd, nn.Linear)):
        return {"weight": 1}
    if isinstance(module, nn.MultiheadAttention):
        return {"in_proj_weight": 1, "q_proj_weight": 1, "k_proj_weight": 1, "v_proj_weight": 1}
    return dict(module.columns) if isinstance(module, Block) else {}


def columns_suffice(module: nn.Module) -> bool:
    """Whether zeroing input columns silences every consumer in ``module``; False if it is not made of blocks, which tell."""
    blocks = [each for each in module.modules() if isinstance(each, Block)]
    return bool(blocks) and all(each.columns_suffice for each in blocks)


def all_channels_named(module: nn.Module) -> bool:
    """Whether a plan's parameters tell of every channel that is removed: no block makes constant channels of its own."""
    return not any(each.makes_channels for each in module.modules() if isinstance(each, Block))


def silenced_copy(module: nn.Module, plan: PrunePlan) -> nn.Module:
    """A copy of ``module`` in which no weight reads what ``plan`` removes."""
    copied = copy.deepcopy(module)
    named = dict(copied.named_parameters(remove_duplicate=False))
    axes = input_axes(module)
    with torch.no_grad():
        for (name, dim), kept in plan.kept.items():
            if axes.get(name) == dim:
                gone = torch.ones(named[name].shape[dim], dtype=torch.bool)
                gone[torch.as_tensor(kept.copy())] = False
                named[name].index_fill_(dim, gone.nonzero()[:, 0], 0.0)
    return copied


def run_silenced(module: nn.Module, plan: PrunePlan, inputs: Sequence[Any]) -> Any:
    """The output of ``module`` for ``inputs`` once no weight reads the channels that ``plan`` removes."""
    with torch.no_grad():
        return silenced_copy(module, plan)(*inputs)
