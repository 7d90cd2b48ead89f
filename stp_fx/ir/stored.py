"""The stored tensors of a captured graph: under the names that the model gives them, also those that no node reads."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stp_fx.ir.captured import CapturedGraph
from stp_fx.ir.shapes import tensors_of
from stp_fx.ir.train_eval import BatchCount

__all__ = ["ASSIGNS", "COUNTER", "assigned", "count_batches", "put_in_order", "store_as_model", "unreached"]

ASSIGNS = "the forward assigns to "
"""How the note of :func:`assigned` begins."""
COUNTER = "stp_fx_batch_count"
"""The module of a graph that counts batches; see :class:`~stp_fx.ir.train_eval.BatchCount`."""


def store_as_model(gm: CapturedGraph, model: nn.Module, called: Iterable[nn.Module]) -> None:
    """Gives ``gm`` the buffers of every module that it reaches, and every name under which the model ties a tensor that it has.

    ``called`` are the modules whose forward was traced. Parameters that nothing reads stay out, and so do buffers that nothing
    reads and no state dict holds.
    """
    has = {id(tensor) for tensor in (*gm.parameters(), *gm.buffers())}
    reached = {id(module) for module in (model, *called)}
    whole = {id(module): module for module in gm.modules() if module is not gm}
    for name, module in model.named_modules(remove_duplicate=False):
        owner, _, key = name.rpartition(".")
        if name and id(module) in whole:
            if _owner(gm, owner)._modules.get(key) is not module:
                _owner(gm, owner).add_module(key, module)
            continue
        tensors = {k: t for k, t in {**module._parameters, **module._buffers}.items() if t is not None}
        if id(module) not in reached and not any(id(tensor) in has for tensor in tensors.values()):
            continue
        for key, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter) and id(tensor) in has:
                _owner(gm, name)._parameters.setdefault(key, tensor)
            elif not isinstance(tensor, nn.Parameter) and (id(tensor) in has or key not in module._non_persistent_buffers_set):
                _owner(gm, name)._buffers.setdefault(key, tensor)
    _keep_persistence(gm, model)


def _owner(gm: nn.Module, name: str) -> nn.Module:
    """The module of that name; empty ones are made on the way."""
    for atom in name.split(".") if name else ():
        child = gm._modules.get(atom)
        if child is None:
            child = nn.Module().train(gm.training)
            gm.add_module(atom, child)
        gm = child
    return gm


def put_in_order(ours: nn.Module, theirs: nn.Module) -> None:
    """Gives what a graph stores the order that it has in the model: optimizers and tied tensors' names go by it."""
    if ours is theirs:
        return
    for store in ("_parameters", "_buffers", "_modules"):
        now, model = ours.__dict__[store], theirs.__dict__[store]
        ordered = {key: now[key] for key in (*(key for key in model if key in now), *(key for key in now if key not in model))}
        now.clear()
        now.update(ordered)
    for key, child in ours._modules.items():
        if child is not None and theirs._modules.get(key) is not None:
            put_in_order(child, theirs.get_submodule(key))


def _keep_persistence(gm: nn.Module, model: nn.Module) -> None:
    """A buffer is in the graph's state_dict if it is in the model's; constants that were lifted out of code are not."""
    shared = {id(module) for module in model.modules()}
    owners = {name: module for name, module in gm.named_modules(remove_duplicate=False) if module._buffers}
    for name, owner in owners.items():
        if id(owner) not in shared:
            theirs = _module(model, name)
            kept = set() if theirs is None else theirs._buffers.keys() - theirs._non_persistent_buffers_set
            owner._non_persistent_buffers_set = owner._buffers.keys() - kept


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def count_batches(gm: CapturedGraph, model: nn.Module, training: bool) -> tuple[str, ...]:
    """Counts batches where batch norms that were traced through do, in training only; returns notes.

    A graph that was captured in training has these additions as nodes; one that was captured in evaluation lacks them.
    """
    counted: set[str] = set()
    notes: list[str] = []
    for node in list(gm.graph.nodes):
        if node.target == "add_" and _names_count(node):
            counted.add(node.args[0].target)
            _insert(gm, node, node.args[0].target)
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    for node in [] if training else list(gm.graph.nodes):
        mean = node.args[1] if node.target is F.batch_norm and len(node.args) > 1 else node.kwargs.get("running_mean")
        if node.target is not F.batch_norm or not isinstance(mean, fx.Node) or mean.op != "get_attr":
            continue
        owner = str(mean.target).rpartition(".")[0]
        module = model.get_submodule(owner)
        count = f"{owner}.num_batches_tracked" if owner else "num_batches_tracked"
        if count not in counted and _counts(module):
            counted.add(count)
            _insert(gm, node, count)
            if module.momentum is None:
                notes.append(
                    f"{owner!r} averages over all batches (momentum=None), which this graph does not: trace it in training"
                )
    if counted:
        gm.recompile()
    return tuple(notes)


def _names_count(node: fx.Node) -> bool:
    source = node.args[0]
    return isinstance(source, fx.Node) and source.op == "get_attr" and str(source.target).endswith("num_batches_tracked")


def _counts(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    counts = code is not None and "num_batches_tracked" in code.co_names
    return counts and isinstance(module, _BatchNorm) and module.track_running_stats and module.num_batches_tracked is not None


def _insert(gm: CapturedGraph, before: fx.Node, count: str) -> None:
    if COUNTER not in gm._modules:
        gm.add_submodule(COUNTER, BatchCount().train(gm.training))
    with gm.graph.inserting_before(before):
        gm.graph.call_module(COUNTER, (gm.graph.get_attr(count),))


def assigned(written: Iterable[str]) -> tuple[str, ...]:
    """A note of the attributes that the forward assigned to while it was captured, if any."""
    names = ", ".join(dict.fromkeys(written))
    if not names:
        return ()
    return (f"{ASSIGNS}{names}, which the graph does not keep from call to call",)


def unreached(gm: fx.GraphModule, model: nn.Module) -> tuple[str, ...]:
    """A note of the parameters that are not in the graph, if any."""
    reached = {id(t) for t in tensors_of(gm)}
    if all(id(t) in reached for t in tensors_of(model)):
        return ()
    missing = [name for name, p in model.named_parameters() if id(p) not in reached]
    if not missing:
        return ()
    shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    return (f"not part of the graph, since the forward does not reach them: {shown}",)
