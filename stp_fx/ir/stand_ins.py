"""Types that stand for types of torch while a model is traced."""

from __future__ import annotations

from typing import Any

from stp_fx.ir.proxies import ValueProxy

__all__ = ["Autocasts", "StandIn"]


class StandIn(type):
    """The type of what stands for ``original``: it equals the original, and has the original's instances."""

    original: Any

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, cls.original)

    def __eq__(cls, other: object) -> bool:
        return other is cls.original or other is cls

    def __hash__(cls) -> int:
        return hash(cls.original)


class Autocasts(StandIn):
    """The type of what stands for ``torch.autocast``: the type of a device may be that of a proxy's device.

    The meta device, for which torch refuses even to disable autocast, counts as the CPU."""

    def __call__(cls, device_type: Any, *args: Any, **kwargs: Any) -> Any:
        device = _plain(device_type)
        others, named = map(_plain, args), {name: _plain(value) for name, value in kwargs.items()}
        return cls.original("cpu" if device == "meta" else device, *others, **named)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, ValueProxy) else value
