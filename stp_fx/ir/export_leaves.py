"""Calls that ``torch.export`` must not look into: modules that draw or count, functions with a backward of their own.

An export writes down ATen calls. It would lose that a module asks for its own mode, and what a custom ``autograd.Function`` does
in backward. While :func:`leaves_kept` is active, such calls are one operator of the exported graph, ``stp_fx::leaf``, with a
number; the raiser puts the call back (:mod:`stp_fx.ir.export_raise`).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.fx.node import has_side_effect
from torch.nn.modules import batchnorm, dropout, instancenorm
from torch.utils.checkpoint import CheckpointFunction

from stp_fx.errors import TraceError
from stp_fx.ir.patches import applying
from stp_fx.ir.random_ops import is_random

__all__ = ["LEAF", "Leaf", "leaves_kept"]

LEAF = "stp_fx.leaf"
"""The operator's name, as ``namespace.op``."""
_LIKE_INPUT = (batchnorm._BatchNorm, instancenorm._InstanceNorm, dropout._DropoutNd, nn.RReLU)
"""Modules whose result has the shape and dtype of what they are given."""
_TENSOR, _SIZE = object(), object()
"""Where a tensor or a free size stands among the leaves of a call."""


@dataclasses.dataclass(eq=False)
class Leaf:
    """One call that was kept: of a module of the model by its name, or of an ``autograd.Function``."""

    target: str | type
    shapes: Callable[..., Any]
    spec: pytree.TreeSpec
    leaves: list[Any]
    returned: list[Any] = dataclasses.field(default_factory=list)
    returns: pytree.TreeSpec | None = None

    def operands(self, tensors: Iterable[Any], sizes: Iterable[Any]) -> Any:
        """``(args, kwargs)`` of the call, given its tensors and sizes."""
        return pytree.tree_unflatten(_filled(self.leaves, tensors, sizes), self.spec)

    def run(self, tensors: Iterable[Any], sizes: Iterable[Any]) -> list[torch.Tensor]:
        """Its result, as fake tensors; an operator must not return its own arguments."""
        args, kwargs = self.operands(tensors, sizes)
        leaves, self.returns = pytree.tree_flatten(self.shapes(*args, **kwargs))
        if any(isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)) for leaf in leaves):
            raise TraceError(f"{self._name} returns a free size")
        self.returned = [_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return [torch.empty_like(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def result(self, tensors: Iterable[Any]) -> Any:
        """The result of the call, put together of its tensors."""
        assert self.returns is not None
        return pytree.tree_unflatten(_filled(self.returned, tensors, ()), self.returns)

    def nodes(self, graph: fx.Graph, call: fx.Node) -> tuple[Any, ...]:
        """The tensors that ``call`` returns, a node each.

        Raises:
            TraceError: they are in an object that a graph cannot take apart.
        """
        assert self.returns is not None
        places = pytree.tree_unflatten(list(range(len(self.returned))), self.returns)
        found = []
        for path, place in pytree.tree_flatten_with_path(places)[0]:
            node = call
            for key in path:
                if isinstance(key, pytree.SequenceKey):
                    node = graph.call_function(operator.getitem, (node, key.idx))
                elif isinstance(key, pytree.MappingKey):
                    node = graph.call_function(operator.getitem, (node, key.key))
                else:
                    raise TraceError(f"{self._name} returns an object that a graph cannot take apart")
            if self.returned[place] is _TENSOR:
                found.append(node)
        return tuple(found)

    @property
    def _name(self) -> str:
        return repr(self.target) if isinstance(self.target, str) else self.target.__name__


def _filled(leaves: list[Any], tensors: Iterable[Any], sizes: Iterable[Any]) -> list[Any]:
    given, numbers = iter(tensors), iter(sizes)
    return [next(given) if leaf is _TENSOR else next(numbers) if leaf is _SIZE else leaf for leaf in leaves]


class _Here(threading.local):
    def __init__(self) -> None:
        self.calls: list[Leaf] | None = None
        self.inside = False


_HERE = _Here()
"""The calls that this thread's export has kept so far; None where there is no export."""


@contextmanager
def leaves_kept(model: nn.Module) -> Iterator[list[Leaf]]:
    """A block in which this thread's calls of such modules and functions are kept; gives the list of them, by number."""
    calls: list[Leaf] = []
    with ExitStack() as undo:
        undo.callback(setattr, _HERE, "calls", _HERE.calls)
        undo.enter_context(applying(_applied))
        for name, module in model.named_modules():
            shapes = _shapes_of(module) if name else None
            if shapes is not None:
                undo.callback(module.__dict__.pop, "forward")
                module.__dict__["forward"] = functools.partial(_called, name, module.forward, shapes)
        _HERE.calls = calls
        yield calls


def _shapes_of(module: nn.Module) -> Callable[..., Any] | None:
    """A function that gives what the module gives, as far as shapes go; None for modules that an export may look into."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    if hooked or hasattr(module, "parametrizations"):
        return None
    plain = type(module).forward.__module__.startswith("torch.nn.modules.")
    if plain and isinstance(module, _LIKE_INPUT):
        return torch.empty_like
    if plain and isinstance(module, nn.RNNBase):
        return functools.partial(_recurrent, module)
    if plain and isinstance(module, nn.RNNCellBase):
        return functools.partial(_cell, module)
    return module.forward if is_random(module) else None


def _recurrent(module: nn.RNNBase, x: torch.Tensor, hx: Any = None) -> Any:
    directions = 2 if module.bidirectional else 1
    batch = (x.shape[0 if module.batch_first else 1],) if x.dim() == 3 else ()
    width = module.proj_size or module.hidden_size
    state = x.new_empty((module.num_layers * directions, *batch, width))
    output = x.new_empty((*x.shape[:-1], directions * width))
    if not isinstance(module, nn.LSTM):
        return output, state
    return output, (state, x.new_empty((module.num_layers * directions, *batch, module.hidden_size)))


def _cell(module: nn.RNNCellBase, x: torch.Tensor, hx: Any = None) -> Any:
    state = x.new_empty((*x.shape[:-1], module.hidden_size))
    return (state, torch.empty_like(state)) if isinstance(module, nn.LSTMCell) else state


def _called(name: str, forward: Callable[..., Any], shapes: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if _HERE.calls is None or _HERE.inside or not _takes_tensors(args, kwargs):
        return forward(*args, **kwargs)
    return _keep(_HERE.calls, name, shapes, args, kwargs)


def _applied(function: Any, apply: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``function.apply``. Recomputing in backward (checkpoints) changes no number, so what it holds is looked into."""
    if _HERE.calls is None or _HERE.inside:
        return apply(*args, **kwargs)
    if function is CheckpointFunction:
        return args[0](*args[2:])  # the function, and whether random states are kept
    if function.__module__.startswith("torch.") or not any(isinstance(a, torch.Tensor) for a in pytree.tree_leaves(args)):
        return apply(*args, **kwargs)
    return _keep(_HERE.calls, function, apply, args, kwargs)


def _takes_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a module is called with tensors alone, plain containers of them and None; not with a ``PackedSequence``."""

    def plain(value: Any) -> bool:
        if type(value) in (list, tuple):
            return all(map(plain, value))
        return value is None or isinstance(value, torch.Tensor)

    return bool(args or kwargs) and all(map(plain, (*args, *kwargs.values())))


def _keep(calls: list[Leaf], target: Any, shapes: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    plain = [tuple(value) if isinstance(value, torch.Size) else value for value in args]
    leaves, spec = pytree.tree_flatten((tuple(plain), kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    sizes = [leaf for leaf in leaves if isinstance(leaf, torch.SymInt)]
    if any(isinstance(leaf, (torch.SymFloat, torch.SymBool)) for leaf in leaves):
        raise TraceError(f"a number computed from a free size is given to {target!r}")
    kinds = [_TENSOR if isinstance(leaf, torch.Tensor) else _SIZE if isinstance(leaf, torch.SymInt) else leaf for leaf in leaves]
    calls.append(Leaf(target, shapes, spec, kinds))
    return calls[-1].result(_operator()[0](tensors, sizes, len(calls) - 1))


@functools.cache
def _operator() -> tuple[Any, torch.library.Library]:
    """``stp_fx::leaf``, made once in a process, and what defines it, with which it would go."""
    library = torch.library.Library("stp_fx", "FRAGMENT")
    library.define("leaf(Tensor[] tensors, SymInt[] sizes, int key) -> Tensor[]")
    torch.library.register_fake("stp_fx::leaf", _fake, lib=library)
    has_side_effect(torch.ops.stp_fx.leaf.default)  # it may write to buffers, whether its result is read or not
    return torch.ops.stp_fx.leaf, library


def _fake(tensors: list[torch.Tensor], sizes: list[Any], key: int) -> list[torch.Tensor]:
    assert _HERE.calls is not None, "an operator of exports only"
    _HERE.inside = True
    try:
        return _HERE.calls[key].run(tensors, sizes)
    finally:
        _HERE.inside = False
