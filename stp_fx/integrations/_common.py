"""The common parts of the adapters: finding the graph, reading the framework's data late, leaving its random numbers alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from stp_fx.analysis.cost import cost
from stp_fx.errors import InputError
from stp_fx.ir import has_provenance
from stp_fx.training import PATPassManager

__all__ = ["LateBatches", "check_options", "figures", "graph_in", "own_random_numbers"]

_OURS = ("gm", "optimizer", "wrap", "example_inputs")


def check_options(options: Mapping[str, Any]) -> None:
    """Raises InputError for arguments of PATPassManager that come from the framework."""
    for name in _OURS:
        if name in options:
            raise InputError(f"`{name}` comes from the trainer: leave it out")


def graph_in(model: nn.Module, path: str | None) -> fx.GraphModule:
    """The GraphModule of ``stp_fx.trace`` in ``model``: at ``path``, or else the only one.

    Raises:
        InputError: there is none, or several and no path.
    """
    found = {
        name: module for name, module in model.named_modules() if isinstance(module, fx.GraphModule) and has_provenance(module)
    }
    if path is not None:
        if path not in found:
            known = ", ".join(map(repr, found)) or "none"
            raise InputError(f"{type(model).__name__} has no GraphModule of stp_fx.trace at {path!r}; there are: {known}")
        return found[path]
    outermost = [name for name in found if not any(other != name and _inside(name, other) for other in found)]
    if len(outermost) != 1:
        known = f"several: {', '.join(map(repr, outermost))}; say which by `model=`" if found else "none"
        raise InputError(
            f"{type(model).__name__} should hold a GraphModule made by stp_fx.trace(model, example_inputs), as an attribute; "
            f"it has {known}"
        )
    return found[outermost[0]]


def _inside(name: str, other: str) -> bool:
    return not other or name.startswith(f"{other}.")


def figures(manager: PATPassManager) -> dict[str, float]:
    """The logged numbers: MACs and parameters of the graph as it is now (masked units do not count), and the steps taken."""
    now = cost(manager.model)
    return {"pat/macs": float(now.macs), "pat/params": float(now.params), "pat/step": float(manager.taken)}


class LateBatches:
    """The batches of a loader that is asked for when it is read."""

    def __init__(self, loader: Callable[[], Iterable[Any] | None]) -> None:
        self._loader = loader

    def _found(self) -> Iterable[Any]:
        loader = self._loader()
        if loader is None:
            raise InputError(
                "the trainer has no training data to read for the criterion or the compensation: give `train_loader`"
            )
        return loader

    def __iter__(self) -> Iterator[Any]:
        return iter(_undisturbed(self._found()))

    def __len__(self) -> int:
        return len(self._found())  # type: ignore[arg-type]


def _undisturbed(loader: Iterable[Any]) -> Iterable[Any]:
    """A twin of a DataLoader whose iteration does not end the one that the trainer may have begun."""
    loader = getattr(loader, "base_dataloader", loader)  # Accelerate's counts iterations, and is told when one is under way
    if not isinstance(loader, torch.utils.data.DataLoader) or not loader.persistent_workers:
        return loader
    twin = object.__new__(type(loader))
    twin.__dict__.update({**loader.__dict__, "persistent_workers": False, "_iterator": None})
    return twin


@contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """Random numbers from ``seed`` inside, and outside as if nothing had been drawn: a pruning step that reads shuffled data
    reads the same in a resumed run, and the training after it draws what it would have drawn."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
