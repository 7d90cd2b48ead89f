"""Putting a rewritten graph into the module that a training loop holds: same object, same parameters, new contents.

An optimizer knows parameters by identity, and CUDA graphs, shared memory and buckets of DistributedDataParallel know their
memory. So a parameter keeps its object, and its memory too where its shape stays; one that got shorter gets shorter data.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from stp_fx.ir.captured import KEY
from stp_fx.training.commit import Change, entry

__all__ = ["Adoption", "adopt", "keep_forward"]

_CURRENT = "_stp_fx_forward"
"""The global name by which a kept ``forward`` calls the code of the graph."""


@dataclasses.dataclass(frozen=True)
class Adoption:
    """The ``changes`` that make one graph of another; ``added``: parameters that it did not have, by name; ``tensors``: by the
    name of a parameter that gets another shape, its new values."""

    changes: Sequence[Change]
    added: dict[str, nn.Parameter]
    tensors: dict[str, torch.Tensor]


def adopt(held: fx.GraphModule, result: fx.GraphModule) -> Adoption:
    """The changes that turn ``held`` into ``result``, which must not be used any more. ``held`` is not changed yet.

    Parameters and buffers of ``held`` that ``result`` still has by name are kept as objects, with the new values; gradients are
    dropped where the shape changed.
    """
    keep_forward(held)
    changes: list[Change] = []
    added, tensors = _keep_parameters(held, result, changes)
    _keep_buffers(held, result, changes)
    for store in ("_modules", "_parameters", "_buffers"):
        changes.append(entry(held.__dict__, store, result.__dict__[store]))
    for key, value in result.__dict__.items():
        if key.startswith("_tensor_constant") or key in ("_code", "_lineno_map", "_prologue_start", "_in_spec", "_out_spec"):
            changes.append(entry(held.__dict__, key, value))
    changes.append(entry(held.__dict__, "_graph", result.graph))
    changes.append(_owned(result.graph, held))
    changes.append(entry(held.meta, KEY, result.meta[KEY]))
    changes.extend(_run_by(held, type(result).forward))
    return Adoption(changes, added, tensors)


def _keep_parameters(
    held: nn.Module, result: nn.Module, changes: list[Change]
) -> tuple[dict[str, nn.Parameter], dict[str, torch.Tensor]]:
    known = dict(held.named_parameters(remove_duplicate=False))
    renewed: dict[int, nn.Parameter] = {}
    added: dict[str, nn.Parameter] = {}
    tensors: dict[str, torch.Tensor] = {}
    for prefix, module in result.named_modules(remove_duplicate=False):
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            full = f"{prefix}.{name}" if prefix else name
            if id(parameter) not in renewed:
                old = known.get(full)
                renewed[id(parameter)] = parameter if old is None else old
                if old is None:
                    added[full] = parameter
                elif old is not parameter:
                    changes.append(_renewed(old, parameter))
                    if old.shape != parameter.shape:
                        tensors[full] = parameter.data
            module._parameters[name] = renewed[id(parameter)]
            renewed[id(renewed[id(parameter)])] = renewed[id(parameter)]
    return added, tensors


def _renewed(old: nn.Parameter, new: nn.Parameter) -> Change:
    """``old`` with the values of ``new``, and with its memory where the shape changed."""
    data, grad, values, required = old.data, old.grad, new.data, (old.requires_grad, new.requires_grad)
    if _fits(data, values):
        written = _written(data, values)
        return Change(
            lambda: (written.make(), old.requires_grad_(required[1])), lambda: (written.undo(), old.requires_grad_(required[0]))
        )
    # An autograd graph that still exists (a loss that the loop holds, an earlier DistributedDataParallel) keeps the node that
    # accumulates this gradient, and that node keeps the old shape. Other data types make autograd forget the node.
    none = torch.empty(0, dtype=torch.float32 if old.dtype == torch.bfloat16 else torch.bfloat16, device=old.device)

    def make() -> None:
        if old.shape != values.shape:
            old.grad = None
            old.data = none
        old.data = values
        old.requires_grad_(required[1])

    def undo() -> None:
        if old.shape != data.shape:
            old.grad = None
            old.data = none
        old.data = data
        old.grad = grad
        old.requires_grad_(required[0])

    return Change(make, undo)


def _keep_buffers(held: nn.Module, result: nn.Module, changes: list[Change]) -> None:
    known = dict(held.named_buffers(remove_duplicate=False))
    for prefix, module in result.named_modules(remove_duplicate=False):
        for name, buffer in list(module._buffers.items()):
            old = None if buffer is None else known.get(f"{prefix}.{name}" if prefix else name)
            if old is not None and buffer is not None and old is not buffer and _fits(old, buffer):
                changes.append(_written(old.data, buffer.data))
                module._buffers[name] = old


def _fits(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether ``new`` can be written into the memory of ``old``."""
    alike = old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
    plain = old.layout == new.layout == torch.strided and type(old.data) is type(new.data) is torch.Tensor
    return alike and plain and not old.is_inference() and (0 not in old.stride() or old.numel() <= 1)


def _written(old: torch.Tensor, new: torch.Tensor) -> Change:
    """Writes nothing where the values are the same: other processes may be training in shared memory. (``old`` is the ``data`` of
    a tensor, whose version counter is its own: autograd takes no notice.)"""
    if old.is_meta or bool(torch.equal(old, new)):
        return Change(lambda: None, lambda: None)
    before = old.clone()
    return Change(lambda: old.copy_(new), lambda: old.copy_(before))


def _owned(graph: fx.Graph, held: fx.GraphModule) -> Change:
    before = graph.owning_module

    def own(module: Any) -> None:
        graph.owning_module = module

    return Change(lambda: own(held), lambda: own(before))


def _run_current(self: Any, *args: Any, **kwargs: Any) -> Any:
    return _stp_fx_forward(self, *args, **kwargs)  # type: ignore[name-defined]  # noqa: F821


def _run_by(held: fx.GraphModule, function: Any) -> list[Change]:
    """The kept ``forward`` of ``held`` calls ``function``. Its code is a new object: torch.compile counts recompilations by
    it."""
    kept: Any = type(held).forward
    before = kept.__code__, kept.__globals__[_CURRENT]

    def run(code: types.CodeType, current: Any) -> None:
        kept.__globals__[_CURRENT] = kept.__wrapped__ = current
        kept.__code__ = code

    after = _run_current.__code__.replace(), function
    return [Change(lambda: run(*after), lambda: run(*before))]


def keep_forward(gm: fx.GraphModule) -> None:
    """Keeps ``gm.forward`` the same function from now on, however often the graph is compiled anew: it calls the code of the
    graph by a global name.

    A wrapper that is put around it later (the autocast of Accelerate's ``prepare``) holds that function, and would otherwise run
    the old graph. torch.compile guards what a global name stands for, so a module that was compiled around the graph notices
    masks that are made later.
    """
    cls: Any = type(gm)  # every GraphModule has a class of its own
    if "recompile" in vars(cls):
        return
    kept: Any = cls.forward
    first = types.FunctionType(kept.__code__, kept.__globals__, kept.__name__, kept.__defaults__)
    first.__kwdefaults__, first.__annotations__ = kept.__kwdefaults__, dict(kept.__annotations__)
    first.__dict__.update(kept.__dict__)
    kept.__globals__[_CURRENT] = kept.__wrapped__ = first
    kept.__defaults__ = kept.__kwdefaults__ = None
    kept.__code__ = _run_current.__code__.replace()

    def recompile(self: fx.GraphModule) -> Any:
        result = super(cls, self).recompile()  # type: ignore[misc]
        made = cls.forward
        cls.forward = kept
        for change in _run_by(self, made):
            change.make()
        return result

    cls.recompile = recompile
