"""The schemas of ATen's ops: what they write to and return."""

from __future__ import annotations

import functools
from typing import Any

__all__ = ["writes_to"]


@functools.lru_cache(maxsize=4096)
def writes_to(func: Any) -> tuple[int, ...]:
    """Positions of the arguments that an overload writes to; none for what is no overload."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    return tuple(k for k, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write)
