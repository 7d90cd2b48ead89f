"""Putting a rewritten graph into the module that a training loop holds: same object, same parameters, new contents.

An optimizer knows parameters by identity. A parameter that got shorter therefore keeps its object and gets shorter data;
the optimizer's state for it (momenta, second moments) is cut by the same indices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from stp_fx.checks import listed_argument
from stp_fx.errors import InputError
from stp_fx.ir.provenance import attach_provenance, provenance_of
from stp_fx.selection import PrunePlan

__all__ = ["add_to_optimizers", "adopt", "cut_optimizer", "keep_forward", "listed_optimizers"]


def adopt(held: fx.GraphModule, result: fx.GraphModule) -> list[tuple[str, nn.Parameter]]:
    """Turns ``held`` into ``result``, which must not be used any more; returns the new parameters.

    Parameters of ``held`` that ``result`` still has by name are kept as objects, with the new values; their gradients are
    dropped where the shape changed.
    """
    known = dict(held.named_parameters(remove_duplicate=False))
    renewed: dict[int, nn.Parameter] = {}
    new: list[tuple[str, nn.Parameter]] = []
    for prefix, module in result.named_modules(remove_duplicate=False):
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            full = f"{prefix}.{name}" if prefix else name
            if id(parameter) not in renewed:
                old = known.get(full)
                renewed[id(parameter)] = parameter if old is None else _with_data_of(old, parameter)
                if old is None:
                    new.append((full, parameter))
            module._parameters[name] = renewed[id(parameter)]
    state = provenance_of(result)
    for store in ("_modules", "_parameters", "_buffers"):
        held.__dict__[store] = result.__dict__[store]
    for key, value in result.__dict__.items():
        if key.startswith("_tensor_constant"):
            held.__dict__[key] = value
    held.graph = result.graph
    held.recompile()
    attach_provenance(held, state)
    return new


def _with_data_of(old: nn.Parameter, new: nn.Parameter) -> nn.Parameter:
    if old.shape != new.shape:
        old.grad = None
        # An autograd graph that still exists (a loss that the loop holds, an earlier DistributedDataParallel) keeps the node that
        # accumulates this gradient, and that node keeps the old shape. Other data types make autograd forget the node.
        other = torch.float32 if old.dtype == torch.bfloat16 else torch.bfloat16
        old.data = torch.empty(0, dtype=other, device=old.device)
    old.data = new.data
    old.requires_grad_(new.requires_grad)
    return old


def cut_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, plan: PrunePlan, before: Mapping[int, torch.Size]) -> None:
    """Cuts the state of ``optimizer`` for the parameters of ``model`` by ``plan``; ``before``: shapes by ``id`` of the parameter.

    Any tensor of the parameter's old shape is cut, and any that has 1 in place of some of its sizes (Adafactor's factored
    second moment); numbers are kept.

    Raises:
        InputError: a state tensor that fits neither way: names the parameter and the state's key.
    """
    cuts: dict[int, dict[int, np.ndarray]] = {}
    names: dict[int, str] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for (name, dim), kept in plan.kept.items():
        if name in parameters:
            cuts.setdefault(id(parameters[name]), {})[dim] = kept
            names[id(parameters[name])] = name
    for parameter, state in optimizer.state.items():
        if id(parameter) not in cuts:
            continue
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() > 0 and value.numel() > 1:
                state[key] = _cut(value, cuts[id(parameter)], before[id(parameter)], f"{names[id(parameter)]!r}, {key!r}")


def _cut(value: torch.Tensor, cuts: Mapping[int, np.ndarray], shape: torch.Size, what: str) -> torch.Tensor:
    if value.dim() != len(shape) or any(size not in (1, whole) for size, whole in zip(value.shape, shape, strict=True)):
        raise InputError(
            f"the optimizer's state {what} has shape {tuple(value.shape)}, the parameter had {tuple(shape)}: it cannot be cut "
            "by the same indices; give an optimizer whose state has its parameters' shapes, or make a new one"
        )
    for dim, kept in cuts.items():
        if value.shape[dim] == shape[dim] and shape[dim] > 1:
            value = value.index_select(dim, torch.from_numpy(kept.copy()).to(value.device))
    return value


def add_to_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], model: nn.Module, new: Iterable[tuple[str, nn.Parameter]]
) -> None:
    """Trains new biases like the weight beside them, or like the first group's parameters; ones that are trained already
    move there, to the end of the group."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    groups: list[dict[str, Any]] = [group for optimizer in optimizers for group in optimizer.param_groups]
    for name, parameter in new if groups else ():
        sibling = parameters.get(name.removesuffix("bias") + "weight")
        for group in groups:
            group["params"] = [p for p in group["params"] if p is not parameter]
        chosen = next((g for g in groups if any(p is sibling for p in g["params"])), groups[0])
        chosen["params"].append(parameter)


def keep_forward(gm: fx.GraphModule) -> None:
    """Keeps ``gm.forward`` the same function when the graph is compiled anew, with new code.

    A wrapper that is put around it later (the autocast of Accelerate's ``prepare``) holds that function, and would
    otherwise run the old graph.
    """
    cls = type(gm)  # every GraphModule has a class of its own
    if "recompile" in vars(cls):
        return

    def recompile(self: fx.GraphModule) -> Any:
        kept: Any = cls.forward
        result = super(cls, self).recompile()  # type: ignore[misc]
        made: Any = cls.forward
        kept.__globals__.update(made.__globals__)
        for name in ("__code__", "__defaults__", "__kwdefaults__", "__annotations__"):
            setattr(kept, name, getattr(made, name))
        kept.__dict__.clear()
        kept.__dict__.update(made.__dict__)
        cls.forward = kept
        return result

    cls.recompile = recompile


def listed_optimizers(optimizer: Any) -> tuple[torch.optim.Optimizer, ...]:
    """One optimizer, several or None as a tuple, without Accelerate's wrappers.

    Raises:
        InputError: something else among them.
    """
    if optimizer is None:
        return ()
    one = isinstance(optimizer, torch.optim.Optimizer)
    found = (optimizer,) if one else listed_argument("optimizer", optimizer, "give torch.optim optimizers")
    for each in found:
        if not isinstance(each, torch.optim.Optimizer):
            raise InputError(f"`optimizer` holds a {type(each).__name__}; give torch.optim optimizers")
    return tuple(_inner(each) for each in found)


def _inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that steps: Accelerate's wrapper passes on the state of the one inside, but runs no hooks of its own."""
    inner = getattr(optimizer, "optimizer", None)
    return _inner(inner) if isinstance(inner, torch.optim.Optimizer) else optimizer
