"""Random masks that keep everything: for comparing two programs that draw their random numbers in different order."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FixedDraws", "RealDraws", "drawn_from", "frozen_draws", "generator_states", "is_random"]

_aten = torch.ops.aten
_DROPOUT_OF = {
    _aten._scaled_dot_product_flash_attention.default: "dropout_p",
    _aten._scaled_dot_product_efficient_attention.default: "dropout_p",
    _aten._scaled_dot_product_cudnn_attention.default: "dropout_p",
    _aten._scaled_dot_product_flash_attention_for_cpu.default: "dropout_p",
}


class FixedDraws(TorchDispatchMode):
    """Dropout, stochastic depth and attention's dropout keep everything while this is active: Bernoulli draws are all ones.

    >>> with FixedDraws():
    ...     torch.nn.functional.dropout(torch.ones(4), 0.5)
    tensor([2., 2., 2., 2.])
    """

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        packet = getattr(func, "overloadpacket", None)
        if packet is _aten.bernoulli_:
            return args[0].fill_(1)
        if packet is _aten.bernoulli:
            return torch.ones_like(args[0])
        if packet is _aten.native_dropout:
            return args[0] * 1, torch.ones_like(args[0], dtype=torch.bool)
        name = _DROPOUT_OF.get(func)
        if name is not None:
            place = [argument.name for argument in func._schema.arguments].index(name)
            if place < len(args):
                args = (*args[:place], 0.0, *args[place + 1 :])
            else:
                kwargs[name] = 0.0
        return func(*args, **kwargs)


def is_random(module: nn.Module) -> bool:
    """Stochastic depth and its kin: nothing stored, and a forward that asks whether it trains."""
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()) or any(True for _ in module.children()):
        return False
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "training" in code.co_names


class RealDraws(TorchDispatchMode):
    """Whether this thread has drawn random numbers into tensors that hold numbers while this was active."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and isinstance(result, torch.Tensor) and not result.is_meta:
            self.seen = True
        return result


def generator_states() -> dict[str, Any]:
    """The state of each of the process's generators, by the module that has it, for :func:`drawn_from` to compare."""
    _, keys, position, *_ = numpy.random.get_state()
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "random": random.getstate(),
        "numpy.random": (position, *map(int, keys[:4])),
    }


def frozen_draws(names: Iterable[str]) -> tuple[str, ...]:
    """A note of random numbers that the code drew in Python while it was captured."""
    shown = ", ".join(sorted(set(names)))
    return (f"the forward draws random numbers in Python ({shown}), of which the graph holds one draw",) if shown else ()


def drawn_from(before: dict[str, Any]) -> set[str]:
    """Which generators have been drawn from since, by whatever thread."""
    now = generator_states()
    return {name for name, state in before.items() if state != now[name]}
