"""A copy of the original module with the tensors of a pruned graph in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from stp_fx.analysis.norm_calls import norm_calls
from stp_fx.errors import InputError, WriteBackError
from stp_fx.ir.provenance import provenance_of
from stp_fx.rewrite.slicing import copied

__all__ = ["is_number", "is_numbers", "numbers_in", "smaller_copy", "state_channels", "tensors_of"]


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers under all of their names: one that is tied has several."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def smaller_copy(pruned: fx.GraphModule, model: nn.Module) -> tuple[nn.Module, set[tuple[str, str]]]:
    """A deep copy of ``model`` that holds copies of the tensors of ``pruned``; ties, hooks and train/eval flags are the model's.

    Numbers that torch's own modules state about their tensors (``in_features``, ``normalized_shape``, ...) follow, as do those of
    modules that the graph calls whole. Both are returned as settled: the path of a module, and its attribute.

    Raises:
        InputError: the tensors are not those that the graph was captured from.
        WriteBackError: the graph has a tensor that the model has no place for.
    """
    given, wanted = tensors_of(pruned), tensors_of(model)
    _check_sizes(pruned, given, wanted)
    memo: dict[int, Any] = {}
    for name, tensor in wanted.items():
        if name in given:
            memo[id(tensor)] = _like(given[name], tensor)
    result = copied(model, memo)
    _add_missing(pruned, result)
    _renew_epsilons(pruned, result)
    leaves = dict(pruned.named_modules(remove_duplicate=False))
    called = {str(node.target) for node in pruned.graph.nodes if node.op == "call_module"}
    settled: set[tuple[str, str]] = set()
    for name, module in result.named_modules():
        settled |= {(name, attribute) for attribute in _follow_tensors(module)}
        if name in called and type(leaves[name]) is type(module):
            for attribute, value in numbers_in(leaves[name]):
                if attribute in module.__dict__:
                    module.__dict__[attribute] = value
                    settled.add((name, attribute))
    return result, settled


def _renew_epsilons(pruned: fx.GraphModule, copy: nn.Module) -> None:
    """Epsilons of RMSNorms, which removal renews (:mod:`stp_fx.rewrite.rms_norm`)."""
    modules = dict(copy.named_modules(remove_duplicate=False))
    for norm in norm_calls(pruned):
        owner = str(norm.node.target) if norm.node.op == "call_module" else str(norm.weight).rpartition(".")[0]
        module = modules.get(owner)
        if norm.kind == "rms" and isinstance(module, nn.RMSNorm):
            module.eps = norm.eps


def numbers_in(thing: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of an object that are whole numbers, or sequences of them."""
    for key, value in list(getattr(thing, "__dict__", {}).items()):
        if is_number(value) or is_numbers(value):
            yield key, value


def is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_numbers(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and bool(value) and all(is_number(v) for v in value)


def _like(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    data = new.detach().clone(memory_format=torch.preserve_format)
    if not isinstance(old, nn.Parameter):
        return data
    parameter = nn.Parameter(data, requires_grad=new.requires_grad)
    for key, value in old.__dict__.items():
        setattr(parameter, key, value)
    return parameter


def _check_sizes(pruned: fx.GraphModule, given: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    state = provenance_of(pruned)
    sizes = {} if state.plan is None else state.plan.sizes
    for name, tensor in given.items():
        if name not in wanted:
            continue
        shape = tuple(sizes.get((name, dim), size) for dim, size in enumerate(tensor.shape))
        if len(shape) != wanted[name].dim() or any(
            now != was for dim, (now, was) in enumerate(zip(shape, wanted[name].shape)) if (name, dim) in sizes
        ):
            raise InputError(
                f"the graph was captured from a model whose {name!r} is {list(shape)}; here it is {list(wanted[name].shape)}: "
                "give the module that was traced"
            )
    if not set(given) & set(wanted) and wanted:
        raise InputError(
            f"the graph and the model have no tensor in common ({next(iter(wanted))!r}, ...): give the traced module"
        )


def _add_missing(pruned: fx.GraphModule, copy: nn.Module) -> None:
    """Biases that a compensation has made: a module whose bias is ``None`` can take one."""
    for name in provenance_of(pruned).added:
        owner, _, own = name.rpartition(".")
        try:
            module = copy.get_submodule(owner)
        except AttributeError:
            module = None
        if module is None or own not in module._parameters:
            raise WriteBackError(
                f"a compensation has made the bias {name!r}, which the original class has no place for: prune without "
                "`compensation`, or go on with the GraphModule",
                (name,),
            )
        made = pruned.get_parameter(name)
        module.register_parameter(own, nn.Parameter(made.detach().clone(), requires_grad=made.requires_grad))


def _follow_tensors(module: nn.Module) -> set[str]:
    """Renews what torch's own classes say about the shapes of their tensors; gives the attributes."""
    tensors = {**module._parameters, **module._buffers}
    weight = tensors.get("weight")
    new: dict[str, Any] = {}
    if isinstance(weight, torch.Tensor):
        stated = next((names for kind, names in _STATED.items() if isinstance(module, kind)), ())
        new = dict(zip(stated, weight.shape))
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            new["normalized_shape"] = tuple(weight.shape)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        known = next((t for t in (weight, tensors.get("running_mean")) if t is not None), None)
        new = {} if known is None else {"num_features": known.shape[0]}
    new = {name: value for name, value in new.items() if name in module.__dict__}
    module.__dict__.update(new)
    return set(new)


_STATED: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("out_features", "in_features"),
    nn.Bilinear: ("out_features", "in1_features", "in2_features"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    nn.EmbeddingBag: ("num_embeddings", "embedding_dim"),
    nn.GroupNorm: ("num_channels",),
    nn.PReLU: ("num_parameters",),
}
"""The class's own names for the dimensions of ``weight``, in their order."""


def state_channels(module: nn.Module) -> None:
    """Renews the channel counts that convolutions state, which follow from their weights and ``groups``."""
    for conv in module.modules():
        if isinstance(conv, nn.modules.conv._ConvNd) and isinstance(conv.weight, torch.Tensor):
            first, second = conv.weight.shape[0], conv.weight.shape[1] * conv.groups
            conv.in_channels, conv.out_channels = (first, second) if conv.transposed else (second, first)
