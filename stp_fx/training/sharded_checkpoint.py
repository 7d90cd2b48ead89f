"""A whole run of a sharded model in one folder, by ``torch.distributed.checkpoint``: another number of ranks can load it."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from stp_fx.errors import FileError, InputError, translated
from stp_fx.measure.distributed import agreed, together
from stp_fx.paths import path_of
from stp_fx.training import checkpoint

__all__ = ["load", "save"]

_RUN = "run.pt"


def save(
    path: Any, model: nn.Module, optimizers: Sequence[Optimizer], manager: Mapping[str, Any], objects: Mapping[str, Any]
) -> None:
    """Writes a folder that appears whole or not at all. To be called on all ranks.

    Raises:
        InputError: an object without state dicts.
        FileError: the folder exists, or cannot be written.
    """
    import torch.distributed.checkpoint as dcp

    folder = Path(path_of(path))
    plain = {"manager": manager, "model": {}, "followers": [], **checkpoint.saved(objects, ())}
    plain["optimizers"] = [_with_state(model, each) for each in optimizers]
    with together("saving a run"):
        if agreed(folder.exists()):
            raise FileError(f"{str(folder)!r} exists; the run of a sharded model is saved in a new folder")
        partial = folder.with_name(f".{folder.name}-{agreed(secrets.token_hex(8))}.tmp")
        try:
            with translated(FileError, lambda said: f"{str(folder)!r} cannot be written: {said}"):
                partial.mkdir(parents=True, exist_ok=True)
                dcp.save(_states(model, optimizers, plain["optimizers"]), checkpoint_id=str(partial))
            checkpoint.write(partial / _RUN, plain)
            if dist.get_rank() == 0:
                with translated(FileError, lambda said: f"{str(folder)!r} cannot be written: {said}"):
                    os.replace(partial, folder)
            agreed(None)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def load(
    path: Any,
    restructured: Callable[[Mapping[str, Any]], nn.Module],
    optimizers: Sequence[Optimizer],
    objects: Mapping[str, Any],
) -> None:
    """Loads what :func:`save` wrote. ``restructured`` is given the manager's state, and gives the model of that structure, which
    ``optimizers`` train from then on. To be called on all ranks.

    Raises:
        FileError: no such folder, or one that :func:`save` has not written.
        InputError: the folder is of another run, model or objects.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as states

    folder = Path(path_of(path))
    found = checkpoint.read(folder / _RUN, objects)
    with_state = found["optimizers"]
    if len(with_state) != len(optimizers):
        raise InputError(f"the folder holds {len(with_state)} optimizers, and the manager has {len(optimizers)}")
    with translated(FileError, lambda said: f"{str(folder)!r} cannot be read: {said}"):
        known = set(dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata)
    model = restructured(found["manager"])
    with together("loading a run"), translated(FileError, lambda said: f"{str(folder)!r} cannot be read: {said}"):
        own = _states(model, optimizers, with_state)
        dcp.load(own, checkpoint_id=str(folder), planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
        lacking = next((name for name in own["model"] if f"model.{name}" not in known), None)
        if lacking is not None:
            raise FileError(f"{str(folder)!r} does not hold {lacking!r}")
        states.set_model_state_dict(model, own["model"])
        names = {id(p): name for name, p in model.named_parameters()}
        for number, each in enumerate(optimizers):
            if with_state[number]:
                states.set_optimizer_state_dict(model, each, own[f"optimizer {number}"])
            for parameter in [p for p in each.state if names.get(id(p)) not in with_state[number]]:
                del each.state[parameter]
    checkpoint.load_others({**found, "optimizers": []}, (), (), objects)


def _with_state(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """The parameters that the optimizer has stepped. (torch makes state for the others when it is asked for the state.)"""
    return [name for name, p in model.named_parameters() if optimizer.state.get(p)]


def _states(model: nn.Module, optimizers: Sequence[Optimizer], with_state: Sequence[Sequence[str]]) -> dict[str, Any]:
    from torch.distributed.checkpoint import state_dict as states

    found: dict[str, Any] = {"model": states.get_model_state_dict(model)}
    for number, each in enumerate(optimizers):
        if with_state[number]:
            found[f"optimizer {number}"] = states.get_optimizer_state_dict(model, each)
    return found
