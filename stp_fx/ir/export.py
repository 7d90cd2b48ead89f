"""The second front end: what Python's tracer cannot follow, ``torch.export`` can; its ATen calls are raised to PyTorch's own.

Exported graphs bake sizes, devices and the mode in. Here sizes stay free where the model leaves them free (a size that it does
not is asserted), devices follow the input, and calls that differ between an export in training and one in evaluation follow
``.train()`` and ``.eval()``.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from stp_fx.errors import TraceError
from stp_fx.ir.batch_of_one import allow_one, batch_of_one
from stp_fx.ir.captured import CapturedGraph
from stp_fx.ir.example import on_meta
from stp_fx.ir.export_leaves import leaves_kept
from stp_fx.ir.export_quiet import quiet_export
from stp_fx.ir.export_raise import Raised
from stp_fx.ir.join import joined
from stp_fx.ir.kept import containers_kept
from stp_fx.ir.provenance import Provenance, attach_provenance
from stp_fx.ir.stored import COUNTER
from stp_fx.ir.train_eval import in_mode, mode_calls, switch_modes

__all__ = ["capture_with_export"]

_log = logging.getLogger(__name__)
_COUNT = "num_batches_tracked"
"""What a batch norm adds one to in training. Graphs that differ in that alone are alike."""


def capture_with_export(
    model: nn.Module, arguments: dict[str, Any], named: frozenset[str]
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """A GraphModule over the model's own parameters and buffers, in its mode, with a placeholder for each tensor; and notes.

    ``arguments`` are those of ``forward`` by parameter name, ``named`` the ones that were given by name.

    Raises:
        TraceError: ``torch.export`` cannot capture it.
    """
    now, notes = _exported(model, arguments, named, model.training)
    calls = mode_calls(now.graph)
    try:
        other, _ = _exported(model, arguments, named, not model.training)
    except TraceError:
        other = None
    if other is not None and _alike(now.graph, other.graph):
        trained, evaluated = (mode_calls(each.graph) for each in ((now, other) if model.training else (other, now)))
        gm = now if model.training else other  # in training dropout says its probability
        names = {name for name, training in trained.items() if training and evaluated.get(name) is False}
    elif other is not None and _know_examples((now, other), arguments):
        gm, names = joined(*((now, other) if model.training else (other, now)), model), set()
    else:
        mode = "train" if model.training else "eval"
        _log.warning("%s: its graphs for training and evaluation differ; this one is for %s mode", type(model).__name__, mode)
        gm, names = now, {name for name, training in calls.items() if not training} if not model.training else set()
    _allow_one(gm, model, arguments, named)
    _set_modes(gm, model)
    if names:
        switch_modes(gm, names, model.training)
    gm.recompile()
    return gm, notes


def _know_examples(graphs: tuple[CapturedGraph, ...], arguments: dict[str, Any]) -> bool:
    """Records the inputs' shapes on both, for their values to be worked out; False where an input has no name of its own."""
    for gm in graphs:
        names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
        if not arguments.keys() >= set(names):
            return False
        attach_provenance(gm, Provenance(tuple(on_meta(arguments[name]) for name in names)))
    return True


def _set_modes(gm: fx.GraphModule, model: nn.Module) -> None:
    """Modules that the graph made are in the model's mode; the model's own keep theirs."""
    originals = {id(module) for module in model.modules()}
    for module in gm.modules():
        if id(module) not in originals:
            module.training = model.training


def _allow_one(gm: fx.GraphModule, model: nn.Module, arguments: dict[str, Any], named: frozenset[str]) -> None:
    """Lets a batch of one pass, if the graph for it is the same."""
    one = batch_of_one(arguments)
    if one is None:
        return
    try:
        single, _ = _exported(model, one, named, gm.training)
    except TraceError as error:
        _log.debug("%s: no graph for a batch of one: %s", type(model).__name__, error)
        return
    allow_one(gm, one, single)


def _alike(first: fx.Graph, second: fx.Graph) -> bool:
    """Whether two graphs make the same calls, whatever they assert of sizes and how tensors lie in memory."""
    ignored = lambda n: _is_arithmetic(n) or n.target in ("contiguous", COUNTER) or _COUNT in str(n.target)  # noqa: E731
    calls = [[(n.op, n.target) for n in graph.nodes if not ignored(n)] for graph in (first, second)]
    return calls[0] == calls[1] and mode_calls(first).keys() == mode_calls(second).keys()


def _is_arithmetic(node: fx.Node) -> bool:
    module = getattr(node.target, "__module__", "")
    return (
        node.target in ("size", torch._assert)
        or module in ("_operator", "math")
        or "sym_" in getattr(node.target, "__name__", "")
    )


def _exported(
    model: nn.Module, arguments: dict[str, Any], named: frozenset[str], training: bool
) -> tuple[CapturedGraph, tuple[str, ...]]:
    written: list[str] = []
    try:
        mode = nullcontext() if training == model.training else in_mode(model, training)
        with mode, containers_kept(model, written), quiet_export(), leaves_kept(model) as leaves:
            args = tuple(value for name, value in arguments.items() if name not in named)
            kwargs = {name: value for name, value in arguments.items() if name in named}
            every = pytree.tree_map(_free_sizes, dict(arguments))
            program = torch.export.export(model, args, kwargs, dynamic_shapes=every, strict=False)
            raised = Raised(model, program, arguments, named, leaves, training)
    except TraceError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        raise TraceError(f"{type(error).__name__}: {lines[0][:300]}") from error
    gm = raised.graph_module()
    return gm, raised.notes


def _free_sizes(value: Any) -> dict[int, Any] | None:
    """All of them, but for 0 and 1, which ``torch.export`` fixes."""
    if not isinstance(value, torch.Tensor):
        return None
    return {dim: torch.export.Dim.AUTO for dim, size in enumerate(value.shape) if size > 1}
