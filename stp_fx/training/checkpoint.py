"""A whole run in one file: structure, weights, optimizers, followers, random states, and whatever else the loop has."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from stp_fx.checks import is_a, shown
from stp_fx.errors import FileError, InputError, translated
from stp_fx.measure.distributed import several_processes
from stp_fx.paths import path_of, replacing

__all__ = ["check_fits", "load_others", "read", "saved", "write"]

_FORMAT = "stp_fx.pat"
_PARTS = ("manager", "model", "optimizers", "followers", "others", "random")


def saved(objects: Mapping[str, Any], optimizers: Sequence[Any]) -> dict[str, Any]:
    """The states of the loop's ``objects`` (a scheduler, a GradScaler) and of its optimizers. On all ranks.

    Raises:
        InputError: an object without ``state_dict`` and ``load_state_dict``.
    """
    for name, each in objects.items():
        if not (callable(getattr(each, "state_dict", None)) and callable(getattr(each, "load_state_dict", None))):
            raise InputError(f"`{name}` is {shown(each)}; give an object with state_dict and load_state_dict")
    for each in optimizers:
        if hasattr(each, "consolidate_state_dict"):  # ZeroRedundancyOptimizer: every rank has a part
            each.consolidate_state_dict(to=0)
    here = not several_processes() or dist.get_rank() == 0
    return {
        "others": {name: each.state_dict() for name, each in objects.items()},
        "optimizers": [each.state_dict() for each in optimizers] if here else [],
    }


def write(path: Any, parts: Mapping[str, Any]) -> None:
    """Writes the parts and every rank's random states: rank 0 to a file that is whole or not there, the others wait.

    Raises:
        FileError: it cannot be written; on all ranks.
    """
    name = path_of(path)
    states: list[Any] = [_random()]
    problem: list[str | None] = [None]
    if several_processes():
        states = [None] * dist.get_world_size()
        dist.all_gather_object(states, _random())
    if not several_processes() or dist.get_rank() == 0:
        try:
            with replacing(name) as partial:
                torch.save({"format": _FORMAT, "version": 1, **parts, "random": states}, partial)
        except FileError as error:
            problem = [str(error)]
    if several_processes():
        dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise FileError(problem[0])


def read(path: Any, objects: Mapping[str, Any]) -> dict[str, Any]:
    """The contents that :func:`write` wrote; ``objects``: the objects to load the others into.

    Raises:
        FileError: no such file, a damaged one, or one that was not written by a manager.
        InputError: the file holds others than ``objects``.
    """
    name = path_of(path)
    if not os.path.isfile(name):
        raise FileError(f"there is no file {name!r}: give one that PATPassManager.save wrote")
    with translated(FileError, lambda said: f"{name!r} is damaged, or was not written by PATPassManager.save: {said}"):
        found = torch.load(name, map_location="cpu", weights_only=True)
    if not is_a(found, Mapping) or found.get("format") != _FORMAT or any(part not in found for part in _PARTS):
        raise FileError(f"{name!r} was not written by PATPassManager.save")
    if found["version"] != 1:
        raise FileError(f"{name!r} is of version {shown(found['version'])}, and this is version 1")
    there, given = sorted(found["others"]), sorted(objects)
    if there != given:
        raise InputError(f"{name!r} holds, beside the run, {_names(there)}; to load into were given {_names(given)}")
    return dict(found)


def _names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "nothing"


def check_fits(module: nn.Module, state: Mapping[str, Any], what: str) -> None:
    """Refuses the state of a module of other names or shapes.

    Raises:
        InputError: names the first tensor.
    """
    own = module.state_dict()
    for name in (*own, *state):
        shapes = [tuple(t[name].shape) if isinstance(t.get(name), torch.Tensor) else None for t in (own, state)]
        if (name in own) != (name in state) or shapes[0] != shapes[1]:
            raise InputError(f"the state of the {what} does not fit: {name!r} has shape {shapes[1]}, and {shapes[0]} here")


def load_others(
    found: Mapping[str, Any], followers: Sequence[nn.Module], optimizers: Sequence[Any], objects: Mapping[str, Any]
) -> None:
    """Loads all but the manager and its model, the random states last.

    Raises:
        InputError: not as many followers or optimizers as were saved, or a state that one of them refuses.
    """
    for what, given in (("followers", followers), ("optimizers", optimizers)):
        if len(found[what]) != len(given):
            raise InputError(f"the file holds {len(found[what])} {what}, and the manager has {len(given)}")
        for number, (each, state) in enumerate(zip(given, found[what], strict=True)):
            with translated(InputError, lambda said, what=what, number=number: f"number {number} of the {what}: {said}"):
                each.load_state_dict(state)
    for name, each in objects.items():
        with translated(InputError, lambda said, name=name: f"`{name}` does not take the state that was saved: {said}"):
            each.load_state_dict(found["others"][name])
    _load_random(found["random"])


def _random() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }


def _load_random(states: Sequence[Mapping[str, Any]]) -> None:
    """Gives this rank the random states that it had; of more ranks than there were, those beyond keep their own."""
    rank = dist.get_rank() if several_processes() else 0
    if rank >= len(states):
        return
    state = states[rank]
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(list(state["cuda"]))
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
