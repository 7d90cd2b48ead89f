"""Front ends: from a module and an example to a GraphModule with the example's shapes recorded."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from stp_fx.errors import InputError, TraceError, VerificationError
from stp_fx.ir.base_tracer import ReplayTracer
from stp_fx.ir.batch import BATCH, bakes_batch, free_batch, with_batch
from stp_fx.ir.batch_of_one import allow_one, batch_of_one
from stp_fx.ir.call import Call, call_of, restored
from stp_fx.ir.captured import CapturedGraph
from stp_fx.ir.examples import Example, example_of_call
from stp_fx.ir.export import capture_with_export
from stp_fx.ir.kept import state_kept
from stp_fx.ir.meta_run import MetaRun
from stp_fx.ir.nested import holds, mapped
from stp_fx.ir.patches import LOCK
from stp_fx.ir.provenance import Provenance, attach_provenance, example_of, provenance_of, with_provenance
from stp_fx.ir.runner import run_graph
from stp_fx.ir.shapes import meta_like, meta_twin
from stp_fx.ir.stored import count_batches, store_as_model
from stp_fx.ir.tracer import ModuleTracer
from stp_fx.ir.train_eval import mode_calls, modes_kept, switch_modes
from stp_fx.ir.validate import validate_capture
from stp_fx.ir.validation import Budget, Validate
from stp_fx.ir.verify import verify

__all__ = ["bound_arguments", "retrace", "trace"]

_log = logging.getLogger(__name__)
_OWN_BATCH = "the model was traced with the example's own batch size, which it may depend on"


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    kwargs: Mapping[str, Any] | None = None,
    frontend: str = "auto",
    validate: Validate = "auto",
) -> fx.GraphModule:
    """Captures ``model`` as a GraphModule and records the example's shapes on it.

    The graph shares the model's parameters, buffers and submodules (as ``torch.fx`` does) and keeps their names, hooks and
    train/eval flags; branches on ``self.training`` are taken as the model stands. Batch and spatial sizes stay free wherever
    the model's own code leaves them free.

    The capture is checked: model and graph are run, and what they give is compared (:class:`Validation`, in the provenance of the
    graph). Nothing that these runs write stays: buffers, modes and random state are put back.

    Args:
        example_inputs: a tensor or a tuple of positional arguments. The capture reads shapes and dtypes alone; the check runs on
            the values, or on random ones if there are none (meta tensors, not finite, all the same).
        kwargs: arguments by name. Values that hold no tensor are baked in.
        frontend: "fx", "export" (``torch.export``, which takes sizes of 1 for constants and asserts that others are at least 2),
            or "auto" for the first of the two that succeeds, leaves the batch free and computes what the model computes.
        validate: "auto" runs model and graph on the example in eval and train mode, with another batch and in another size, in at
            most eight forward passes and 30 seconds; True whatever it takes, a number for at most that many seconds, False not
            at all. A difference in the mode that the model is in is an error; in the other mode it is logged and recorded.

    Raises:
        InputError: missing or unfitting example inputs, an unknown front end, uninitialised lazy modules.
        TraceError: the model's Python code cannot be captured, or the graph computes something else; says where.
    """
    budget = Budget(validate)
    if not isinstance(model, nn.Module):
        raise InputError(f"`model` is a {type(model).__name__}; give a torch.nn.Module")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise InputError(f"`model` is wrapped in {type(model).__name__}: give the module in it, `model.module`")
    compiled = next((name or "model" for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if compiled is not None:
        raise InputError(f"{compiled!r} is a TorchScript module, which shows no Python to capture: give the original module")
    if frontend != "auto" and frontend not in _FRONT_ENDS:
        raise InputError(f"unknown front end {frontend!r}; known: auto, {', '.join(_FRONT_ENDS)}")
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise InputError(f"{lazy[0]!r} is not initialised yet (a lazy module): run one batch through the model first")
    with LOCK, state_kept():
        arguments = bound_arguments(model, example_inputs, kwargs or {})
        example = example_of_call(example_inputs, kwargs or {})
        gm = _first_capture(model, arguments, frontend, lambda gm: _validated(model, gm, example, budget))
    return with_provenance(gm, call=call_of(model, example_inputs, kwargs or {}, provenance_of(gm).frontend))


def retrace(model: nn.Module, call: Call) -> fx.GraphModule:
    """Captures ``model`` as another of the same architecture was captured; its modes are put back afterwards.

    Raises:
        InputError: the example could not be recorded, or does not fit ``model``.
        TraceError: the model cannot be captured.
    """
    if call.args is None or call.kwargs is None:
        raise InputError("the example could not be recorded: give stp_fx.trace(model, example_inputs) in place of the model")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in call.other:
        if name not in modules:
            raise InputError(f"{type(model).__name__} has no module {name!r}, whose mode was recorded")
    # torch.export wants tensors beside the parameters; it reads shapes and dtypes only
    place = next((p.device for p in model.parameters()), torch.device("cpu")) if call.frontend == "export" else "meta"
    args, kwargs = (restored(data, torch.device(place)) for data in (call.args, call.kwargs))
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise InputError("a recorded call is a tuple of arguments and a dict of named ones")
    with LOCK, modes_kept(model):
        for module in model.modules():
            module.training = call.training
        for name in call.other:
            modules[name].training = not call.training
        return trace(model, args, kwargs=kwargs, frontend=call.frontend, validate=False)


def _first_capture(
    model: nn.Module, arguments: dict[str, Any], frontend: str, checked: Callable[[fx.GraphModule], fx.GraphModule]
) -> fx.GraphModule:
    said: dict[str, TraceError] = {}
    for gm in _captures(model, arguments, frontend, said):
        try:
            return checked(gm)
        except TraceError as error:
            said[provenance_of(gm).frontend] = error
    told = "; ".join(f"{name}: {error}" for name, error in said.items())
    raise TraceError(
        f"{type(model).__name__} cannot be captured. {told}. Prune a submodule that can be, or keep the part in "
        "question outside of what is pruned"
    ) from [*said.values(), None][-2]


def _captures(
    model: nn.Module, arguments: dict[str, Any], frontend: str, said: dict[str, TraceError]
) -> Iterator[fx.GraphModule]:
    """Captures by one front end after the other, the best first; those that are not asked for are not made."""
    bound: fx.GraphModule | None = None
    for name in _FRONT_ENDS if frontend == "auto" else [frontend]:
        try:
            gm = _record_arguments(_FRONT_ENDS[name](model, arguments), arguments)
        except TraceError as error:
            said[name] = error
            continue
        suspect = bound is not None or _OWN_BATCH in provenance_of(gm).notes
        if frontend != "auto" or not suspect or _takes_another_batch(gm):
            yield gm
            continue
        bound = gm if bound is None else bound
        _log.debug("%s: the graph of %s is bound to the example's batch", type(model).__name__, name)
    if bound is not None:
        yield bound


def _validated(model: nn.Module, gm: fx.GraphModule, example: Example, budget: Budget) -> fx.GraphModule:
    """The graph with what was checked in its provenance.

    Raises:
        TraceError: it computes something else than the model.
    """
    if budget.off:
        return gm
    budget.again()
    bound = _OWN_BATCH in provenance_of(gm).notes and not _takes_another_batch(gm)
    by_name = functools.partial(bound_arguments, model)
    found, difference = validate_capture(model, gm, example, by_name, budget, bound=bound)
    if difference is not None:
        raise TraceError(f"the graph computes something else than the model ({difference}); validate=False keeps it as it is")
    notes = tuple(f"in {mode} mode the graph differs: {text}" for mode, text in found.differs.items())
    return with_provenance(gm, validation=found, notes=provenance_of(gm).notes + notes)


def bound_arguments(model: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by parameter name of ``forward``; spread ones are numbered.

    Raises:
        InputError: no example, or not what ``forward`` takes.
    """
    if example_inputs is None and not kwargs:
        raise InputError(f"example_inputs is missing: give a tensor or a tuple of what {type(model).__name__}.forward takes")
    positional = () if example_inputs is None else example_inputs
    if isinstance(positional, list):
        positional = tuple(positional)
    if not isinstance(positional, tuple):
        positional = (positional,)
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*positional, **kwargs)
    except TypeError as error:
        raise InputError(f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}") from error
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            arguments.update({f"{name}_{k}": each for k, each in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        else:
            arguments[name] = value
    if not any(_has_tensor(value) for value in arguments.values()):
        raise InputError("example_inputs hold no tensor, so there is nothing to trace with")
    return arguments


def _record_arguments(gm: fx.GraphModule, arguments: dict[str, Any]) -> fx.GraphModule:
    plain = {name: _has_tensor(value) or _is_plain(value) for name, value in arguments.items()}
    known = {name: _on_meta(value) for name, value in arguments.items() if plain[name]}
    return with_provenance(gm, arguments=known, lost=tuple(name for name, kept in plain.items() if not kept))


def _is_plain(value: Any) -> bool:
    """Whether a value can stay on the graph: it is copied, pickled and compared like a number."""
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(_is_plain(v) for v in value)
    if isinstance(value, dict):
        return all(_is_plain(v) for v in value.values())
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


def _trace_with_fx(model: nn.Module, arguments: dict[str, Any]) -> fx.GraphModule:
    values = {name: _on_meta(value) for name, value in arguments.items() if _has_tensor(value)}
    constants = {name: value for name, value in arguments.items() if not _has_tensor(value)}
    notes: tuple[str, ...] = ()
    wide = with_batch(values, BATCH)
    tracer = None if wide is None else _capture_wide(model, wide, constants)
    if tracer is None:
        tracer, wide = _capture(model, values, constants), values
        notes = (_OWN_BATCH,)
    _drop_dead_numbers(tracer.graph)
    calls = _mode_dependent(tracer.graph, model, wide or values, constants)
    gm = _graph_module(tracer, model)
    notes += count_batches(gm, model, model.training)
    if notes:
        _let_one_pass(gm, model, values, constants)
    if calls:
        switch_modes(gm, calls, model.training)
        gm.recompile()
    inputs = tuple(values[str(n.target)] for n in gm.graph.nodes if n.op == "placeholder")
    return attach_provenance(gm, Provenance(inputs, notes + _assigned(tracer, model) + _unreached(gm, model)))


def _let_one_pass(gm: fx.GraphModule, model: nn.Module, values: dict[str, Any], constants: dict[str, Any]) -> None:
    """A graph that was traced with the example's own batch may branch over it, and be the same for a batch of one."""
    one = batch_of_one(values)
    if one is None:
        return
    try:
        tracer = _capture(model, one, constants)
    except TraceError as error:
        _log.debug("%s: no trace with a batch of one: %s", type(model).__name__, error)
        return
    _drop_dead_numbers(tracer.graph)
    allow_one(gm, one, _graph_module(tracer, model))


def _trace_with_export(model: nn.Module, arguments: dict[str, Any]) -> fx.GraphModule:
    spread = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind is p.VAR_POSITIONAL]
    if any(name.startswith(f"{each}_") for each in spread for name in arguments):
        raise TraceError(f"arguments spread over *{spread[0]} are not supported here")
    gm = capture_with_export(model, arguments)
    values = {name: _on_meta(value) for name, value in arguments.items() if _has_tensor(value)}
    places = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    missing = [name for name in places if name not in values]
    if missing:
        raise TraceError(f"its input {missing[0]!r} is nested or no tensor; give tensors by name")
    gm.graph._tracer_cls = ReplayTracer
    attach_provenance(gm, Provenance(tuple(values[name] for name in places), _unreached(gm, model), frontend="export"))
    try:
        verify(gm)
    except VerificationError as error:
        raise TraceError(f"what torch.export gives cannot be analysed: {error}") from error
    return gm


def _takes_another_batch(gm: fx.GraphModule) -> bool:
    """Whether the graph runs with a batch of another size than the example's."""
    inputs = {str(k): v for k, v in enumerate(example_of(gm))}
    batch = next((v.shape[0] for v in inputs.values() if isinstance(v, torch.Tensor) and v.dim()), 0)
    other = with_batch(inputs, 2 * batch + 1)
    if other is None:
        return True  # there is no one dimension to vary
    try:
        with torch.no_grad(), MetaRun():
            run_graph(gm.graph, meta_twin(gm), other.values())
    except Exception as error:
        _log.debug("another batch: %s", error)
        return False
    return True


_FRONT_ENDS: dict[str, Callable[[nn.Module, dict[str, Any]], fx.GraphModule]] = {
    "fx": _trace_with_fx,
    "export": _trace_with_export,
}


def _capture_wide(model: nn.Module, wide: dict[str, Any], constants: dict[str, Any]) -> ModuleTracer | None:
    """A capture whose batch is free; ``None`` if the model cannot run with another batch than its own."""
    try:
        tracer = _capture(model, wide, constants)
    except TraceError as error:
        _log.debug("a trace with a batch of %d failed, so the example's own is used: %s", BATCH, error)
        return None
    if tracer.branches_on_batch or bakes_batch(tracer.lifted()):
        tracer.forget_constants()
        return None
    free_batch(tracer.graph)
    return tracer


def _capture(model: nn.Module, values: dict[str, Any], constants: dict[str, Any]) -> ModuleTracer:
    tracer = ModuleTracer(model, values, constants)
    try:
        tracer.trace(model)
    except TraceError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{name}: {_described(value)}" for name, value in values.items())
        raise TraceError(f"{type(error).__name__}: {error} (traced with {shapes})") from error
    return tracer


def _mode_dependent(graph: fx.Graph, model: nn.Module, values: dict[str, Any], constants: dict[str, Any]) -> set[str]:
    """Calls whose ``training`` literal is the model's own flag: functional dropout and the like."""
    calls = mode_calls(graph)
    if not model.training:
        return {name for name, training in calls.items() if not training}
    if not any(calls.values()):
        return set()
    try:
        with modes_kept(model):
            model.eval()
            tracer = _capture(model, values, constants)
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


def _unreached(gm: fx.GraphModule, model: nn.Module) -> tuple[str, ...]:
    reached = {id(t) for t in (*gm.parameters(), *gm.buffers())}
    missing = [name for name, p in model.named_parameters() if id(p) not in reached]
    if not missing:
        return ()
    shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    mode = "train" if model.training else "eval"
    note = f"not part of the graph, since the forward does not reach them in {mode} mode: {shown}"
    _log.warning("%s: %s", type(model).__name__, note)
    return (note,)


def _has_tensor(value: Any) -> bool:
    return holds(torch.Tensor, value)


def _on_meta(value: Any) -> Any:
    return mapped(torch.Tensor, meta_like, value)


def _described(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
