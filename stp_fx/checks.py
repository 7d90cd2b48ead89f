"""Checks of arguments at run time.

They take any object: annotations promise a type that callers without a type checker may not keep.
"""

from __future__ import annotations

import numbers
from typing import TypeGuard

__all__ = ["is_a", "is_number", "is_whole"]


def is_a(value: object, *kinds: type) -> bool:
    """Whether ``value`` is of one of these classes."""
    return isinstance(value, kinds)


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a real number, of Python or NumPy; a bool is none, NaN and infinities are."""
    return not isinstance(value, bool) and isinstance(value, numbers.Real)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether ``value`` is an integer, of Python or NumPy; a bool is none."""
    return not isinstance(value, bool) and isinstance(value, numbers.Integral)
