"""Calls of a graph as its model was called: with the constants that the capture has baked in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stp_fx.errors import InputError
from stp_fx.ir.example import is_plain
from stp_fx.ir.nested import holds

__all__ = ["without_constants"]


def without_constants(
    arguments: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the graph itself takes of a call: everything but the values that hold no tensor.

    ``arguments`` are those of the capture by name, in the order of the model's ``forward``. A call that leaves the constants out
    is a call of the graph already.

    Raises:
        InputError: a constant has another value than at the capture.
    """
    order = list(arguments)
    constants = {name for name, value in arguments.items() if not holds(torch.Tensor, value)}
    given = {k: order[k] for k in range(min(len(args), len(order))) if order[k] in constants}
    if not any(is_plain(args[k]) for k in given) and not constants.intersection(kwargs):
        return args, kwargs
    values = {name: args[k] for k, name in given.items()} | {name: kwargs[name] for name in constants.intersection(kwargs)}
    for name, value in values.items():
        if type(value) is not type(arguments[name]) or value != arguments[name]:
            raise InputError(
                f"{name!r} is {value!r}, but the graph was captured with {arguments[name]!r}, which is part of it: "
                f"leave it out, or trace the model with {name}={value!r}"
            )
    return tuple(a for k, a in enumerate(args) if k not in given), {k: v for k, v in kwargs.items() if k not in constants}
