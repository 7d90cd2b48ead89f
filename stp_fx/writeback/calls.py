"""Calling the original and the graph with the same arguments, drawn like the recorded example, and comparing what they give."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from stp_fx.errors import InputError
from stp_fx.ir.caches import without_caches
from stp_fx.ir.provenance import provenance_of

__all__ = ["call_graph", "call_original", "difference", "drawn", "leaves", "other_shapes", "recorded"]

Arguments = dict[str, Any]


def recorded(gm: fx.GraphModule) -> Arguments:
    """All arguments of the original's forward, tensors on meta. Raises :class:`InputError` if they were not recorded."""
    state = provenance_of(gm)
    if not state.arguments:
        raise InputError("the graph does not say what its original was called with: give `example_inputs`")
    if state.lost:
        raise InputError(
            f"the argument {state.lost[0]!r} was neither a tensor nor a plain value, so it was not recorded: give "
            "`example_inputs` and `kwargs`"
        )
    now = next((p.dtype for p in gm.parameters() if p.is_floating_point()), None)
    changed = now is not None and now != state.dtype
    return {k: mapped(v, lambda t: t.to(now) if changed and t.dtype == state.dtype else t) for k, v in state.arguments.items()}


def mapped(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        parts = [mapped(v, function) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return {k: mapped(v, function) for k, v in value.items()} if isinstance(value, Mapping) else value


def drawn(arguments: Arguments, device: torch.device, seed: int) -> Arguments:
    """Values for meta tensors: floating ones normal; whole numbers 0 or 1, which any table has, and 1 at the start of the
    last dimension, so that one used as a mask lets a causal network see something; booleans true."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor
        if tensor.dtype == torch.bool:
            return torch.ones(tensor.shape, dtype=torch.bool, device=device)
        if tensor.is_floating_point() or tensor.is_complex():
            wide = torch.complex64 if tensor.is_complex() else torch.float32
            return torch.randn(tensor.shape, generator=generator, dtype=wide).to(device, tensor.dtype)
        values = torch.randint(0, 2, tensor.shape, generator=generator)
        if values.dim():
            values[..., 0] = 1
        return values.to(device, tensor.dtype)

    return {name: mapped(value, draw) for name, value in arguments.items()}


def other_shapes(arguments: Arguments) -> list[Arguments]:
    """The arguments on meta in other sizes: one more in the batch, then one more of every other size that occurs."""
    tensors: list[torch.Tensor] = []
    mapped(list(arguments.values()), lambda t: (tensors.append(t), t)[1])
    batches = {t.shape[0] for t in tensors if t.dim()}
    sizes = sorted({s for t in tensors for s in t.shape[1:] if s > 1}, reverse=True)

    def grown(chosen: Callable[[int, int], bool]) -> Arguments:
        def grow(t: torch.Tensor) -> torch.Tensor:
            return torch.empty([s + chosen(d, s) for d, s in enumerate(t.shape)], dtype=t.dtype, device="meta")

        return {name: mapped(value, grow) for name, value in arguments.items()}

    result = [grown(lambda d, s: d == 0)] if len(batches) == 1 else []
    return [*result, *(grown(lambda d, s, size=size: d > 0 and s == size) for size in sizes[:3])]


def call_graph(gm: fx.GraphModule, arguments: Arguments) -> Any:
    # Not by calling it: a GraphModule prints the code around an error, and sizes that it does not take are tried on purpose.
    return gm.forward(*(arguments[str(node.target)] for node in gm.graph.nodes if node.op == "placeholder"))


def call_original(model: nn.Module, arguments: Arguments) -> Any:
    positional, named = as_call(model, arguments)
    with without_caches(model):  # as it was captured
        return model(*positional, **named)


def as_call(model: nn.Module, arguments: Arguments) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call; those that a ``*args`` takes are numbered (``args_0``), and then all before it are positional."""
    parameters = inspect.signature(model.forward).parameters
    spread = next((p.name for p in parameters.values() if p.kind is p.VAR_POSITIONAL), None)
    rest, positional = dict(arguments), []
    for parameter in parameters.values():
        first = parameter.kind is parameter.POSITIONAL_ONLY or (spread and parameter.kind is parameter.POSITIONAL_OR_KEYWORD)
        if spread and parameter.name == spread:
            numbered = sorted((k for k in rest if _number(k, spread) is not None), key=lambda k: _number(k, spread) or 0)
            positional += [rest.pop(k) for k in numbered]
        elif first and parameter.name in rest:
            positional.append(rest.pop(parameter.name))
    return positional, rest


def _number(name: str, spread: str) -> int | None:
    number = name.removeprefix(f"{spread}_")
    return int(number) if name.startswith(f"{spread}_") and number.isdigit() else None


def leaves(value: Any, name: str = "output") -> dict[str, torch.Tensor]:
    """The tensors and numbers of an output by where they are; mappings, dataclasses and named tuples alike go by field."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, (bool, int, float)):
        return {name: torch.tensor(float(value), dtype=torch.float64)}
    if isinstance(value, Mapping):
        parts = [(f"{name}.{k}", v) for k, v in value.items()]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [(f"{name}.{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value)]
    elif isinstance(value, (list, tuple)):
        fields = getattr(value, "_fields", None) or range(len(value))
        parts = [(f"{name}.{k}" if isinstance(k, str) else f"{name}[{k}]", v) for k, v in zip(fields, value)]
    else:
        return {}
    return {key: tensor for k, v in parts for key, tensor in leaves(v, k).items()}


_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def difference(expected: Any, found: Any, dtype: torch.dtype | None = None) -> str:
    """How two outputs differ beyond rounding, relative to the largest value of each tensor; empty if they do not.

    Args:
        dtype: the precision whose rounding is meant; None: that of the outputs.
    """
    first, second = leaves(expected), leaves(found)
    if set(first) != set(second):
        return f"the graph gives {', '.join(first) or 'nothing'}; the module gives {', '.join(second) or 'nothing'}"
    for name, one in first.items():
        other = second[name]
        if one.shape != other.shape:
            return f"{name} has the shape {list(other.shape)} in place of {list(one.shape)}"
        if not one.is_floating_point() and not one.is_complex():
            if not torch.equal(one, other):
                return f"{name} differs"
            continue
        scale = torch.nan_to_num(one.abs(), 0.0, 0.0).max().item() if one.numel() else 0.0
        coarsest = dtype or min((one.dtype, other.dtype), key=lambda d: torch.finfo(d).bits)
        tolerance = _TOLERANCES.get(coarsest, 1e-1) * scale
        if not torch.allclose(one, other.to(one.dtype), rtol=0.0, atol=tolerance, equal_nan=True):
            worst = (one - other).abs().max().item() if one.numel() else 0.0
            return f"{name} differs by {worst:.3g}, of values up to {scale:.3g}"
    return ""
