"""Running a user's model for real, and putting back all that it writes: buffers, counters, parameters, lists, random state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from stp_fx.ir._torch_compat import set_versions
from stp_fx.ir.kept import containers_kept, state_kept
from stp_fx.ir.schema import writes_to
from stp_fx.ir.train_eval import modes_kept

__all__ = ["AsItWas", "as_it_was", "same_bits"]

_COPIED = 1 << 22
"""Elements of a buffer that is copied before anything runs; larger tensors, and parameters, are copied when written to."""


class AsItWas:
    """The tensors of some modules as they were; :meth:`restore` writes back what has changed, version counters included."""

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        stores = [store for root in roots for m in root.modules() for store in (m._parameters, m._buffers)]
        found = {id(t): t for store in stores for t in store.values() if t is not None and _is_dense(t)}
        gradients = {id(t.grad): t.grad for t in found.values() if t.is_leaf and t.grad is not None}
        self._owners = [(t, t.grad, t.requires_grad) for t in found.values() if t.is_leaf]
        self._tensors = {**found, **gradients}
        self._memory = [(t, t.detach()) for t in found.values() if t.is_leaf and not t.is_inference()]
        self._versions = {key: t._version for key, t in self._tensors.items() if not t.is_inference()}
        buffers = {id(t) for root in roots for t in root.buffers() if t.numel() <= _COPIED}
        self._named = {id(root): dict(root.named_buffers(remove_duplicate=False)) for root in roots}
        self._before = {key: t.detach().clone() for key, t in self._tensors.items() if key in buffers}
        self.assigned: list[str] = []
        """After the block: paths of the attributes and containers that others were put in, each behind the number of its root."""
        self.mode = _CopyOnWrite(self._tensors, self._before)

    def changed(self, root: nn.Module) -> dict[str, torch.Tensor]:
        """Copies of the buffers of ``root`` that have been written to, or in whose place others of that form have been put."""
        known = {name: self._before[id(t)] for name, t in self._named[id(root)].items() if id(t) in self._before}
        now = [(name, t, known[name]) for name, t in root.named_buffers(remove_duplicate=False) if name in known]
        alike = [each for each in now if (each[1].shape, each[1].dtype) == (each[2].shape, each[2].dtype)]
        return {name: t.detach().clone() for name, t, before in alike if not same_bits(t, before)}

    def restore(self) -> None:
        """Everything back, bit for bit."""
        for tensor, data in self._memory:
            if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape or tensor.stride() != data.stride():
                tensor.data = data  # ``.data = ...`` has put other memory there
        for key, before in self._before.items():
            tensor = self._tensors[key]
            if not same_bits(tensor, before):
                with torch.no_grad():
                    tensor.detach().copy_(before)
        versions = {key: v for key, v in self._versions.items() if self._tensors[key]._version != v}
        if versions:
            set_versions([self._tensors[key] for key in versions], list(versions.values()))
        for tensor, grad, required in self._owners:
            if tensor.grad is not grad:
                tensor.grad = grad
            if tensor.requires_grad != required:
                tensor.requires_grad_(required)


@contextmanager
def as_it_was(*roots: nn.Module) -> Iterator[AsItWas]:
    """A block in which modules may run in any mode; afterwards they, and the process's random state, are as before."""
    held = AsItWas(roots)
    try:
        with containers_kept(nn.ModuleList(roots), held.assigned), state_kept(), modes_kept(nn.ModuleList(roots)), held.mode:
            yield held
    finally:
        held.restore()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape hold the same; NaN is NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    return a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all())


class _CopyOnWrite(TorchDispatchMode):
    """Copies a watched tensor before an op writes to its memory, by whatever name (``.data``, a view)."""

    supports_higher_order_operators = True

    def __init__(self, watched: dict[int, torch.Tensor], before: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self._before = before
        self._by_memory: dict[int, list[torch.Tensor]] = {}
        for tensor in watched.values():
            if _memory(tensor):
                self._by_memory.setdefault(_memory(tensor), []).append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for place in writes_to(func):
            name = func._schema.arguments[place].name
            value = args[place] if place < len(args) else kwargs.get(name)
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                self._copy(tensor)
        return func(*args, **kwargs)

    def _copy(self, tensor: Any) -> None:
        for each in self._by_memory.get(_memory(tensor), ()) if isinstance(tensor, torch.Tensor) else ():
            if id(each) not in self._before:
                self._before[id(each)] = each.detach().clone()


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether there are numbers to keep; of sparse tensors, which have no memory of their own, there are none here."""
    return not tensor.is_meta and tensor.layout is torch.strided


def _memory(tensor: torch.Tensor) -> int:
    """The address of a tensor's storage; 0 where it has none."""
    try:
        return 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, nested, a subclass without memory of its own
        return 0
