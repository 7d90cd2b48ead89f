"""Shifts a consumer's output: through its bias, the BatchNorm after it, or a bias made for it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import fx, nn

from stp_fx.analysis.consumers import Consumer, find_consumers
from stp_fx.errors import InputError
from stp_fx.ir.provenance import provenance_of, with_provenance
from stp_fx.ir.shapes import fetch
from stp_fx.typed import BatchNorm

__all__ = ["add_to_bias", "bias_place", "restore_biases", "sole_norm"]


def bias_place(gm: fx.GraphModule, use: Consumer) -> str | None:
    """The tensor that takes a shift of one call's output: its own bias, or the running mean of the BatchNorm that alone reads
    it; None where one would have to be made."""
    if use.bias is not None:
        return use.bias if _is_own(gm, use.bias, 1) else None
    if use.module is not None and use.module.bias is not None:
        return None
    norm = sole_norm(gm, use.node)
    return None if norm is None else f"{next(iter(_node(gm, use.node).users)).target}.running_mean"


def add_to_bias(gm: fx.GraphModule, uses: Sequence[Consumer], shift: torch.Tensor) -> None:
    """Adds ``shift`` [out] to the output of the calls that share a weight, at the cheapest place that means the same."""
    first = uses[0]
    if first.bias is not None and all(use.bias == first.bias for use in uses) and _is_own(gm, first.bias, len(uses)):
        parameter = gm.get_parameter(first.bias)
        parameter.add_(shift.to(parameter))
        return
    norm = sole_norm(gm, first.node) if len(uses) == 1 and first.bias is None else None
    if norm is not None:
        assert norm.running_mean is not None
        norm.running_mean.sub_(shift.to(norm.running_mean))
    elif first.module is not None and first.module.bias is None:
        name = f"{_node(gm, first.node).target}.bias"
        _add_parameter(gm, name, shift, first.current(gm))
    else:
        for use in uses:
            _add_after(gm, use, shift)


def _node(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in gm.graph.nodes if node.name == name)


def _is_own(gm: fx.GraphModule, name: str, uses: int) -> bool:
    """Whether nothing but ``uses`` calls reads the parameter."""
    tensor = gm.get_parameter(name)
    names = [k for k, p in gm.named_parameters(remove_duplicate=False) if p is tensor]
    owner = name.rpartition(".")[0]
    calls = [n for n in gm.graph.nodes if n.op == "call_module" and n.target == owner]
    read = [user for n in gm.graph.nodes if n.op == "get_attr" and n.target == name for user in n.users]
    return len(names) == 1 and len(calls) + len(read) == uses


def sole_norm(gm: fx.GraphModule, name: str) -> BatchNorm | None:
    """The BatchNorm with running statistics that alone reads a node, and reads nothing else."""
    users = list(_node(gm, name).users)
    if len(users) != 1 or users[0].op != "call_module":
        return None
    norm = fetch(gm, str(users[0].target))
    calls = sum(n.op == "call_module" and n.target == users[0].target for n in gm.graph.nodes)
    return norm if isinstance(norm, BatchNorm) and norm.running_mean is not None and calls == 1 else None


def _add_parameter(gm: fx.GraphModule, name: str, value: torch.Tensor, like: torch.Tensor) -> None:
    owner, _, own = name.rpartition(".")
    parameter = nn.Parameter(value.to(like), requires_grad=like.requires_grad)
    (fetch(gm, owner) if owner else gm).register_parameter(own, parameter)
    with_provenance(gm, added=(*provenance_of(gm).added, name))


def restore_biases(gm: fx.GraphModule, names: Iterable[str]) -> None:
    """Makes biases of zero where an earlier run had added some, so that what was saved with them can be loaded.

    Raises:
        InputError: a name that does not fit the graph.
    """
    missing = [name for name in names if name not in provenance_of(gm).added]
    consumers = {c.node: c for c in find_consumers(gm)}
    for name in missing:
        use = consumers.get(name.removesuffix("_bias"))
        owner = name.removesuffix(".bias")
        module = None if owner == name else next((m for n, m in gm.named_modules() if n == owner), None)
        if module is not None and isinstance(getattr(module, "weight", None), torch.Tensor):
            outputs = next((c for c in consumers.values() if c.module is module), None)
            if outputs is None or getattr(module, "bias", None) is not None:
                raise InputError(f"{name!r} was added to another graph: this one has no place for it")
            weight = outputs.current(gm)
            _add_parameter(gm, name, torch.zeros(outputs.matrix(weight).shape[:2].numel()), weight)
        elif use is not None:
            weight = use.current(gm)
            _add_after(gm, use, torch.zeros(use.matrix(weight).shape[:2].numel()))
        else:
            raise InputError(f"{name!r} was added to another graph: this one has no consumer for it")
    gm.recompile()


def _add_after(gm: fx.GraphModule, use: Consumer, shift: torch.Tensor) -> None:
    """A bias of its own behind a call that has no place for one."""
    node = _node(gm, use.node)
    name = f"{use.node}_bias"
    if name in provenance_of(gm).added:  # from an earlier run
        parameter = gm.get_parameter(name)
        parameter.add_(shift.to(parameter).reshape(parameter.shape))
        return
    rank = 0 if use.channel == -1 else len(use.site.shape) - 1 - use.channel
    _add_parameter(gm, name, shift.reshape(-1, *[1] * rank), use.current(gm))
    with gm.graph.inserting_after(node):
        bias = gm.graph.get_attr(name)
    with gm.graph.inserting_after(bias):
        added = gm.graph.call_function(operator.add, (node, bias))
    node.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
