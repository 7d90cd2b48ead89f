"""Optimizers beside a model in shards that is made anew: their parameters are replaced, and their state is cut and sharded."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from stp_fx.errors import InputError
from stp_fx.ir.sharded import local_part
from stp_fx.rewrite.slicing import take
from stp_fx.training.commit import Change
from stp_fx.training.shards import whole_tensor

__all__ = ["moved_states", "replaced"]

Pairs = Mapping[int, tuple[str, Any, Any]]
"""By ``id`` of a parameter: its name, itself, and the one that takes its place."""


def moved_states(optimizers: Sequence[Optimizer], pairs: Pairs, kept: Mapping[str, Mapping[int, np.ndarray]]) -> list[Change]:
    """Gives the state of each parameter to the one that takes its place: tensors of its shape are cut as it is and placed alike,
    numbers are kept. One tensor is gathered at a time, and only where the shape or the place changes.

    Raises:
        InputError: a state of another shape: names the optimizer, the parameter and the state's key.
    """
    changes: list[Change] = []
    for optimizer in optimizers:
        for old, state in list(getattr(optimizer, "state", {}).items()):
            if id(old) not in pairs:
                continue
            name, _, new = pairs[id(old)]
            what = f"{type(optimizer).__name__} keeps {{!r}} of {name!r}"
            moved = {key: _moved(value, old, new, kept.get(name, {}), what.format(key)) for key, value in state.items()}
            changes.append(_entry_moved(optimizer.state, old, new, moved))
    return changes


def _moved(value: Any, old: Any, new: Any, kept: Mapping[int, np.ndarray], what: str) -> Any:
    if not isinstance(value, torch.Tensor) or (value.numel() <= 1 and value.shape != old.shape):
        return value
    if value.shape != old.shape:
        raise InputError(
            f"{what} with shape {tuple(value.shape)}, and the parameter has {tuple(old.shape)}: of a sharded model only state of "
            "the parameter's shape follows; give an optimizer such as SGD, Adam or AdamW"
        )
    if old.shape == new.shape and _place(value) == _place(new):
        return value
    whole = whole_tensor(value)
    cut = whole if whole.shape == new.shape else take(whole, kept)
    if not hasattr(new, "placements"):
        return cut
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local_part(cut, new).clone(), new.device_mesh, new.placements, run_check=False, shape=cut.shape, stride=cut.stride()
    )


def _place(tensor: Any) -> tuple[Any, Any]:
    return getattr(tensor, "device_mesh", None), getattr(tensor, "placements", None)


def _entry_moved(state: MutableMapping[Any, Any], old: Any, new: Any, moved: dict[str, Any]) -> Change:
    before = state[old]

    def make() -> None:
        state[new] = moved
        state.pop(old, None)

    def undo() -> None:
        state[old] = before
        state.pop(new, None)

    return Change(make, undo)


def replaced(optimizers: Sequence[Optimizer], pairs: Pairs) -> list[Change]:
    """Puts the new parameters into the groups."""
    back = {id(new): old for _, old, new in pairs.values()}

    def into(group: MutableMapping[str, Any], forward: bool) -> None:
        if forward:
            group["params"] = [pairs[id(p)][2] if id(p) in pairs else p for p in group["params"]]
        else:
            group["params"] = [back.get(id(p), p) for p in group["params"]]

    return [
        Change(lambda group=group: into(group, True), lambda group=group: into(group, False))
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
