"""The contestants of ``engine.py``: stp_fx, torch-pruning and the floor, each as a call on the same module and example."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

import stp_fx

RATIO = 0.5
Shapes = dict[str, tuple[int, ...]]


def ours(model: nn.Module, example: Tensor) -> nn.Module:
    """Trace, analyse, score, plan and remove. The model is left as it was."""
    return stp_fx.prune_graph(stp_fx.trace(model, example, validate=False), criterion="magnitude", ratio=RATIO, validate=False)


def validated(model: nn.Module, example: Tensor) -> nn.Module:
    """As users run it: capture and removal are checked."""
    return stp_fx.prune_graph(stp_fx.trace(model, example), criterion="magnitude", ratio=RATIO)


def peer(model: nn.Module, example: Tensor) -> nn.Module:
    """Dependency graph, groups, scores and removal by torch-pruning, on ``model`` itself: hand it a copy.

    It is told what it cannot see: that the classifier keeps its outputs, and how many heads an attention has.
    """
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    heads = {module: module.num_heads for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it lists the parameters that belong to no layer
        pruner = torch_pruning.pruner.MagnitudePruner(
            model,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=RATIO,
            ignored_layers=[classifier],
            num_heads=heads,
        )
        pruner.step()
    return model


def prepare_peer(model: nn.Module, example: Tensor) -> Callable[[], nn.Module]:
    """The peer's run with its copy of the model already made."""
    duplicate = copy.deepcopy(model)
    return lambda: peer(duplicate, example)


def floor(model: nn.Module, kept: Shapes) -> list[Tensor]:
    """The work of magnitude pruning: norms of every weight over inputs and over outputs, a copy of the kept weights.

    Written as one writes it, with ``vector_norm``; the norm across a weight's rows is slow on a CPU, so that a pruner
    with a better norm can be faster than this. ``kept`` has the shape that stays of each tensor; a block of that shape
    is copied, which is cheaper than the scattered rows of a real plan.
    """
    copies = []
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim >= 2:
                for side in (0, 1):
                    torch.linalg.vector_norm(tensor, dim=[dim for dim in range(tensor.ndim) if dim != side])
            copies.append(_copy(tensor, kept.get(name)))
    return copies


def bare_floor(model: nn.Module, kept: Shapes) -> list[Tensor]:
    """Memory traffic alone: every weight read once, in its own order, and a copy of the kept weights."""
    copies = []
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim >= 2:
                torch.linalg.vector_norm(tensor.flatten(1), dim=1)
            copies.append(_copy(tensor, kept.get(name)))
    return copies


def _copy(tensor: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    for dim, size in enumerate(shape or tuple(tensor.shape)):
        tensor = tensor.narrow(dim, 0, size)
    return tensor.clone(memory_format=torch.contiguous_format)


def shapes_of(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def halved(model: nn.Module) -> Shapes:
    """Shapes with every dimension of the weights at half, for a floor where no pruned network is at hand."""
    return {
        name: tuple(max(1, size // 2) if dim < 2 else size for dim, size in enumerate(tensor.shape))
        for name, tensor in model.state_dict().items()
    }


def warm_up() -> None:
    """Pay what is paid once in a process (imports, lazy tables) before anything is timed."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()
    example = torch.randn(2, 3, 8, 8)
    for contestant in (ours, lambda *both: prepare_peer(*both)()):
        contestant(model, example)


def describe(model: nn.Module, example: Tensor) -> dict[str, Any]:
    """Parameters of a pruned model, and whether it still runs."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    try:
        with torch.no_grad():
            model.eval()(example)
    except Exception as error:  # a peer's broken result is a finding, not a failure of this script
        return {"parameters": parameters, "runs": f"{type(error).__name__}: {str(error)[:200]}"}
    return {"parameters": parameters, "runs": "yes"}
