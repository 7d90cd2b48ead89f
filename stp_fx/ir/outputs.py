"""The outputs of a graph: classes that a graph cannot write, and a choice of outputs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch.utils._pytree as pytree
from torch import nn

from stp_fx.checks import shown
from stp_fx.errors import InputError
from stp_fx.ir._torch_compat import children_of
from stp_fx.text import listed

__all__ = ["Outputs", "Rebuild", "is_plain", "kept_outputs", "names_of_outputs", "only_outputs", "parts_of"]

_PLAIN = (tuple, list, dict)
Outputs = tuple[str | int, ...]
"""Names of the outputs that are kept (keys, fields), or their positions; empty: all of them."""
_ASKED: ContextVar[_Asked | None] = ContextVar("stp_fx_outputs", default=None)


@dataclasses.dataclass
class _Asked:
    """``bare``: an output without parts that was given whole; ``found``: whether one had all that was asked for."""

    names: Outputs
    bare: Any = None
    found: bool = False

    def check(self) -> None:
        """Raises:
        InputError: they were asked of outputs without parts alone.
        """
        if self.bare is not None and not self.found:
            kind = type(getattr(self.bare, "value", self.bare)).__name__
            raise InputError(f"`outputs` asks for {self.names[0]!r}, but the output is a {kind}")


class Rebuild(nn.Module):
    """Puts flat outputs back into the classes that the model returned (dataclasses, Hugging Face's outputs)."""

    def __init__(self, spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, *values: Any) -> Any:
        return pytree.tree_unflatten(list(values), self.spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rebuild:
        """With the same spec, which cannot be changed: torch 2.10 warns of its own class where one is copied."""
        memo[id(self.spec)] = self.spec
        copied = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def is_plain(spec: pytree.TreeSpec) -> bool:
    """Whether a graph can write such an output itself."""
    return spec.is_leaf() or (spec.type in _PLAIN and all(is_plain(child) for child in children_of(spec)))


def names_of_outputs(given: Any) -> Outputs:
    """The argument ``outputs`` as a tuple.

    Raises:
        InputError: neither names nor positions.
    """
    if given is None:
        return ()
    names = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    wrong = [name for name in names if isinstance(name, bool) or not isinstance(name, (str, int))]
    if wrong or not names:
        raise InputError(
            f"`outputs` is {shown(given)}; give keys, fields or positions of outputs, such as 'logits', 0 or ('a', 'b')"
        )
    return names


@contextmanager
def only_outputs(names: Outputs) -> Iterator[_Asked]:
    """While it lasts, :func:`kept_outputs` keeps these."""
    asked = _Asked(names)
    token = _ASKED.set(asked if names else None)
    try:
        yield asked
    finally:
        _ASKED.reset(token)


def kept_outputs(output: Any) -> Any:
    """``output`` with None in place of what was not asked for; one without parts (a classifier's in evaluation, which hands out
    more in training) stays whole.

    Raises:
        InputError: it has no such part; names those that it has.
    """
    asked = _ASKED.get()
    if asked is None:
        return output
    parts = _parts(output)
    if not parts:
        asked.bare = output
        return output
    unknown = [name for name in asked.names if name not in parts]
    if unknown:
        has = listed([repr(name) for name in parts], 8)
        raise InputError(f"`outputs` asks for {unknown[0]!r}, but the output has {has}")
    asked.found = True
    return _without(output, [name for name in parts if name not in asked.names])


def _parts(output: Any) -> list[str | int]:
    if isinstance(output, Mapping):
        return list(output)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [field.name for field in dataclasses.fields(output)]
    if isinstance(output, (tuple, list)):
        return list(getattr(output, "_fields", range(len(output))))
    return []


def parts_of(output: Any) -> dict[str | int, Any]:
    """The parts of an output, by key, field or position; none for an output without parts."""
    if isinstance(output, Mapping):
        return dict(output)
    by_place = isinstance(output, (tuple, list)) and not hasattr(output, "_fields")
    return dict(enumerate(output)) if by_place else {name: getattr(output, str(name)) for name in _parts(output)}


def _without(output: Any, names: list[str | int]) -> Any:
    if isinstance(output, Mapping):
        kept = {name: None if name in names else value for name, value in output.items()}
        return kept if type(output) is dict else type(output)(**kept)
    if dataclasses.is_dataclass(output):
        return dataclasses.replace(output, **{str(name): None for name in names})  # type: ignore[type-var]
    if hasattr(output, "_fields"):
        return output._replace(**{str(name): None for name in names})
    return type(output)(None if k in names else value for k, value in enumerate(output))
