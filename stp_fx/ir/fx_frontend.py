"""The first front end: the model's own Python traced with proxies; see :mod:`stp_fx.ir.tracer`."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from torch import fx, nn

from stp_fx.errors import TraceError
from stp_fx.ir.batch import bakes_batch, batches_for, free_batch, holds_multiple, same_constants, with_batch
from stp_fx.ir.batch_of_one import allow_one, batch_of_one
from stp_fx.ir.captured import CapturedGraph
from stp_fx.ir.example import described, on_meta
from stp_fx.ir.nested import holds
from stp_fx.ir.provenance import Provenance, attach_provenance
from stp_fx.ir.root_hooks import backward_hooks
from stp_fx.ir.stored import count_batches, store_as_model, unreached
from stp_fx.ir.tracer import ModuleTracer
from stp_fx.ir.train_eval import mode_calls, modes_kept, switch_modes

__all__ = ["OWN_BATCH", "capture_with_fx"]

_log = logging.getLogger(__name__)
OWN_BATCH = "the model was traced with the example's own batch size, which it may depend on"
"""A note of such graphs."""


@dataclasses.dataclass(frozen=True)
class _Example:
    """``values`` are the tensors on the meta device, which become inputs; ``constants`` is baked in; ``named`` came by name."""

    values: dict[str, Any]
    constants: dict[str, Any]
    named: frozenset[str]


def capture_with_fx(model: nn.Module, arguments: dict[str, Any], named: frozenset[str]) -> fx.GraphModule:
    """A GraphModule over the model's own modules, parameters and buffers, with its recorded example.

    ``arguments`` are those of ``forward`` by parameter name, ``named`` the ones that were given by name.

    Raises:
        TraceError: the model's code cannot be traced.
    """
    values = {name: on_meta(value) for name, value in arguments.items() if holds(torch.Tensor, value)}
    constants = {name: value for name, value in arguments.items() if name not in values}
    example = _Example(values, constants, named)
    notes: tuple[str, ...] = ()
    tracer = _capture_wide(model, example)
    if tracer is None:
        tracer = _capture(model, example)
        notes = (OWN_BATCH,)
    _drop_dead_numbers(tracer.graph)
    calls = _mode_dependent(tracer.graph, model, example)
    gm = _graph_module(tracer, model)
    notes += count_batches(gm, model, model.training)
    if OWN_BATCH in notes:
        _let_one_pass(gm, model, example)
    if calls:
        switch_modes(gm, calls, model.training)
        gm.recompile()
    notes += backward_hooks(model, gm.modules())
    inputs = tuple(values[str(n.target)] for n in gm.graph.nodes if n.op == "placeholder")
    return attach_provenance(gm, Provenance(inputs, notes + _assigned(tracer, model) + unreached(gm, model)))


def _let_one_pass(gm: fx.GraphModule, model: nn.Module, example: _Example) -> None:
    """A graph that was traced with the example's own batch may branch over it, and be the same for a batch of one."""
    one = batch_of_one(example.values)
    if one is None:
        return
    try:
        tracer = _capture(model, dataclasses.replace(example, values=one))
    except TraceError as error:
        _log.debug("%s: no trace with a batch of one: %s", type(model).__name__, error)
        return
    _drop_dead_numbers(tracer.graph)
    allow_one(gm, one, _graph_module(tracer, model))


def _capture_wide(model: nn.Module, example: _Example) -> ModuleTracer | None:
    """A capture whose batch is free; ``None`` if the model cannot run with another batch than its own."""
    batches = batches_for(model, example.values)
    tracer = _capture_with(model, example, batches[0])
    if tracer is None:
        return None
    if not tracer.bakes_batch and not holds_multiple(tracer.graph, batches[0]):
        return tracer
    constants = tracer.lifted()
    tracer.forget_constants()
    other = _capture_with(model, example, batches[1])
    if other is None:
        return None
    alike = same_constants(constants, other.lifted())
    other.forget_constants()
    if not alike or not free_batch(tracer.graph, other.graph, batches):
        return None
    tracer.remember_constants()
    return tracer


def _capture_with(model: nn.Module, example: _Example, batch: int) -> ModuleTracer | None:
    values = with_batch(example.values, batch)
    if values is None:
        return None
    try:
        tracer = _capture(model, dataclasses.replace(example, values=values), batch)
    except TraceError as error:
        _log.debug("a trace with a batch of %d failed, so the example's own is used: %s", batch, error)
        return None
    if tracer.branches_on_batch or bakes_batch(tracer.lifted(), batch):
        tracer.forget_constants()
        return None
    return tracer


def _capture(model: nn.Module, example: _Example, batch: int = 0) -> ModuleTracer:
    tracer = ModuleTracer(model, example.values, example.constants, example.named, batch)
    try:
        tracer.trace(model)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(f"{type(error).__name__}: {error} (traced with {described(example.values)})") from error
    return tracer


def _mode_dependent(graph: fx.Graph, model: nn.Module, example: _Example) -> set[str]:
    """Calls whose ``training`` literal is the model's own flag: functional dropout and the like."""
    calls = mode_calls(graph)
    if not model.training:
        return {name for name, training in calls.items() if not training}
    if not any(calls.values()):
        return set()
    try:
        with modes_kept(model):
            model.eval()
            tracer = _capture(model, example)
            tracer.forget_constants()
            evaluated = mode_calls(tracer.graph)
    except TraceError:
        evaluated = {}
    return {name for name, training in calls.items() if training and evaluated.get(name) is False}


def _drop_dead_numbers(graph: fx.Graph) -> None:
    """Takes out numbers that nobody reads, and the values that tracing needed."""
    for node in reversed(list(graph.nodes)):
        value = node.meta.pop("val", None)
        number = isinstance(value, (int, float, str, torch.Size, torch.dtype, torch.device))
        if number and not node.users and node.op in ("call_function", "call_method"):
            graph.erase_node(node)


def _graph_module(tracer: ModuleTracer, model: nn.Module) -> CapturedGraph:
    tracer.graph.lint()
    gm = CapturedGraph(model, tracer.graph, class_name=type(model).__name__)
    tracer.forget_constants()
    store_as_model(gm, model, tracer.called.values())
    originals = dict(model.named_modules(remove_duplicate=False))
    for name, module in gm.named_modules():
        if name in originals:
            module.training = originals[name].training
    return gm


def _assigned(tracer: ModuleTracer, model: nn.Module) -> tuple[str, ...]:
    if not tracer.assigned:
        return ()
    note = f"the forward assigns to {', '.join(dict.fromkeys(tracer.assigned))}, which the graph does not keep from call to call"
    _log.warning("%s: %s", type(model).__name__, note)
    return (note,)
