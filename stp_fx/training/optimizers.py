"""Optimizers beside a graph that loses channels: which can follow, how their state is cut, and who trains new parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from stp_fx.checks import listed_argument
from stp_fx.errors import InputError
from stp_fx.rewrite.slicing import take
from stp_fx.selection import PrunePlan
from stp_fx.training.commit import Change, entry
from stp_fx.training.trial import Trial, trial

__all__ = ["Cuts", "all_optimizers", "check_optimizers", "cut_states", "listed_optimizers", "train_new"]

_ADVICE = "give an optimizer whose state has its parameters' shapes, or prune before training and make a new one"


@dataclasses.dataclass(frozen=True)
class Cuts:
    """Of one parameter that gets shorter: its name, the positions kept by dimension, its new values."""

    name: str
    kept: Mapping[int, np.ndarray]
    values: torch.Tensor

    @staticmethod
    def of(model: nn.Module, plan: PrunePlan, tensors: Mapping[str, torch.Tensor]) -> dict[int, Cuts]:
        """By ``id`` of the parameter: all that ``plan`` shortens in ``model``; ``tensors``: the new values by name."""
        kept: dict[str, dict[int, np.ndarray]] = {}
        for (name, dim), positions in plan.kept.items():
            kept.setdefault(name, {})[dim] = positions
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return {id(parameters[name]): Cuts(name, kept[name], values) for name, values in tensors.items() if name in kept}


def listed_optimizers(optimizer: Any) -> tuple[Optimizer, ...]:
    """One optimizer, several or None as a tuple, without Accelerate's wrappers.

    Raises:
        InputError: something else among them.
    """
    return tuple(_inner(each) for each in _given(optimizer))


def _given(optimizer: Any) -> tuple[Optimizer, ...]:
    if optimizer is None:
        return ()
    one = isinstance(optimizer, Optimizer)
    found = (optimizer,) if one else listed_argument("optimizer", optimizer, "give torch.optim optimizers")
    for each in found:
        if not isinstance(each, Optimizer):
            raise InputError(f"`optimizer` holds a {type(each).__name__}; give torch.optim optimizers")
    return found


def _inner(optimizer: Optimizer) -> Optimizer:
    """The optimizer that steps: Accelerate's wrapper passes on the state of the one inside, but runs no hooks of its own."""
    inner = getattr(optimizer, "optimizer", None)
    return _inner(inner) if isinstance(inner, Optimizer) else optimizer


def all_optimizers(optimizer: Any) -> tuple[Optimizer, ...]:
    """The given optimizers, and all that they hold in turn (Lookahead, ZeroRedundancyOptimizer, wrappers): each may have
    state."""
    found: dict[int, Optimizer] = {}
    waiting = list(_given(optimizer))
    while waiting:
        each = waiting.pop(0)
        if id(each) not in found:
            found[id(each)] = each
            waiting += [value for value in vars(each).values() if isinstance(value, Optimizer)]
    return tuple(found.values())


def check_optimizers(optimizers: Sequence[Optimizer], model: nn.Module) -> None:
    """Refuses optimizers of another network, and those whose state cannot be cut, as far as their class or a step on a made-up
    parameter tells.

    Raises:
        InputError: names the optimizer, and the state that cannot be cut.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    if optimizers and not any(id(p) in names for o in optimizers for p in _parameters(o)):
        raise InputError(
            f"`optimizer` trains none of the parameters of the {type(model).__name__}: it belongs to another network, or to a "
            "copy. Make it from the parameters of the graph that stp_fx.trace returned"
        )
    for each in optimizers:
        _check_class(each)
        state = _state(each)
        if any(id(p) in names for p in state):
            _check_state(each, state, names)
            continue
        for group in _groups(each):
            ranks = {p.dim(): p for p in group["params"] if id(p) in names}
            for like in ranks.values():
                made = trial(each, group, like, step=True)
                if made.parameter is not None:
                    _check_state(each, {made.parameter: made.state}, {id(made.parameter): names[id(like)]})


def _check_class(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InputError(f"{name} keeps one history of all parameters, which cannot be cut with one of them: {_ADVICE}")
    if getattr(optimizer, "parameters_as_bucket_view", False) or getattr(optimizer, "_overlap_with_ddp", False):
        raise InputError(
            f"{name} keeps parameters as views of flat buckets, which cannot be shortened: make it without "
            "parameters_as_bucket_view and overlap_with_ddp"
        )


def _check_state(optimizer: Optimizer, state: Mapping[Any, Any], names: Mapping[int, str]) -> None:
    for parameter, values in state.items():
        if id(parameter) in names:
            for key, value in values.items():
                _check_value(value, parameter.shape, f"{type(optimizer).__name__} keeps {key!r} of {names[id(parameter)]!r}")


def _check_value(value: object, shape: torch.Size, what: str) -> None:
    """Whether a value of the state of a parameter of this shape can be cut along with it.

    Raises:
        InputError: it cannot.
    """
    if isinstance(value, (list, tuple, dict)) and any(isinstance(v, torch.Tensor) and v.numel() > 1 for v in _leaves(value)):
        raise InputError(
            f"{what} in a {type(value).__name__} of tensors: which of them go with which channels is not known; {_ADVICE}"
        )
    if not isinstance(value, torch.Tensor) or value.dim() == 0 or (value.numel() == 1 and type(value) is torch.Tensor):
        return
    if type(value) not in (torch.Tensor, nn.Parameter) and not hasattr(value, "placements"):
        raise InputError(f"{what} as a {type(value).__name__}, whose numbers cannot be taken out one by one: {_ADVICE}")
    if value.dim() != len(shape) or any(size not in (1, whole) for size, whole in zip(value.shape, shape, strict=True)):
        raise InputError(
            f"{what} with shape {tuple(value.shape)}, and the parameter has {tuple(shape)}: it cannot be cut by the same "
            f"indices; {_ADVICE}"
        )


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _leaves(each)
    else:
        yield value


def cut_states(optimizers: Sequence[Optimizer], cuts: Mapping[int, Cuts]) -> list[Change]:
    """The state of the parameters that get shorter, by the same indices and in the same memory format; numbers are kept.

    Any tensor of the parameter's shape is cut, and any that has 1 in place of some of its sizes (torch's Adafactor). A tensor
    that has the new shape already, because it was loaded first, is kept.

    Raises:
        InputError: a state that fits in no way: names the optimizer, the parameter and the state's key.
    """
    changes: list[Change] = []
    for optimizer in optimizers:
        _check_class(optimizer)
        for parameter, state in _state(optimizer).items():
            cut = cuts.get(id(parameter))
            if cut is None:
                continue
            for key, value in state.items():
                what = f"{type(optimizer).__name__} keeps {key!r} of {cut.name!r}"
                if not (isinstance(value, torch.Tensor) and value.shape == cut.values.shape and type(value) is torch.Tensor):
                    _check_value(value, parameter.shape, what)
                if isinstance(value, torch.Tensor) and value.numel() > 1:
                    changes.append(entry(state, key, _cut(value, parameter.shape, cut)))
    return changes


def _cut(value: torch.Tensor, shape: torch.Size, cut: Cuts) -> torch.Tensor:
    if value.shape != cut.values.shape:
        along = {dim: kept for dim, kept in cut.kept.items() if value.shape[dim] == shape[dim] and shape[dim] > 1}
        value = take(value, along)
    if value.shape != cut.values.shape or value.stride() == cut.values.stride():
        return value
    # Fused optimizers walk through the memory of parameter, gradient and state side by side.
    return torch.empty_like(cut.values, dtype=value.dtype, device=value.device).copy_(value)


def train_new(optimizers: Sequence[Optimizer], model: nn.Module, new: Iterable[tuple[str, nn.Parameter]]) -> list[Change]:
    """Trains new biases like the weight beside them, or like the first group's parameters, in a group that takes parameters of
    their rank; ones that are trained already move to the end of the group.

    Raises:
        InputError: no optimizer can take one.
    """
    groups = [(optimizer, group) for optimizer in optimizers for group in _groups(optimizer)]
    members: dict[int, list[Any]] = {id(group): list(group["params"]) for _, group in groups}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    changes: list[Change] = []
    for name, parameter in new if groups else ():
        sibling = parameters.get(name.removesuffix("bias") + "weight")
        for each in members.values():
            each[:] = [p for p in each if p is not parameter]
        first = next((k for k, (_, g) in enumerate(groups) if any(p is sibling for p in members[id(g)])), 0)
        others = [k for k, (_, g) in enumerate(groups) if k != first and any(map(_is_vector, members[id(g)]))]
        optimizer, group, made = _taking(name, parameter, [groups[k] for k in (first, *others)])
        members[id(group)].append(parameter)
        state = made.state or _fused_state(optimizer, group, parameter, name)
        if state and parameter not in optimizer.state:
            changes.append(entry(optimizer.state, parameter, state))
    changed = [group for _, group in groups if not _same(group["params"], members[id(group)])]
    return changes + [entry(group, "params", members[id(group)]) for group in changed]


def _taking(
    name: str, parameter: nn.Parameter, candidates: Sequence[tuple[Optimizer, dict[str, Any]]]
) -> tuple[Optimizer, dict[str, Any], Trial]:
    """The first group that takes the parameter, as far as a new optimizer of its class shows. (Muon takes matrices only.)"""
    for optimizer, group in candidates:
        if hasattr(optimizer, "_partition_parameters"):  # of ZeroRedundancyOptimizer: which rank has which parameter
            raise InputError(
                f"compensation adds the bias {name!r}, and a {type(optimizer).__name__} takes no new parameters without "
                "spreading all of them over the ranks anew: leave out `compensation`, or give layers a bias"
            )
        takes = trial(optimizer, group, parameter.detach().flatten(), step=False).parameter is not None
        unknown = not takes and all(trial(optimizer, group, p, step=False).parameter is None for p in group["params"][:1])
        if takes or (unknown and (len(candidates) == 1 or any(map(_is_vector, group["params"])))):
            return optimizer, group, trial(optimizer, group, parameter, step=False)
    kinds = ", ".join(dict.fromkeys(type(optimizer).__name__ for optimizer, _ in candidates))
    raise InputError(
        f"compensation adds the bias {name!r}, which {kinds} cannot train: give another optimizer for biases beside it, or "
        "leave out `compensation`"
    )


def _fused_state(optimizer: Optimizer, group: Mapping[str, Any], parameter: nn.Parameter, name: str) -> dict[str, Any]:
    """Fused SGD wants momenta of all parameters of a group or of none. Zeros are what a first step without dampening means."""
    if not isinstance(optimizer, torch.optim.SGD) or not group.get("fused") or not group.get("momentum"):
        return {}
    if not any(optimizer.state.get(p, {}).get("momentum_buffer") is not None for p in group["params"]):
        return {}
    if group.get("dampening"):
        raise InputError(
            f"compensation adds the bias {name!r}, and fused SGD with dampening cannot begin its momentum later than that of the "
            "others: make the optimizer with fused=False or dampening=0"
        )
    return {"momentum_buffer": torch.zeros_like(parameter)}


def _is_vector(parameter: torch.Tensor) -> bool:
    """Whether it is a bias or of a norm: one number a channel."""
    return parameter.numel() == max(parameter.shape, default=1)


def _same(first: Sequence[Any], second: Sequence[Any]) -> bool:
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))


def _groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    return list(getattr(optimizer, "param_groups", ()))


def _parameters(optimizer: Optimizer) -> Iterator[Any]:
    for group in _groups(optimizer):
        yield from group["params"]


def _state(optimizer: Optimizer) -> Mapping[Any, Any]:
    found = getattr(optimizer, "state", {})
    return found if isinstance(found, Mapping) else {}
