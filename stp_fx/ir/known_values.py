"""Numbers that a forward asks of tensors (``.item()``, ``int()``, a branch), where they are known while it is traced.

They are where they follow from buffers, constants and sizes; of whole numbers among the inputs, such as lengths, the example
tells them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from stp_fx.errors import TraceError
from stp_fx.ir.active import suspended
from stp_fx.ir.in_place import may_write
from stp_fx.ir.meta_run import AsksForNumber
from stp_fx.ir.proxies import user_line
from stp_fx.ir.runner import operands
from stp_fx.ir.shapes import fetch

__all__ = ["Known", "buffers_read", "evaluated", "known_value"]


@dataclasses.dataclass
class Known:
    """The facts that a trace knows. ``sizes``: nodes whose numbers were used; ``read``: names of inputs whose values were.

    ``finite``: numbers of the data may be taken for finite; ``assumed``: they were.
    """

    root: nn.Module
    assigned: set[str]
    given: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    sizes: list[fx.Node] = dataclasses.field(default_factory=list)
    read: list[str] = dataclasses.field(default_factory=list)
    finite: bool = False
    assumed: bool = False
    values: dict[fx.Node, Any] = dataclasses.field(default_factory=dict)
    """By node, what was worked out; None: unknown."""


def known_value(known: Known, node: fx.Node) -> Any:
    """The value of a node, if it follows from known values and the forward has not written to so far; else None."""
    waiting, values = [node], known.values
    while waiting:
        each = waiting[-1]
        inputs = [] if _is_given(known, each) else each.all_input_nodes
        if any(n in values and values[n] is None for n in inputs):
            values[waiting.pop()] = None
        elif missing := [n for n in inputs if n not in values]:
            waiting.append(missing[0])
        else:
            values[waiting.pop()] = _from_inputs(known, each) if inputs else _given(known, each)
    return values[node]


def _is_given(known: Known, node: fx.Node) -> bool:
    """Whether nothing tells a node's value but the node itself."""
    number = isinstance(node.meta["val"], (bool, int, float))
    return (
        number or (known.finite and _name(node) in _FINITE) or node.op not in ("call_function", "call_method") or may_write(node)
    )


def _given(known: Known, node: fx.Node) -> Any:
    if isinstance(node.meta["val"], (bool, int, float)):
        known.sizes.append(node)
        return node.meta["val"]
    if known.finite and _name(node) in _FINITE:
        known.assumed = True
        return torch.full(node.meta["val"].shape, _name(node) == "isfinite")
    if node.op == "placeholder" and node.target in known.given and not _is_written(node):
        known.read.append(str(node.target))
        return known.given[str(node.target)]
    if node.op == "get_attr":
        with suspended():
            value = fetch(known.root, str(node.target))
            fixed = isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter) and not value.is_meta
            return value.detach() if fixed and node.target not in known.assigned and not _is_written(node) else None
    return None


def _from_inputs(known: Known, node: fx.Node) -> Any:
    """The result of a call for the values of its inputs; None if it draws random numbers."""
    args, kwargs = operands(node, known.values.__getitem__)
    before = torch.get_rng_state()
    with suspended(), torch.no_grad():
        value = _called(node, args, kwargs)
    if not torch.equal(before, torch.get_rng_state()):
        torch.set_rng_state(before)
        return None
    return value


def evaluated(
    node: fx.Node,
    evaluate: Callable[[fx.Node], Any],
    known: Callable[[fx.Node], torch.Tensor | None],
    selections: bool = False,
) -> Any:
    """The result of ``evaluate`` for a node.

    A call that takes a number (``new_full(size, stride)``, ``x[:count]``) may be given a tensor. The node then gets the number.
    ``selections``: the graph has selected by data before, so that a size may be made up, and whatever fails may fail for it.

    Raises:
        TraceError: the shape, or a number that the call takes, depends on the data.
    """
    try:
        return evaluate(node)
    except AsksForNumber as error:
        for _ in _numbers_put_in(node, known):
            with contextlib.suppress(AsksForNumber):
                return evaluate(node)
        raise TraceError(
            f"{node.format_node()} at {user_line()} takes the number of a tensor whose value depends on the data: give it a "
            "number, or prune a submodule without it"
        ) from error
    except RuntimeError as error:
        if not (selections or isinstance(error, NotImplementedError)):
            raise
        raise TraceError(
            f"{node.format_node()} at {user_line()} gives a shape that depends on the data (a boolean mask as "
            "an index, nonzero, unique and the like): use an integer index, or prune a submodule without it"
        ) from error


def _numbers_put_in(node: fx.Node, known: Callable[[fx.Node], torch.Tensor | None]) -> Iterator[None]:
    """Puts numbers in the place of tensors of one known element, from the last operand on: tensors come first in signatures."""
    for operand in reversed(node.all_input_nodes):
        value = operand.meta.get("val")
        found = known(operand) if isinstance(value, torch.Tensor) and value.numel() == 1 else None
        if found is not None:
            number = found.item()
            put = functools.partial(_in_place_of, operand, number)
            node.args, node.kwargs = map_arg(node.args, put), map_arg(node.kwargs, put)
            yield


def _in_place_of(replaced: fx.Node, number: Any, node: fx.Node) -> Any:
    return number if node is replaced else node


_FINITE = frozenset({"isfinite", "isinf", "isnan"})
"""The question of code that clamps overflows of half precision."""


def _name(node: fx.Node) -> str:
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))


def buffers_read(node: fx.Node, ours: tuple[str, ...]) -> list[str]:
    """Names of the buffers that a node follows from; constants of a trace, whose names begin with ``ours``, are none."""
    waiting, seen, names = [node], {node}, {}
    while waiting:
        each = waiting.pop()
        if each.op == "get_attr":
            names[str(each.target)] = None
        elif not isinstance(each.meta["val"], (bool, int, float)):
            new = [n for n in each.all_input_nodes if n not in seen]
            seen.update(new)
            waiting += reversed(new)
    return [name for name in names if not name.startswith(ours)]


def _called(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _is_written(node: fx.Node) -> bool:
    """Whether anything that follows from a node writes to what it is given: it may be a view."""
    waiting, seen = [node], {node}
    while waiting:
        new = [user for user in waiting.pop().users if user not in seen]
        if any(map(may_write, new)):
            return True
        seen.update(new)
        waiting += new
    return False
