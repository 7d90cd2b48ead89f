"""Which tracer a thread's patched calls lead to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

__all__ = ["HERE", "LOCK", "PatchedTracer", "active", "suspended"]

LOCK = threading.RLock()
"""Held while anything is patched, and while a model is captured: a capture borrows the model's modules."""


class PatchedTracer(Protocol):
    """The methods of a tracer that the patches call."""

    def create_proxy(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    asks_mode: bool
    """Whether the code that is traced has read a module's ``training``."""

    draws: set[str]
    """Python's modules of which the code has called a function that draws random numbers."""

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any: ...

    def apply_function(self, function: Any, apply: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def keeps_call(self, function: Any) -> bool: ...


class _Here(threading.local):
    def __init__(self) -> None:
        self.tracers: list[PatchedTracer | None] = []
        self.depth = 0


HERE = _Here()
"""The tracers of each thread, the innermost last; ``None`` while it is suspended."""


def active() -> PatchedTracer | None:
    """The tracer to which patched calls of this thread lead now."""
    tracers = HERE.tracers
    return tracers[-1] if tracers else None


class suspended:
    """A block in which this thread sees everything unpatched: values are computed, a module is imported."""

    __slots__ = ()

    def __enter__(self) -> None:
        HERE.tracers.append(None)

    def __exit__(self, *_: object) -> None:
        HERE.tracers.pop()
