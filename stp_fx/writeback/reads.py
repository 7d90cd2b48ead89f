"""Which numbers a forward reads from its modules, and from the objects that they hold (a config, a dataclass)."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import torch
from torch import nn

from stp_fx.writeback.tensors import is_number, is_numbers

__all__ = ["Holder", "Key", "Watched", "holders_of"]

Key = tuple[str, str]
"""A number in the code: the family of what holds it (a class, or a config), and the attribute."""


@dataclasses.dataclass(frozen=True, eq=False)
class Holder:
    """An object with numbers: a module, or what modules hold. ``places`` are the modules whose tensors they may describe."""

    path: str
    thing: Any
    places: tuple[str, ...]

    @property
    def family(self) -> str:
        """Holders of a family are decided alike: the modules of a class. Each config is a family of its own."""
        return _label(type(self.thing)) if isinstance(self.thing, nn.Module) else f"{_label(type(self.thing))} {self.path}"

    def numbers(self, name: str) -> tuple[int, ...]:
        """The value of an attribute; a single number as a sequence of one; empty if it is neither."""
        value = vars(self.thing).get(name)
        if is_number(value):
            return (value,)
        return tuple(value) if is_numbers(value) else ()

    def put(self, name: str, numbers: tuple[int, ...]) -> None:
        """The value anew, in its own type."""
        old = vars(self.thing).get(name)
        if isinstance(old, (tuple, list)):
            vars(self.thing)[name] = (
                list(numbers) if isinstance(old, list) else torch.Size(numbers) if isinstance(old, torch.Size) else tuple(numbers)
            )
        else:
            vars(self.thing)[name] = numbers[0]

    def label(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


def _label(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def holders_of(model: nn.Module) -> dict[str, Holder]:
    """All modules, and all plain objects that are their attributes, by path; an object that several modules hold is one."""
    found: dict[str, Holder] = {}
    configs: dict[int, tuple[str, Any, list[str]]] = {}
    for name, module in model.named_modules():
        found[name] = Holder(name, module, (name,))
        for attribute, value in vars(module).items():
            for suffix, thing in _objects(attribute, value):
                path = f"{name}.{suffix}" if name else suffix
                configs.setdefault(id(thing), (path, thing, []))[2].append(name)
    for path, thing, places in configs.values():
        top = [p for p in places if not any(p.startswith(f"{q}.") or not q for q in places if q != p)]
        found[path] = Holder(path, thing, tuple(dict.fromkeys(top)))
    return found


def _objects(name: str, value: Any, depth: int = 2) -> list[tuple[str, Any]]:
    plain = isinstance(value, (nn.Module, torch.Tensor, type, str, int, float, list, tuple, dict, set, torch.nn.Parameter))
    kind = type(value)
    if plain or callable(value) or kind.__module__ in ("builtins", "torch") or not depth:
        return []
    inside = getattr(value, "__dict__", None)
    if not isinstance(inside, dict) or name.startswith("__"):
        return []
    deeper = [each for key, part in inside.items() for each in _objects(f"{name}.{key}", part, depth - 1)]
    return [(name, value), *deeper]


class Watched:
    """Records, in order, which numbers of a module are read; the module must be one's own, since its classes are replaced.

    Classes are replaced by subclasses of the same name, which is what registries that go by name see.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.holders: dict[str, Holder] = holders_of(model)
        self.families: dict[str, list[Holder]] = {}
        self._paths: dict[int, Holder] = {}
        self._read: dict[tuple[str, str], None] = {}
        kinds: dict[type, type] = {}
        for holder in self.holders.values():
            self.families.setdefault(holder.family, []).append(holder)
        self._family = {id(h.thing): family for family, members in self.families.items() for h in members}
        for holder in self.holders.values():
            kind = type(holder.thing)
            if kind not in kinds:
                kinds[kind] = self._subclass(kind)
            try:
                object.__setattr__(holder.thing, "__class__", kinds[kind])
            except TypeError:
                continue  # a class with another layout, written in C

    def start(self) -> None:
        self._read.clear()

    def read(self) -> list[Key]:
        """The values read since :meth:`start`."""
        return list(self._read)

    def _subclass(self, kind: Any) -> Any:
        families, read = self._family, self._read

        def __getattribute__(self: Any, name: str) -> Any:
            value = kind.__getattribute__(self, name)
            if is_number(value) or is_numbers(value):
                family = families.get(id(self))
                if family is not None and name in object.__getattribute__(self, "__dict__") and not name.startswith("__"):
                    read.setdefault((family, name))
            return value

        names = {"__getattribute__": __getattribute__, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
        try:
            return types.new_class(kind.__name__, (kind,), exec_body=lambda namespace: namespace.update(names))
        except TypeError:
            return kind
