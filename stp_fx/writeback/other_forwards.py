"""Other forwards of a class (``forward_split``, ``forward_export``), which exporters put in the place of ``forward``.

They may read numbers that ``forward`` does not, and ``chunk`` in the one is ``split`` by a number in the other.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from stp_fx.errors import WriteBackError
from stp_fx.rewrite.slicing import copied
from stp_fx.writeback.calls import Arguments, call_original, difference
from stp_fx.writeback.check import evaluating
from stp_fx.writeback.obstacles import Failure
from stp_fx.writeback.reads import Watched
from stp_fx.writeback.search import Numbers, find_numbers
from stp_fx.writeback.sizes import Sizes

__all__ = ["numbers_of_other_forwards"]

_log = logging.getLogger(__name__)

Methods = Mapping[str, tuple[str, ...]]
"""By the path of a module: names of methods."""


def numbers_of_other_forwards(
    result: nn.Module, model: nn.Module, sizes: Sizes, settled: set[tuple[str, str]], arguments: Arguments
) -> Numbers:
    """The numbers that other forwards of ``result`` need, where they compute what ``forward`` does in ``model``.

    Those that the forward reads stay as they are. Neither of the two modules is changed. Empty, and logged, if none fit.
    """
    named = {path: names for path, module in model.named_modules() if (names := _other_forwards(module))}
    if not named:
        return {}
    outcome = _compared(copied(model), arguments, named)
    alike = {path: tuple(n for n in names if outcome.get((path, n), "not called") == "") for path, names in named.items()}
    check = _OtherForwards({path: names for path, names in alike.items() if names}, arguments)
    twin = copied(result)
    if check(twin) is None:
        return {}
    watched = Watched(copied(twin))
    _compared(watched.model, arguments, {})
    read = {(h.path, name) for family, name in watched.read() for h in watched.families[family]}
    try:
        return find_numbers(twin, sizes, settled | read, check)
    except WriteBackError as error:
        _log.info("%s: forward is right, another forward is not: %s", type(model).__name__, error)
        return {}


class _OtherForwards:
    """Whether methods give what the forward gives, wherever the model calls the forward."""

    def __init__(self, methods: Methods, arguments: Arguments) -> None:
        self._methods, self._arguments = methods, arguments

    def __call__(self, model: nn.Module) -> Failure | None:
        outcome = _compared(model, self._arguments, self._methods)
        wrong = next((place for place, differs in outcome.items() if differs), None)
        return None if wrong is None else Failure(f"{wrong[1]}: {outcome[wrong]}", wrong[0])

    def explained(self, model: nn.Module, failure: Failure, sizes: Sizes) -> Failure:
        return failure


def _other_forwards(module: nn.Module) -> tuple[str, ...]:
    """The methods of a module's class that are called ``forward_...`` and take what its forward takes."""
    owners = [kind for kind in type(module).__mro__ if not f"{kind.__module__}.".startswith(("torch.", "builtins."))]
    names = dict.fromkeys(name for kind in owners for name, value in vars(kind).items() if inspect.isfunction(value))
    wanted = _parameters(type(module), "forward")
    return tuple(name for name in names if name.startswith("forward_") and _parameters(type(module), name) == wanted)


def _parameters(kind: type, name: str) -> list[tuple[str, Any]]:
    return [(p.name, p.kind) for p in inspect.signature(getattr(kind, name)).parameters.values()]


def _compared(model: nn.Module, arguments: Arguments, methods: Methods) -> dict[tuple[str, str], str]:
    """How what each method gives differs from what the forward gave, for the first call of each module."""
    found: dict[tuple[str, str], str] = {}

    def compare(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], expected: Any) -> None:
        for name in methods[path]:
            if (path, name) not in found:
                try:
                    found[path, name] = difference(expected, getattr(module, name)(*args, **kwargs))
                except Exception as error:
                    found[path, name] = f"{type(error).__name__}: {error}"

    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda module, args, kwargs, out, path=path: compare(path, module, args, kwargs, out), with_kwargs=True
        )
        for path in methods
    ]
    try:
        with evaluating(model):
            call_original(model, arguments)
    finally:
        for handle in handles:
            handle.remove()
    return found
