"""Pruning a part of a model that no front end captures whole: the backbone of a detector, an encoder in a loop."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from typing_extensions import Unpack

from stp_fx.api import prune_graph, trace
from stp_fx.checks import arguments_by_name, is_a, shown
from stp_fx.criteria import Criterion
from stp_fx.errors import InputError, translated
from stp_fx.ir.example import by_name
from stp_fx.ir.validation import Validate
from stp_fx.measure.calibration import reiterable
from stp_fx.measure.gradients import Loss
from stp_fx.passes.compensations import CompensationName
from stp_fx.selection.selection import SelectionOptions, takes_selection
from stp_fx.typed import modules_of

__all__ = ["prune_submodule"]


class _Arrived(Exception):
    """The submodule has been called: there is no need to run the rest of the model."""


@takes_selection("ratio")
def prune_submodule(
    model: nn.Module,
    name: str,
    example_inputs: Any,
    criterion: str | Criterion = "magnitude",
    ratio: float = 0.5,
    *,
    kwargs: Mapping[str, Any] | None = None,
    frontend: str = "auto",
    calibration: Iterable[Any] | None = None,
    compensation: CompensationName | None = None,
    recalibrate: int | bool | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    validate: Validate = "auto",
    **options: Unpack[SelectionOptions],
) -> nn.Module:
    """A copy of ``model`` in which the submodule ``name`` is a pruned GraphModule; ``model`` is not changed.

    The model is run on the example, in eval mode and without gradients, up to the first call of the submodule, which is then
    traced with the arguments of that call. Its inputs and outputs keep their channels, so the rest of the model fits.

    Args:
        model: any module; only the submodule has to be traceable.
        name: as in ``model.get_submodule``.
        example_inputs: inputs of the *model*: one argument, or a tuple of them; ``kwargs`` the named ones.
        calibration: inputs of the model, one batch after another, for criteria and compensation that read data.
        frontend: as for :func:`stp_fx.trace`.
        compensation, recalibrate, loss, seed, validate: as for :func:`stp_fx.prune_graph`.
        options: the fields of :class:`stp_fx.Selection` but for ``ratio``.

    Raises:
        InputError: no such submodule, or the model does not call it on the example.
        TraceError: the submodule cannot be captured.
        NothingToPruneError: no channel inside may be removed.
    """
    if not is_a(model, nn.Module):
        raise InputError(f"`model` is a {type(model).__name__}; give a torch.nn.Module")
    if not is_a(name, str) or not name or all(name != known for known, _ in modules_of(model)):
        known = ", ".join(repr(child) for child, _ in model.named_children())
        raise InputError(f"the model has no submodule {shown(name)}; its parts are {known}")
    positional, named = _given(model, name, *by_name(model, example_inputs, arguments_by_name(kwargs)))
    submodule = model.get_submodule(name)
    flags = {module: module.training for module in submodule.modules()}
    graph = trace(submodule, positional, kwargs=named, frontend=frontend, validate=validate)
    batches = None if calibration is None else _Inside(model, name, reiterable(calibration), graph)
    pruned = prune_graph(
        graph,
        criterion,
        ratio,
        calibration=batches,
        compensation=compensation,
        recalibrate=recalibrate,
        loss=loss,
        seed=seed,
        validate=validate,
        **options,
    )
    return _replaced(model, name, pruned, flags)


def _replaced(model: nn.Module, name: str, pruned: nn.Module, flags: Mapping[nn.Module, bool]) -> nn.Module:
    """A copy of ``model`` with ``pruned`` in place of a submodule, whose train/eval ``flags`` are put back."""
    for module, training in flags.items():
        module.training = training
    result = copy.deepcopy(model, {id(model.get_submodule(name)): pruned})
    result.set_submodule(name, pruned)
    return result


def _given(model: nn.Module, name: str, inputs: Any, kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the first call of the submodule."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def look(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append((args, named))
        raise _Arrived

    flags = [(module, module.training) for module in model.modules()]
    handle = model.get_submodule(name).register_forward_pre_hook(look, with_kwargs=True)

    def failed(said: str) -> str:
        advice = "Give an example that model(*example_inputs, **kwargs) takes"
        return f"{type(model).__name__} itself fails before it calls {name!r}: {said[:300]}. {advice}"

    try:
        with torch.no_grad(), translated(InputError, failed), contextlib.suppress(_Arrived):
            model.eval()(*(inputs if isinstance(inputs, tuple) else (inputs,)), **kwargs)
    finally:
        handle.remove()
        for module, training in flags:
            module.training = training
    if found:
        return found[0]
    raise InputError(f"the model does not call {name!r} on the example inputs")


class _Inside:
    """Batches of the model as batches of its submodule, each time they are read."""

    def __init__(self, model: nn.Module, name: str, batches: Iterable[Any], graph: fx.GraphModule) -> None:
        self._model, self._name, self._batches = model, name, batches
        self._inputs = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for batch in self._batches:
            positional, named = _given(self._model, self._name, batch, {})
            yield (*positional, *(named[key] for key in self._inputs if key in named))
