"""Tracing runs the user's code, which may write: to attributes, lists, random state. All of it is put back.

Proxies that a forward leaves in a list of its module, or in one that a hook holds, would otherwise stay there. Containers are
restored in place, so that whoever holds them sees them as before.
"""

from __future__ import annotations

import functools
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import nn

__all__ = ["containers_kept", "state_kept"]

_DEEPEST = 12
_MOST = 200_000
"""Objects that are looked at. Deeper objects, and those beyond this number, are not restored."""
_PLAIN = {
    *(int, float, complex, str, bytes, bool, type, type(None), types.BuiltinFunctionType),
    *(torch.Size, torch.dtype, torch.device),
}
_STORES = ("_parameters", "_buffers", "_modules")
_EMPTY: dict[str, Any] = {}
_FOREIGN = (
    *("torch.", "numpy", "builtins", "collections", "functools", "typing", "stp_fx.ir"),
    *("threading", "queue", "multiprocessing", "concurrent", "asyncio", "logging", "socket", "subprocess"),
)
"""Where the classes come from whose objects are not looked into; locks, events and queues belong to other threads as well."""
_LARGEST = 1 << 22
"""Elements of a tensor whose values are remembered; larger ones are data that a forward reads."""


_KEPT_ELSEWHERE = (nn.Parameter, type(None))
"""The contents of a module's stores that :meth:`_Contents._visit` would pass over."""


class _Contents:
    """Containers that can be reached from a module, with what they held, and the paths by which they were found."""

    def __init__(self, root: nn.Module) -> None:
        self.containers: list[tuple[str, Any, Any]] = []
        self.tensors: list[tuple[torch.Tensor, int, torch.Tensor]] = []
        self.generators: list[tuple[str, Any, Any]] = []
        self.drawn: list[str] = []
        """Paths of generators from which :meth:`restore` has found that numbers were drawn."""
        self._defaults: dict[int, dict[str, Any]] = {}
        """Of modules, by the id of their attributes: the attributes of the class, which an assignment hides."""
        self._seen: dict[int, Any] = {}
        self._visit(root, "", 0)

    def _visit(self, value: Any, path: str, depth: int) -> None:
        kind = type(value)
        if kind in _PLAIN or id(value) in self._seen or depth > _DEEPEST or len(self._seen) > _MOST:
            return
        self._seen[id(value)] = value  # whose id is its own as long as it lives
        if isinstance(value, dict):
            self.containers.append((path, value, dict(value)))
            for key, item in value.items():
                self._visit(item, _joined(path, key), depth + 1)
        elif isinstance(value, (list, tuple, deque, set)):
            if not isinstance(value, tuple):
                self.containers.append((path, value, list(value)))
            for item in value:
                self._visit(item, path, depth + 1)
        elif isinstance(value, nn.Module):
            self._visit_module(value, path, depth)
        elif isinstance(value, torch.Tensor):
            self._visit_tensor(value)
        elif (state := _generator_state(value)) is not None:
            self.generators.append((path, value, state))
        else:
            for item in _parts(value, kind):
                self._visit(item, path, depth + 1)

    def _visit_module(self, module: nn.Module, path: str, depth: int) -> None:
        attributes = module.__dict__
        self._defaults[id(attributes)] = type(module).__dict__  # type: ignore[assignment]
        self.containers.append((path, attributes, dict(attributes)))
        for key, item in attributes.items():
            if type(item) in _PLAIN:
                continue
            if type(item) is OrderedDict and not item:  # of hooks, mostly
                self.containers.append((path, item, _EMPTY))
            elif key in _STORES:
                self.containers.append((path, item, dict(item)))
                for name, stored in item.items():
                    if type(stored) in _KEPT_ELSEWHERE:
                        continue
                    self._visit(stored, _joined(path, name), depth)  # the depth of a module does not count
            else:
                self._visit(item, _joined(path, key), depth + 1)
        for item in _class_containers(type(module)):
            self._visit(item, path, depth + 1)

    def _visit_tensor(self, tensor: torch.Tensor) -> None:
        small = tensor.numel() <= _LARGEST and tensor.layout is torch.strided and not tensor.is_meta
        if small and not isinstance(tensor, nn.Parameter):
            self.tensors.append((tensor, tensor._version, tensor.detach().clone()))

    def replaced(self) -> Iterator[tuple[Any, Any]]:
        """The values of attributes that hold something else now: before, and now."""
        for _, container, before in self.containers:
            if isinstance(container, dict):
                yield from ((value, container[k]) for k, value in before.items() if container.get(k, value) is not value)

    def restore(self, ours: tuple[str, ...], ran: bool = False) -> list[str]:
        """Puts everything back, but for keys of the library's own; returns the paths of what was written to.

        Kernels, as batch norm's, write to buffers without a new version: ``ran`` says that some have run.
        """
        changed: list[str] = []
        for path, container, before in self.containers:
            if not container and not before:
                continue
            if isinstance(container, dict):
                hidden = [key for key in container if key not in before and key in self._defaults.get(id(container), ())]
                changed += [_joined(path, key) for key in (*hidden, *_restore_dict(container, before, ours))]
            elif len(container) != len(before) or not all(map(is_, container, before)):
                changed.append(path)
                container.clear()
                (container.update if isinstance(container, set) else container.extend)(before)
        for path, generator, state in self.generators:
            if not _same_state(_generator_state(generator), state):
                self.drawn.append(path)
                _set_generator(generator, state)
        for tensor, version, value in self.tensors:
            if tensor._version != version or (ran and not torch.equal(tensor, value)):
                with torch.no_grad():
                    tensor.copy_(value)
        return changed


def _generator_state(value: Any) -> Any:
    """The state of a generator of random numbers that an object holds; None for anything else."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return value.get_state(legacy=False)
    return value.bit_generator.state if numpy is not None and isinstance(value, numpy.random.Generator) else None


def _set_generator(value: Any, state: Any) -> None:
    if isinstance(value, random.Random):
        value.setstate(state)
    elif hasattr(value, "bit_generator"):
        value.bit_generator.state = state
    else:
        value.set_state(state)


def _same_state(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else repr(one) == repr(other)


def _joined(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _parts(value: Any, kind: type) -> Iterator[Any]:
    """Other objects that may hold containers: closures of functions, the objects of bound methods, plain objects."""
    if kind is types.FunctionType:
        if not str(value.__module__).startswith(_FOREIGN):
            for cell in value.__closure__ or ():
                try:
                    yield cell.cell_contents
                except ValueError:  # not filled yet
                    continue
    elif kind is types.MethodType:
        yield value.__self__
    elif kind is functools.partial:
        yield from (value.func, *value.args, *value.keywords.values())
    elif not isinstance(value, (type, types.ModuleType)) and not kind.__module__.startswith(_FOREIGN):
        held = getattr(value, "__dict__", None)
        if type(held) is dict:
            yield held


@functools.lru_cache(maxsize=1024)
def _owners(kind: type) -> tuple[type, ...]:
    return tuple(base for base in kind.__mro__ if not f"{base.__module__}.".startswith(_FOREIGN))


def _class_containers(kind: type) -> Iterator[Any]:
    for base in _owners(kind):
        yield from (value for value in vars(base).values() if type(value) in (list, dict, set, deque))


def _restore_dict(now: dict[Any, Any], before: dict[Any, Any], ours: tuple[str, ...]) -> list[Any]:
    if len(now) == len(before) and all(map(is_, now, before)) and all(map(is_, now.values(), before.values())):
        return []
    kept = {key: value for key, value in now.items() if key not in before and isinstance(key, str) and key.startswith(ours)}
    changed = [key for key, value in before.items() if now.get(key, _EMPTY) is not value]
    added = [key for key in now if key not in before and key not in kept]
    for key in added:
        del now[key]
    for key in changed:
        now[key] = before[key]
    if list(now) != [*before, *kept]:
        now.clear()
        now.update(before)
        now.update(kept)
    return changed


@contextmanager
def containers_kept(root: nn.Module, written: list[str], ours: tuple[str, ...] = (), ran: bool = False) -> Iterator[_Contents]:
    """A block after which everything that can be reached from ``root`` holds what it held before.

    Args:
        written: gets the paths of what the block has written to.
        ours: the beginnings of attribute names that stay.
        ran: whether the block runs the model for real.
    """
    contents = _Contents(root)
    try:
        yield contents
    finally:
        written += contents.restore(ours, ran)


@contextmanager
def state_kept() -> Iterator[None]:
    """A block after which random states, the default data type and the gradient mode are as before."""
    restore: list[Callable[[], object]] = [
        functools.partial(torch.set_rng_state, torch.get_rng_state()),
        functools.partial(random.setstate, random.getstate()),
        functools.partial(torch.set_grad_enabled, torch.is_grad_enabled()),
        functools.partial(torch.set_default_dtype, torch.get_default_dtype()),
    ]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        restore.append(functools.partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        restore.append(functools.partial(numpy.random.set_state, numpy.random.get_state()))
    try:
        yield
    finally:
        for each in restore:
            each()
