"""Front ends: from a module and an example to a GraphModule with the example's shapes recorded."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import keyword
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from stp_fx.checks import arguments_by_name, is_choice, shown
from stp_fx.errors import InputError, TraceError, VerificationError
from stp_fx.ir.batch import with_batch
from stp_fx.ir.caches import NO_CACHE, without_caches
from stp_fx.ir.call import Call, call_of, restored
from stp_fx.ir.compiled import COMPILED, compiled_parts, uncompiled
from stp_fx.ir.example import bound_arguments, by_name, check_that_it_runs, is_plain, on_meta
from stp_fx.ir.examples import Example, example_of_call
from stp_fx.ir.export import capture_with_export
from stp_fx.ir.fx_frontend import OWN_BATCH, capture_with_fx
from stp_fx.ir.kept import state_kept
from stp_fx.ir.meta_run import MetaRun, import_compiler
from stp_fx.ir.nested import holds, leaves_of
from stp_fx.ir.outputs import Outputs, names_of_outputs, only_outputs
from stp_fx.ir.patches import LOCK
from stp_fx.ir.provenance import example_of, provenance_of, with_provenance
from stp_fx.ir.quantised import quantised_part
from stp_fx.ir.root_hooks import backward_hooks
from stp_fx.ir.runner import run_graph
from stp_fx.ir.shapes import meta_twin, tensors_of
from stp_fx.ir.stored import ASSIGNS, assigned, unreached
from stp_fx.ir.train_eval import held_modes, modes_kept
from stp_fx.ir.validate import UNSTEADY, validate_capture
from stp_fx.ir.validation import Budget, Validate
from stp_fx.ir.verify import verify

__all__ = ["FRONT_ENDS", "bound_arguments", "retrace", "trace"]

_log = logging.getLogger(__name__)


def trace(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    frontend: str = "auto",
    validate: Validate = "auto",
    outputs: str | int | Sequence[str | int] | None = None,
) -> fx.GraphModule:
    """Captures ``model`` as a GraphModule and records the example's shapes on it.

    The graph shares the model's parameters, buffers and submodules (as ``torch.fx`` does) and keeps their names, hooks and
    train/eval flags. Where the code asks for ``self.training``, both ways are captured, and ``train()`` and ``eval()`` of the
    graph choose. Batch and spatial sizes stay free wherever the model's own code leaves them free. A model whose configuration
    asks for a cache of keys and values (``config.use_cache``) is captured without, and parts that ``torch.compile`` has compiled
    as the Python that they were.

    The capture is checked: model and graph are run, and what they give is compared (:class:`Validation`, in the provenance of the
    graph). Nothing that these runs write stays: buffers, modes and random state are put back.

    Args:
        example_inputs: a tensor, a tuple of positional arguments, or a mapping whose keys are parameters of ``forward`` (what a
            tokenizer gives). The capture reads shapes and dtypes alone; the check runs on the values, or on random ones if there
            are none (meta tensors, not finite, all the same).
        kwargs: arguments by name. Values that hold no tensor, here and above, are baked in, which the graph asserts.
        frontend: "fx", "export" (``torch.export``, which takes sizes of 1 for constants and asserts that others are at least 2),
            or "auto" for the first of the two that succeeds, leaves the batch free and computes what the model computes.
        validate: "auto" runs model and graph on the example in eval and train mode, with another batch and in another size, in at
            most eight forward passes and 30 seconds; True whatever it takes, a number for at most that many seconds, False not
            at all. A difference in the mode that the model is in is an error; in the other mode it is logged and recorded.
        outputs: the outputs that the graph is to give, by key, field or position; the others become None. An output keeps its
            channels, so a by-product that nobody reads (``encoder_last_hidden_state`` beside ``logits``) keeps the
            width of a whole network unless it is left out here. None: all of them.

    Raises:
        InputError: missing example inputs, or such on which the model itself fails; an unknown front end or output;
            uninitialised lazy modules.
        TraceError: the model's Python code cannot be captured, or the graph computes something else; says where and what to do.
    """
    try:
        kept = names_of_outputs(outputs)
        with only_outputs(kept) as asked:
            gm = _traced(model, example_inputs, kwargs, frontend, Budget(validate), kept)
        asked.check()
        return gm
    except RecursionError as error:
        raise TraceError(
            f"{type(model).__name__} nests modules or calls deeper than Python follows (sys.getrecursionlimit() is "
            f"{sys.getrecursionlimit()}): raise that limit, or flatten the modules"
        ) from error


def _traced(
    model: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any] | None, frontend: str, budget: Budget, kept: Outputs
) -> fx.GraphModule:
    if not isinstance(model, nn.Module):
        raise InputError(f"`model` is a {type(model).__name__}; give a torch.nn.Module")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise InputError(f"`model` is wrapped in {type(model).__name__}: give the module in it, `model.module`")
    compiled = compiled_parts(model)
    model = uncompiled(model)
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        compiled = next(name or "model" for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule))
        raise InputError(f"{compiled!r} is a TorchScript module, which shows no Python to capture: give the original module")
    _check_names(model)
    example_inputs, given = by_name(model, example_inputs, arguments_by_name(kwargs))
    _check_tensors(model, example_inputs, given)
    if not is_choice(frontend, FRONT_ENDS):
        raise InputError(f"unknown front end {shown(frontend)}; known: {', '.join(FRONT_ENDS)}")
    import_compiler()
    with LOCK, state_kept(), without_caches(model) as cached:
        arguments = bound_arguments(model, example_inputs, given)
        check = functools.partial(check_that_it_runs, model, example_inputs, given, arguments)
        try:
            example = example_of_call(example_inputs, given)
            gm = _first_capture(
                model, arguments, frozenset(given), frontend, check, lambda gm: _validated(model, gm, example, budget)
            )
        except TraceError:
            check()
            raise
    said = [note for note, holds_here in ((COMPILED, compiled), (NO_CACHE, cached)) if holds_here]
    gm = with_provenance(gm, notes=(*provenance_of(gm).notes, *said))
    for note in provenance_of(gm).notes:
        _log.log(logging.INFO if note in (OWN_BATCH, NO_CACHE) else logging.WARNING, "%s: %s", type(model).__name__, note)
    found = provenance_of(gm)
    call = call_of(model, example_inputs, given, found.frontend, bool(found.read))
    return with_provenance(gm, call=dataclasses.replace(call, outputs=kept))


def _check_tensors(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuses tensors that cannot be analysed: not initialised, quantised, nested."""
    stored = tensors_of(model)
    if any(is_lazy(tensor) for tensor in stored):
        lazy = [name for name, p in (*model.named_parameters(), *model.named_buffers()) if is_lazy(p)]
        raise InputError(f"{lazy[0]!r} is not initialised yet (a lazy module): run one batch through the model first")
    quantised = quantised_part(model)
    if quantised is not None:
        raise InputError(f"{quantised!r} is quantised, and its integers cannot be scored or shortened: prune before quantising")
    if any(t.is_nested or t.is_quantized for t in leaves_of(torch.Tensor, (args, dict(kwargs)))):
        raise InputError("the example holds a nested or quantised tensor, whose sizes cannot be followed: give dense tensors")


def _check_names(model: nn.Module) -> None:
    """Refuses names at the top of the model that a GraphModule needs for itself."""
    held = {**model._modules, **model._parameters, **model._buffers}
    taken = next((name for name in held if hasattr(fx.GraphModule, name) and not hasattr(nn.Module, name)), None)
    taken = next((name for name in held if name == "meta"), taken)
    if taken is not None:
        raise InputError(
            f"{type(model).__name__} holds {taken!r}, a name that torch.fx.GraphModule needs itself: rename it, {taken + '_'!r}"
        )


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
        return trace(model, args, kwargs=kwargs, frontend=call.frontend, validate=False, outputs=call.outputs or None)


def _first_capture(
    model: nn.Module,
    arguments: dict[str, Any],
    named: frozenset[str],
    frontend: str,
    check: Callable[..., None],
    checked: Callable[[fx.GraphModule], fx.GraphModule],
) -> fx.GraphModule:
    said: dict[str, TraceError] = {}
    for gm in _captures(model, arguments, named, frontend, check, said):
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
    model: nn.Module,
    arguments: dict[str, Any],
    named: frozenset[str],
    frontend: str,
    check: Callable[..., None],
    said: dict[str, TraceError],
) -> Iterator[fx.GraphModule]:
    """Captures by one front end after the other, the best first; those that are not asked for are not made.

    An example that the model does not take is told before the next, which may take minutes to fail on it.
    """
    bound: fx.GraphModule | None = None
    for name in _FRONT_ENDS if frontend == "auto" else [frontend]:
        if said:
            check(cheaply=True)
        try:
            gm = _recorded(_FRONT_ENDS[name](model, arguments, named), model, arguments)
        except TraceError as error:
            said[name] = error
            continue
        except SyntaxError as error:  # torch.fx writes a graph as Python, names of modules included
            said[name] = TraceError(_unwritable(model, error))
            continue
        suspect = bound is not None or OWN_BATCH in provenance_of(gm).notes
        if frontend != "auto" or not suspect or _takes_another_batch(gm):
            yield gm
            continue
        bound = gm if bound is None else bound
        _log.debug("%s: the graph of %s is bound to the example's batch", type(model).__name__, name)
    if bound is not None:
        yield bound


def _unwritable(model: nn.Module, error: SyntaxError) -> str:
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters(), *model.named_buffers())]
    words = dict.fromkeys(name for name in names if any(map(keyword.iskeyword, name.split("."))))
    if not words:
        return f"the graph cannot be written as Python: {error}"
    return f"{next(iter(words))!r} holds a word of Python's own, so no code can name it: rename it, {next(iter(words)) + '_'!r}"


def _validated(model: nn.Module, gm: fx.GraphModule, example: Example, budget: Budget) -> fx.GraphModule:
    """The graph with what was checked in its provenance.

    Raises:
        TraceError: it computes something else than the model.
    """
    if budget.off:
        return gm
    budget.again()
    bound = OWN_BATCH in provenance_of(gm).notes and not _takes_another_batch(gm)
    by_name = functools.partial(bound_arguments, model)
    found, written, difference = validate_capture(model, gm, example, by_name, budget, bound=bound)
    budget.pause()
    if difference is not None:
        raise TraceError(f"the graph computes something else than the model ({difference}); validate=False keeps it as it is")
    known = {word for note in provenance_of(gm).notes for word in re.findall(r"[\w.]+", note) if note.startswith(ASSIGNS)}
    notes = assigned(name for name in written if name not in known)
    if UNSTEADY in found.left_out.values():
        notes += (
            "the model gives other numbers each time, from the same random state (a generator made in the forward, the time): "
            "a graph holds what was drawn at capture",
        )
    notes += tuple(f"in {mode} mode the graph differs: {text}" for mode, text in found.differs.items())
    return with_provenance(gm, validation=found, notes=provenance_of(gm).notes + notes)


def _recorded(gm: fx.GraphModule, model: nn.Module, arguments: dict[str, Any]) -> fx.GraphModule:
    plain = {name: holds(torch.Tensor, value) or is_plain(value) for name, value in arguments.items()}
    known = {name: on_meta(value) for name, value in arguments.items() if plain[name]}
    lost = tuple(name for name, kept in plain.items() if not kept)
    return with_provenance(gm, arguments=known, lost=lost, held=held_modes(model))


def _trace_with_export(model: nn.Module, arguments: dict[str, Any], named: frozenset[str]) -> fx.GraphModule:
    spread = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind is p.VAR_POSITIONAL]
    if any(name.startswith(f"{each}_") for each in spread for name in arguments):
        raise TraceError(f"arguments spread over *{spread[0]} are not supported here")
    by_keyword = {p.name for p in inspect.signature(model.forward).parameters.values() if p.kind is p.KEYWORD_ONLY}
    gm, found = capture_with_export(model, arguments, named | by_keyword)
    with_provenance(gm, notes=found + unreached(gm, model) + backward_hooks(model, gm.modules()))
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


_FRONT_ENDS: dict[str, Callable[[nn.Module, dict[str, Any], frozenset[str]], fx.GraphModule]] = {
    "fx": capture_with_fx,
    "export": _trace_with_export,
}
FRONT_ENDS = ("auto", *_FRONT_ENDS)
"""Values of ``frontend``."""
