"""Written-out norms become calls: ``x * rsqrt(mean(x^2) + eps) * weight`` becomes ``F.rms_norm(x, [C], weight, eps)``.

The calls around a square root are compared with torch's own norm on random numbers, small ones among them, so that epsilon
shows. Their spelling and their casts do not matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from stp_fx.ir.runner import call, operands
from stp_fx.rewrite.basis.probe import Probe, same

__all__ = ["FusedNorm", "fuse_norm", "written_norms"]

_ROOTS = {torch.rsqrt, torch.sqrt, torch.pow, "rsqrt", "sqrt", "pow", "__pow__"}
_DEPTH = 10
"""Nodes between a value and the root of its mean square."""
_CALLS = {"rms": F.rms_norm, "layer": F.layer_norm}


@dataclasses.dataclass(frozen=True)
class FusedNorm:
    """``kind`` "rms" or "layer" of the value of node ``value``, at node ``result``; ``weight`` and ``bias`` are nodes that read
    parameters. Names and numbers, so that another process can do the same to the same graph."""

    kind: str
    value: str
    result: str
    weight: str | None
    bias: str | None
    size: int
    eps: float


def fuse_norm(gm: fx.GraphModule, norm: FusedNorm) -> None:
    """Puts the call in place of what is written out, in place; the caller recompiles."""
    nodes = {node.name: node for node in gm.graph.nodes}
    result = nodes[norm.result]
    affine = [None if name is None else nodes[name] for name in (norm.weight, norm.bias)][: 1 if norm.kind == "rms" else 2]
    with gm.graph.inserting_after(result):
        made = gm.graph.call_function(_CALLS[norm.kind], (nodes[norm.value], (norm.size,), *affine, norm.eps))
    result.replace_all_uses_with(made)
    pending, erased = [result], set[fx.Node]()
    while pending:
        dead = pending.pop()
        if (
            dead not in erased
            and not dead.users
            and dead.op in ("call_function", "call_method")
            and dead.target is not torch._assert
        ):
            pending += dead.all_input_nodes
            erased.add(dead)
            gm.graph.erase_node(dead)


def written_norms(probe: Probe) -> list[FusedNorm]:
    """The norms over a last dimension that a graph has written out, the last first: one may read what another gives, by name."""
    found: list[FusedNorm] = []
    for node in probe.values:
        if node.op in ("call_function", "call_method") and (
            node.target in _ROOTS or getattr(node.target, "__name__", "") == "pow"
        ):
            made = _around(probe, node)
            if made is not None:
                found.append(made)
    return found[::-1]


def _around(probe: Probe, root: fx.Node) -> FusedNorm | None:
    """The norm of which ``root`` is the root of the mean square: of the value that is farthest back."""
    best = None
    for value in _before(probe, root):
        if _between(probe, value, root) is None:
            continue
        for end in _ends(probe, root):
            whole = _between(probe, value, end)
            kind_eps = None if whole is None else _compared(probe, value, [*whole, end])
            if kind_eps is not None:
                best = _with_affine(probe, value, end, *kind_eps)
    return best


def _before(probe: Probe, root: fx.Node) -> Iterator[fx.Node]:
    """Floating values that ``root`` depends on, nearest first."""
    seen, level = {root}, [root]
    for _ in range(_DEPTH):
        level = [n for node in level for n in node.all_input_nodes if n not in seen and _is_activation(probe, n)]
        level = list(dict.fromkeys(level))
        seen |= set(level)
        yield from level


def _is_activation(probe: Probe, node: fx.Node) -> bool:
    value = probe.values[node]
    return node.op != "get_attr" and isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 0


def _between(probe: Probe, value: fx.Node, root: fx.Node) -> list[fx.Node] | None:
    """The nodes from ``value`` to ``root`` in graph order, without both; None if something else flows in."""
    inner: set[fx.Node] = set()
    pending = [root]
    while pending:
        for node in pending.pop().all_input_nodes:
            if node is value or node in inner or not _is_activation(probe, node):
                continue
            if node.op not in ("call_function", "call_method") or len(inner) > _DEPTH:
                return None
            inner.add(node)
            pending.append(node)
    return [node for node in probe.values if node in inner]


def _ends(probe: Probe, root: fx.Node) -> Iterator[fx.Node]:
    """Products and quotients with the root; a cast or a reciprocal may stand between."""
    for user in root.users:
        others = [n for n in user.all_input_nodes if n is not root]
        for end in (user,) if others else user.users:
            if end in probe.values and end.op in ("call_function", "call_method") and _is_activation(probe, end):
                yield end


def _compared(probe: Probe, value: fx.Node, nodes: list[fx.Node]) -> tuple[str, float] | None:
    """Which norm of ``value`` the last of ``nodes`` is, and its epsilon."""
    actual = probe.values[value]
    drawn = probe.drawn(actual) / 1e5
    rows = drawn.reshape(-1, drawn.shape[-1])
    scale = torch.logspace(-4, 1, 6, dtype=rows.dtype, device=rows.device).repeat(len(rows) // 6 + 1)[: len(rows)]
    drawn = (rows * scale[:, None]).reshape(drawn.shape)
    values: dict[fx.Node, Any] = {value: drawn}
    try:
        with torch.no_grad():
            for node in nodes:
                args, kwargs = operands(node, lambda n: values.get(n, probe.values[n]))
                values[node] = call(node, args, kwargs, probe.root.get_submodule)
    except Exception:  # another function, which takes no such numbers
        return None
    result = values[nodes[-1]]
    if not isinstance(result, torch.Tensor) or result.shape != drawn.shape:
        return None
    for eps in _numbers(nodes):
        for kind, norm in _CALLS.items():
            if same(result, norm(drawn, (drawn.shape[-1],), eps=eps).to(result)):
                return kind, eps
    return None


def _numbers(nodes: list[fx.Node]) -> list[float]:
    found: list[float] = []
    for node in nodes:
        found += [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, float) and a > 0]
    return found


def _with_affine(probe: Probe, value: fx.Node, end: fx.Node, kind: str, eps: float) -> FusedNorm:
    """Takes in casts, and a stored scale and shift, that follow."""
    size, weight, bias, result = probe.values[value].shape[-1], None, None, end
    while len(result.users) == 1:
        (user,) = result.users
        stored = [n for n in user.all_input_nodes if n.op == "get_attr"]
        others = [n for n in user.all_input_nodes if n is not result and n not in stored]
        name = getattr(user.target, "__name__", str(user.target)).rstrip("_")
        is_vector = len(stored) == 1 and probe.values[stored[0]].shape == (size,)
        if not stored and name in ("to", "float", "type_as", "double", "half", "bfloat16"):
            result = user
        elif weight is None and bias is None and is_vector and not others and name in ("mul", "multiply"):
            weight, result = stored[0], user
        elif kind == "layer" and weight is not None and bias is None and is_vector and not others and name == "add":
            bias, result = stored[0], user
        else:
            break
    scale, shift = (None if node is None else node.name for node in (weight, bias))
    return FusedNorm(kind, value.name, result.name, scale, shift, size, eps)
