"""Sizes and positions written in the graph: which calls carry them, and how a rewrite renews them.

Rules speak of ATen; a graph speaks of ``torch.reshape``, ``x.view``, ``x[:, :8]``. A *handler* renews the literals of one such
call once channels are gone. A call without a handler either follows the shapes of its operands, or is strict: what it cuts
is pinned, since nobody could put its numbers right.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from stp_fx.ir.train_eval import AutogradCall, ModeSwitch, attention_with_dropout
from stp_fx.rules.domain import Dim, Dims, dim_size

__all__ = [
    "Edit",
    "Policy",
    "TensorDims",
    "handler_for",
    "is_recurrent",
    "is_size_call",
    "literal",
    "module_handler_for",
    "module_literal",
    "policy_of",
]


class Policy(enum.Enum):
    """What may happen to literals inside one graph node."""

    EDITABLE = "its literals can be rewritten"
    FOLLOWS = "its sizes follow its operands"
    KEEPS = "views inside follow its operands, but new axes are numbers of its own"
    STRICT = "its sizes cannot be rewritten"
    OPAQUE = "a module that hides how it uses its parameters"


@dataclasses.dataclass(frozen=True)
class TensorDims:
    """Leaf of a node's recorded value: the factors of one tensor."""

    dims: Dims


@dataclasses.dataclass
class Edit:
    """One node of the graph being rewritten, with everything a handler needs.

    ``args`` and ``kwargs`` are evaluated in the new graph (numbers are numbers, tensors are meta), ``old_args`` and
    ``old_kwargs`` hold the numbers of the old one: positions are those of old axes. ``source`` are the old factors of the
    first tensor operand, ``result`` those of the value. ``keep`` tells which positions of an old dimension stay.
    Handlers write ``node.args`` / ``node.kwargs`` / ``node.target``.
    """

    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    source: Dims
    result: Any
    keep: Callable[[Dim], np.ndarray]
    module: Any = None
    operands: tuple[Any, ...] = ()
    old_args: tuple[Any, ...] = ()
    old_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def size(self, dim: Dim) -> int:
        """How many positions of an old dimension stay."""
        return int(self.keep(dim).sum()) if dim else 1

    def changed(self, dim: Dim) -> bool:
        return self.size(dim) != dim_size(dim)

    def result_dims(self) -> Dims:
        return self.result.dims

    def set_arg(self, position: int, name: str, value: Any) -> None:
        """Replaces an argument where the call has it, positional or by name; appends it as a keyword if it has neither."""
        if position < len(self.node.args):
            self.node.update_arg(position, value)
        else:
            self.node.update_kwarg(name, value)

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def old(self, position: int, name: str, default: Any = None) -> Any:
        """An argument with the numbers of the old graph."""
        return self.old_args[position] if position < len(self.old_args) else self.old_kwargs.get(name, default)

    def renew(self, position: int, name: str, value: Any) -> None:
        """Writes ``value`` unless the argument has it already; what is computed in the graph stays computed."""
        if self.arg(position, name) != value:
            self.set_arg(position, name, value)


Handler = Callable[[Edit], None]

_HANDLERS: dict[Any, Handler] = {}
_MODULES: dict[type[nn.Module], Handler] = {}


def literal(*targets: Any) -> Callable[[Handler], Handler]:
    """Registers a handler for functions, or for method names (strings)."""

    def register(handler: Handler) -> Handler:
        for target in targets:
            _HANDLERS[target] = handler
        return handler

    return register


def module_literal(*types: type[nn.Module]) -> Callable[[Handler], Handler]:
    """Registers a handler for a module's attributes (``out_channels``, ``normalized_shape`` ...)."""

    def register(handler: Handler) -> Handler:
        for module_type in types:
            _MODULES[module_type] = handler
        return handler

    return register


def handler_for(node: fx.Node) -> Handler | None:
    return _HANDLERS.get(node.target) if node.op in ("call_function", "call_method") else None


_NUMBERS_ARE_NOT_SIZES = {F.scaled_dot_product_attention, F.group_norm, torch.group_norm, F.layer_norm, torch.layer_norm}


def is_size_call(node: fx.Node) -> bool:
    """Whether the numbers a call is given are sizes and positions, which its handler renews."""
    return handler_for(node) is not None and node.target not in _NUMBERS_ARE_NOT_SIZES


def module_handler_for(module: nn.Module) -> Handler | None:
    for base in type(module).__mro__:
        if base in _MODULES:
            return _MODULES[base]
    return None


_FOLLOWS = {
    torch.matmul,
    torch.bmm,
    torch.mm,
    torch.addmm,
    torch.baddbmm,
    torch.einsum,
    torch.tensordot,
    torch.mv,
    torch.dot,
    torch.outer,
    torch.cdist,
    operator.matmul,
    F.linear,
    F.bilinear,
    F.normalize,
    F.instance_norm,
    F.batch_norm,
    F.prelu,
    attention_with_dropout,
    "matmul",
    "__matmul__",
    "bmm",
    "mm",
    "expand_as",
    "view_as",
    "reshape_as",
    "type_as",
    "masked_fill",
    "masked_fill_",
    "where",
}

_KEEPS = {
    torch.flatten,
    torch.repeat_interleave,
    torch.tile,
    torch.movedim,
    torch.moveaxis,
    torch.swapaxes,
    torch.transpose,
    torch.permute,
    torch.squeeze,
    torch.unsqueeze,
    torch.cat,
    torch.concat,
    torch.stack,
    torch.hstack,
    torch.vstack,
    torch.dstack,
    torch.unbind,
    torch.flip,
    torch.cosine_similarity,
    torch.meshgrid,
    torch.broadcast_tensors,
    F.cosine_similarity,
    F.interpolate,
    F.unfold,
    F.fold,
    F.pixel_shuffle,
    F.pixel_unshuffle,
    F.local_response_norm,
    F.embedding,
    F.lp_pool2d,
    F.adaptive_avg_pool1d,
    F.max_pool1d,
    F.avg_pool1d,
    F.dropout2d,
    "flatten",
    "repeat",
    "repeat_interleave",
    "tile",
    "contiguous",
    "squeeze",
    "unsqueeze",
    "permute",
    "transpose",
    "t",
    "unbind",
    "flip",
    "movedim",
    "swapaxes",
    "ravel",
}

_PLAIN_MODULES = ("torch.nn.modules.", "torchvision.ops.")


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module cuts its own values into gates and starts from zeros of its own, all renewed with its hidden size."""
    return isinstance(module, (nn.RNNBase, nn.RNNCellBase))


def policy_of(node: fx.Node, module: nn.Module | None) -> Policy:
    """How the analysis may treat literals inside ``node``; ``module`` is the submodule of a ``call_module``."""
    if isinstance(module, AutogradCall):
        return Policy.OPAQUE
    if isinstance(module, ModeSwitch):
        return Policy.FOLLOWS if module.function in _FOLLOWS else Policy.STRICT
    if node.op == "call_module" and module is not None:
        if module_handler_for(module) is not None:
            return Policy.EDITABLE if is_recurrent(module) else Policy.FOLLOWS
        if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
            return Policy.OPAQUE
        return Policy.KEEPS if type(module).__module__.startswith(_PLAIN_MODULES) else Policy.STRICT
    if handler_for(node) is not None:
        return Policy.EDITABLE
    if node.target in _FOLLOWS:
        return Policy.FOLLOWS
    if node.target in _KEEPS:
        return Policy.KEEPS
    return Policy.STRICT
