"""Where a module and a graph, which run on the same arguments, begin to differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from stp_fx.ir.modes import OneMode
from stp_fx.writeback.calls import Arguments, as_call
from stp_fx.writeback.sizes import KINDS, Sizes

__all__ = ["first_difference", "kept_scales", "literals_before"]

Trace = list[tuple[str, torch.Tensor]]
"""The modules with parameters of their own, in the order in which they are used, and what they read."""


class _Recorder(OneMode):
    """Runs a graph and notes what its modules, and the functions that take parameters, read first."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, gm.graph, gm.training)
        self.trace: Trace = []

    def run_node(self, n: fx.Node) -> Any:
        if n in self.left_out:
            return None
        owner = (
            str(n.target) if n.op == "call_module" else next((_owner(i) for i in n.all_input_nodes if i.op == "get_attr"), None)
        )
        read = next((self.env[i] for i in n.all_input_nodes if i.op != "get_attr" and i in self.env), None)
        if owner is not None and isinstance(read, torch.Tensor):
            self.trace.append((owner, read))
        return super().run_node(n)


def _owner(node: fx.Node) -> str:
    return str(node.target).rpartition(".")[0]


def first_difference(gm: fx.GraphModule, model: nn.Module, arguments: Arguments) -> str | None:
    """The path of the module in whose code the two part: around the first one that reads something else; None if not found."""
    recorder = _Recorder(gm)
    recorder.run(*(arguments[str(n.target)] for n in gm.graph.nodes if n.op == "placeholder"))
    expected: dict[str, list[torch.Tensor]] = {}
    for name, value in recorder.trace:
        expected.setdefault(name, []).append(value)
    before = ""
    for name, value in _reads(model, arguments):
        known = expected.get(name)
        if not known:
            continue
        if not _alike(known.pop(0), value):
            return _common(before, name)
        before = name
    return None


def _reads(model: nn.Module, arguments: Arguments) -> Trace:
    trace: Trace = []
    names = {id(m): name for name, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], torch.Tensor):
            trace.append((names[id(module)], args[0]))

    handles = [m.register_forward_pre_hook(note) for m in model.modules() if id(m) in names]
    try:
        positional, named = as_call(model, arguments)
        model(*positional, **named)
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same numbers, in whichever layout: their moments agree."""
    if one.numel() != other.numel():
        return False
    a, b = one.double().flatten(), other.double().flatten()
    scale = a.abs().mean().clamp_min(1e-30)
    return all(bool(((m(a) - m(b)).abs() / scale) < 1e-3) for m in (torch.mean, torch.std, lambda t: t.abs().mean()))


def _common(before: str, name: str) -> str:
    """The module that holds both."""
    first, second = before.split("."), name.split(".")
    shared = [a for a, b in zip(first, second) if a == b]
    depth = next((k for k, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
    return ".".join(shared[:depth]) if depth < len(second) else ".".join(second[:-1])


def kept_scales(gm: fx.GraphModule, sizes: Sizes) -> Iterator[str]:
    """Numbers in the graph that are 1 / sqrt(n) of a size n that has changed: code that computes them gets another number."""
    seen: set[int] = set()
    numbers: list[float] = []
    for node in gm.graph.nodes:
        map_aggregate((node.args, node.kwargs), lambda v: numbers.append(v) if isinstance(v, float) else v)
    for number in numbers:
        size = round(number**-2) if 1e-4 < number < 1 else 0
        if size in seen or size < 2 or abs(size**-0.5 - number) > 1e-6:
            continue
        seen.add(size)
        became = sizes.what_became(size, ("",))
        new = next((n for kind in KINDS for n in became.get(kind, []) if n != size), None)
        if new is not None:
            yield f"the scale {number:.4g} = {size} ** -0.5, which the graph keeps and code computes from a size ({new} now)"


def literals_before(gm: fx.GraphModule, module: str) -> Iterator[str]:
    """The pieces into which the graph cuts what a module reads: code that cuts evenly (``chunk``) has no number to change."""
    node = next((n for n in gm.graph.nodes if n.op == "call_module" and n.target == module), None)
    node = node or next(
        (n for n in gm.graph.nodes for i in n.all_input_nodes if i.op == "get_attr" and _owner(i) == module), None
    )
    for _ in range(4):
        node = None if node is None else next((i for i in node.all_input_nodes if i.op != "get_attr"), None)
        if node is None:
            return
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        if "split" in name or "chunk" in name:
            pieces = [a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, (int, list, tuple))]
            yield f"the pieces that '{module}' reads one of: {name}({', '.join(map(str, pieces))}) in the pruned graph"
            return
