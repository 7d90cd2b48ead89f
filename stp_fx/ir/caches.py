"""Models that keep keys and values from call to call where their configuration says so (``config.use_cache`` of transformers)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["NO_CACHE", "without_caches"]

NO_CACHE = "captured as with use_cache=False: a graph keeps no keys and values from call to call"


@contextmanager
def without_caches(model: nn.Module) -> Iterator[bool]:
    """A block in which no configuration of the model asks for a cache; whether one did before."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        _collect(vars(module).get("config"), configs)
    asking = [config for config in configs.values() if vars(config).get("use_cache") is True]
    for config in asking:
        config.use_cache = False
    try:
        yield bool(asking)
    finally:
        for config in asking:
            config.use_cache = True


def _collect(config: Any, found: dict[int, Any]) -> None:
    """A configuration, and those of parts that it holds."""
    if hasattr(config, "__dict__") and not isinstance(config, type) and id(config) not in found:
        found[id(config)] = config
        for name, value in vars(config).items():
            if name.endswith("config"):
                _collect(value, found)
