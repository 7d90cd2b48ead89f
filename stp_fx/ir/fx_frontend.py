"""The first front end: the model's own Python traced with proxies; see :mod:`stp_fx.ir.tracer`."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from torch import fx, nn

from stp_fx.errors import InputError, TraceError
from stp_fx.ir.batch import bakes_batch, batches_for, free_batch, holds_multiple, same_constants, with_batch
from stp_fx.ir.batch_of_one import allow_one, batch_of_one
from stp_fx.ir.captured import CapturedGraph
from stp_fx.ir.constant_inputs import constant_inputs
from stp_fx.ir.example import described, on_meta
from stp_fx.ir.join import joined
from stp_fx.ir.nested import holds
from stp_fx.ir.provenance import Provenance, attach_provenance, with_provenance
from stp_fx.ir.random_ops import RealDraws, drawn_from, frozen_draws, generator_states
from stp_fx.ir.root_hooks import backward_hooks
from stp_fx.ir.stored import assigned, count_batches, store_as_model, unreached
from stp_fx.ir.tracer import ModuleTracer
from stp_fx.ir.train_eval import in_mode, one_sided, take_flags

__all__ = ["OWN_BATCH", "capture_with_fx"]

_log = logging.getLogger(__name__)
OWN_BATCH = "the model was traced with the example's own batch size, which it may depend on"
"""A note of such graphs."""


@dataclasses.dataclass(frozen=True)
class _Example:
    """``values`` are the tensors on the meta device, which become inputs; ``constants`` is baked in; ``named`` came by name.

    ``taken``: see :func:`constant_inputs`. ``given``: the whole numbers among the tensors, such as lengths, which may be read.
    """

    values: dict[str, Any]
    constants: dict[str, Any]
    named: frozenset[str]
    taken: dict[str, bool]
    given: dict[str, torch.Tensor]


def capture_with_fx(model: nn.Module, arguments: dict[str, Any], named: frozenset[str]) -> fx.GraphModule:
    """A GraphModule over the model's own modules, parameters and buffers, with its recorded example.

    Code that asks whether it trains is traced in training and in evaluation, and both become one graph.

    ``arguments`` are those of ``forward`` by parameter name, ``named`` the ones that were given by name.

    Raises:
        TraceError: the model's code cannot be traced.
    """
    values = {name: on_meta(value) for name, value in arguments.items() if holds(torch.Tensor, value)}
    constants = {name: value for name, value in arguments.items() if name not in values}
    given = {name: v for name, v in arguments.items() if isinstance(v, torch.Tensor) and not v.is_meta and _is_whole(v)}
    example = _Example(values, constants, named, constant_inputs(arguments, named), given)
    first = _one_mode(model, example)
    other, reason = _other_mode(model, example, first) if first.asked else (None, "")
    gm, notes = first.gm, first.notes
    if other is None:
        notes += count_batches(gm, model, model.training)
        notes += (one_sided(gm, model, reason),) if first.asked else ()
    else:
        trained, evaluated = (gm, other.gm) if model.training else (other.gm, gm)
        count_batches(trained, model, True)
        gm = joined(trained, evaluated, model)
        notes = tuple(dict.fromkeys((*notes, *other.notes)))
    return with_provenance(gm, notes=notes + backward_hooks(model, gm.modules()) + unreached(gm, model))


def _is_whole(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _other_mode(model: nn.Module, example: _Example, given: _Capture) -> tuple[_Capture | None, str]:
    """The capture of the mode that the model is not in; or why there is none."""
    try:
        with in_mode(model, not model.training):
            other = _one_mode(model, example)
    except TraceError as error:
        return None, str(error)
    if other.drew and not given.drew:  # what is dropped would be the same at every step
        return None, other.notes[-1]
    return other, ""


@dataclasses.dataclass
class _Capture:
    """The graph of one mode. ``asked``: the code has read ``training``; ``drew``: it drew numbers that the graph has frozen."""

    gm: CapturedGraph
    notes: tuple[str, ...]
    asked: bool
    drew: bool


def _one_mode(model: nn.Module, example: _Example) -> _Capture:
    """The graph of the mode that the model is in."""
    before = generator_states()
    tracer, bound = _traced(model, example)
    changed = drawn_from(before)
    if changed - tracer.draws:  # by functions that the code had under names of its own, or by another thread: once more
        tracer.forget_constants()
        before = generator_states()
        with RealDraws() as drawn:
            tracer, bound = _traced(model, example)
        tracer.draws |= (changed & drawn_from(before)) - {"torch"} | ({"torch"} if drawn.seen else set())
    _drop_dead_numbers(tracer.graph)
    gm = _graph_module(tracer, model)
    if bound:
        _let_one_pass(gm, model, example)
    every = example.constants | example.values
    names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    inputs = tuple(every[name] for name in names)
    read = {k: example.given[name] for k, name in enumerate(names) if name in tracer.read}
    attach_provenance(gm, Provenance(inputs, read=read))
    notes = ((OWN_BATCH,) if bound else ()) + assigned(tracer.assigned) + frozen_draws(tracer.draws) + tuple(tracer.remarks)
    return _Capture(gm, notes, tracer.asks_mode, bool(tracer.draws))


def _traced(model: nn.Module, example: _Example) -> tuple[ModuleTracer, bool]:
    """A trace, and whether it is bound to the example's own batch."""
    tracer = _capture_wide(model, example)
    return (_capture(model, example), True) if tracer is None else (tracer, False)


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
    tracer = ModuleTracer(model, example.values, example.constants, example.named, example.taken, batch)
    tracer.given = example.given
    try:
        tracer.trace(model)
    except (TraceError, InputError):
        raise
    except Exception as error:
        raise TraceError(f"{type(error).__name__}: {error} (traced with {described(example.values)})") from error
    return tracer


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
    take_flags(gm, model)
    return gm
