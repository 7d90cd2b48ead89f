"""Sample calls of ops. An entry's golden line and its check against numbers are made from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

__all__ = ["Make", "Sample", "arguments"]


class Make(Protocol):
    """The maker of a sample's tensors: on meta with axes to follow, or with numbers."""

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        ...

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, below: int = 2) -> torch.Tensor:
        """A tensor whose every dimension gets an axis; integers are between 0 and ``below``."""
        ...

    def index(self, *shape: int, below: int) -> torch.Tensor:
        """An int64 tensor without axes, of values between 0 and ``below``."""
        ...


Sample = Callable[[Make], tuple[tuple[Any, ...], dict[str, Any]]]
"""Gives the arguments of one call, its tensors made by the given :class:`Make`."""


def arguments(*values: Any, **named: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, as a sample gives them."""
    return values, named
