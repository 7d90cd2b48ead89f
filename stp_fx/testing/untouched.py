"""The law that no public function changes what it is given, nor the process: taken before a call, held against after it.

>>> from torch import nn
>>> net = nn.Linear(2, 2)
>>> before = snapshot(net)
>>> assert_untouched(before)
>>> net.weight.data.zero_()
tensor([[0., 0.],
        [0., 0.]])
>>> assert_untouched(before)
Traceback (most recent call last):
    ...
AssertionError: changed: weight: other values
"""

from __future__ import annotations

import dataclasses
import math
import random
import types
import warnings
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx import _symbolic_trace

__all__ = ["Snapshot", "assert_untouched", "differences", "snapshot"]

_LEFT_ALONE = (torch.dtype, torch.device, torch.Size, types.ModuleType, type, fx.Node, fx.Graph)
_WATCHED = {
    torch: ("zeros", "ones", "full", "arange", "rand", "randn", "tensor", "finfo", "iinfo", "is_tensor"),
    torch.Tensor: ("view", "expand", "reshape", "repeat", "new_zeros", "narrow", "tile", "__torch_function__"),
    torch.autograd.Function: ("apply",),
    nn.Module: ("__call__", "__getattr__", "__setattr__", "forward"),
    math: ("sqrt", "ceil", "floor"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """The earlier state: ``objects`` are the roots; ``facts`` gives the value at each path, ``held`` keeps the objects alive."""

    objects: tuple[Any, ...]
    facts: dict[str, tuple[Any, ...]]
    held: tuple[Any, ...]
    process: dict[str, Any]


def snapshot(*objects: Any) -> Snapshot:
    """The state reachable from ``objects`` (modules, graphs, containers, plain objects, tensors), and torch's global state."""
    facts: dict[str, tuple[Any, ...]] = {}
    held: list[Any] = []
    for k, value in enumerate(objects):
        for path, fact, each in _walk(value, "" if len(objects) == 1 else str(k), set()):
            facts[path] = fact
            held.append(each)
    return Snapshot(objects, facts, tuple(held), _process())


def differences(before: Snapshot) -> list[str]:
    """The changes since then, a line each; empty if there are none."""
    now = snapshot(*before.objects)
    found = [f"{path or 'the object'}: {_difference(fact, now.facts.get(path))}" for path, fact in before.facts.items()]
    found = [line for line in found if not line.endswith(": ")]
    found += [f"{path}: new" for path in now.facts.keys() - before.facts.keys()]
    return found + [f"{name} of the process" for name, value in before.process.items() if not _same(value, now.process[name])]


def assert_untouched(before: Snapshot) -> None:
    """Raises AssertionError with what has changed since ``before`` was taken."""
    found = differences(before)
    more = f" and {len(found) - 10} more" if len(found) > 10 else ""
    assert not found, "changed: " + "; ".join(found[:10]) + more


def _walk(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, tuple[Any, ...], Any]]:
    if id(value) in seen:
        yield path, ("object", id(value)), value
        return
    if isinstance(value, torch.Tensor):
        seen.add(id(value))
        yield path, _tensor_facts(value), value
        return
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        yield path, ("value", value), value
        return
    yield path, ("object", id(value)), value
    seen.add(id(value))
    if isinstance(value, fx.GraphModule):
        yield _joined(path, "<graph>"), ("graph", _graph_facts(value)), value
    for key, item in _items(value):
        yield from _walk(item, _joined(path, key), seen)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        yield "<keys>", repr(list(value))
        yield from value.items()
    elif isinstance(value, (list, tuple, deque)):
        yield "<length>", len(value)
        yield from enumerate(value)
    elif isinstance(value, (set, frozenset)):
        yield "<members>", repr(sorted(map(id, value)))
    elif isinstance(value, types.FunctionType):
        for k, cell in enumerate(value.__closure__ or ()):
            try:
                yield f"<closure {k}>", cell.cell_contents
            except ValueError:
                continue
    elif isinstance(value, nn.Module):
        for key, item in vars(value).items():
            if key in ("_parameters", "_buffers", "_modules"):
                yield from item.items()
                yield f"<{key[1:]}>", repr(list(item))
            elif key not in ("_graph", "_code", "_lineno_map", "_prologue_start"):
                yield key, item
    elif not isinstance(value, _LEFT_ALONE) and hasattr(value, "__dict__"):
        yield from vars(value).items()


def _tensor_facts(value: torch.Tensor) -> tuple[Any, ...]:
    kept = None if value.is_meta else value.detach().clone()
    return "tensor", id(value), kept, tuple(value.shape), value.requires_grad, None if value.grad is None else id(value.grad)


def _graph_facts(gm: fx.GraphModule) -> tuple[Any, ...]:
    nodes = [(n.name, n.op, str(n.target), str(n.args), str(n.kwargs), tuple(n.meta)) for n in gm.graph.nodes]
    return gm.code, nodes, id(gm.graph), id(type(gm).forward), tuple(gm.meta), id(gm.graph.owning_module)


def _difference(before: tuple[Any, ...], now: tuple[Any, ...] | None) -> str:
    if now is None:
        return "gone"
    if before[0] == now[0] == "tensor":
        if before[1] != now[1]:
            return "another tensor"
        return "" if _same(before[2], now[2]) and before[3:] == now[3:] else "other values"
    if before[0] == now[0] == "value":
        return "" if before[1] == now[1] or before[1] != before[1] else f"was {before[1]!r}, is {now[1]!r}"
    return "" if before == now else "the graph has changed" if before[0] == "graph" else "another object"


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        kinds = first.dtype == second.dtype and first.shape == second.shape
        return kinds and (first.is_meta or torch.equal(first.nan_to_num(), second.nan_to_num()))
    return first == second


def _joined(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _process() -> dict[str, Any]:
    """State of torch and Python that a call must leave as it was."""
    watched = {
        f"{owner.__name__}.{name}": (id(vars(owner).get(name)), id(getattr(owner, name, None)))
        for owner, names in _WATCHED.items()
        for name in names
        if name != "apply" and not isinstance(getattr(owner, name, None), types.BuiltinMethodType | types.MethodType)
    }
    return {
        **watched,
        "autograd.Function.apply": id(vars(torch.autograd.Function)["apply"]),
        "type of torch": type(torch),
        "type of math": type(math),
        "names on torch.Tensor": sorted(vars(torch.Tensor)),
        "random state of torch": torch.get_rng_state(),
        "random state of Python": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "gradient mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")],
        "warnings' filters": list(warnings.filters),
        "torch.fx is tracing": _symbolic_trace.is_fx_tracing(),
        "threads": torch.get_num_threads(),
    }
