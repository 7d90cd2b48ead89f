"""torch-pruning 1.6.1 on the networks of ``_fashion.py``, told what it cannot see: the classifier and the heads."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

import stp_fx


def pruner_of(
    model: nn.Module, example: Tensor, ratio: float, *, kind: str = "BasePruner", whole_heads: bool = True, **options: Any
) -> Any:
    """One of its pruners around ``model``, which it changes in place; its options as they come, L2 magnitude by default.

    ``whole_heads``: heads go, and not only dimensions of heads; in several steps this leaves it with 0 heads.
    """
    import torch_pruning as tp

    heads = {m.qkv: m.heads for m in model.modules() if hasattr(m, "qkv")}
    options = {"importance": tp.importance.GroupMagnitudeImportance(p=2), **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it lists the parameters that belong to no layer
        return getattr(tp.pruner, kind)(
            model, example, pruning_ratio=ratio, ignored_layers=[model.head], num_heads=heads,
            prune_num_heads=whole_heads and bool(heads), head_pruning_ratio=ratio if whole_heads and heads else 0.0, **options,
        )  # fmt: skip


def step(pruner: Any, model: nn.Module) -> None:
    """One step, and the user's own repair: it changes the layers of an attention, not the number in the module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner.step()
    for module in model.modules():
        if hasattr(module, "qkv"):
            module.heads = pruner.num_heads[module.qkv]


def ratio_for(model: nn.Module, example: Tensor, target: float, prune: Callable[[nn.Module, float], None]) -> float | None:
    """Its smallest ratio that removes at least ``target`` of the MACs in one shot, by bisection; None if none works."""
    limit, low, high, best = (1 - target) * macs(model, example), 0.0, 0.95, None
    for _ in range(9):
        ratio = (low + high) / 2
        pruned = copy.deepcopy(model)
        prune(pruned, ratio)
        if runs(pruned, example) and macs(pruned, example) <= limit:
            high = best = ratio
        else:
            low = ratio
    return best


def prune_once(
    model: nn.Module, example: Tensor, ratio: float, gradients: Mapping[str, Tensor] | None = None, **options: Any
) -> None:
    """One shot, in place; ``gradients`` are what Taylor scores read."""
    pruner = pruner_of(model, example, ratio, **options)
    for key, parameter in model.named_parameters():
        parameter.grad = None if gradients is None else gradients[key].clone()
    step(pruner, model)


def plan_of_slices(gm: fx.GraphModule, original: nn.Module, pruned: nn.Module) -> stp_fx.PrunePlan | None:
    """Its choice as a plan for our graph: which slices of the weights it has kept is found by their values. None where it keeps
    other dimensions in each head of an attention, which is no choice of units."""
    removed, now = {}, dict(pruned.named_parameters())
    for name, whole in original.named_parameters():
        if whole.dim() < 2 or whole.shape == now[name].shape:
            continue
        values, order = whole.detach().flatten().sort()
        places = order[torch.searchsorted(values, now[name].detach().flatten())]
        kept = [set(indices.tolist()) for indices in torch.unravel_index(places, whole.shape)]
        for dim, size in enumerate(whole.shape):
            if len(kept[dim]) < size:
                removed[f"{name}:{dim}"] = sorted(set(range(size)) - kept[dim])
    try:
        return stp_fx.analyze(gm).plan_for(removed)
    except stp_fx.errors.InputError:
        return None


def runs(model: nn.Module, example: Tensor) -> bool:
    try:
        with torch.no_grad():
            model(example)
    except RuntimeError:
        return False
    return True


def macs(model: nn.Module, example: Tensor) -> int:
    return stp_fx.cost(stp_fx.trace(model, example)).macs


def has_batchnorm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def recalibrated(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """A copy with BatchNorm's running statistics measured anew, as a user would write it."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return model.eval()
