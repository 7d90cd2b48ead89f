"""``torch._check`` and its kin as a model's forward means them: of a size they guard, of data the graph asserts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from stp_fx.ir.active import active
from stp_fx.ir.proxies import ValueProxy

__all__ = ["CHECKS"]


def _checking(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)
    checked = next(name for name in signature.parameters if name in ("cond", "i", "b"))

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        tracer, given = active(), signature.bind(*args, **kwargs)
        cond = given.arguments[checked]
        if tracer is None or not isinstance(cond, ValueProxy):
            return original(*args, **kwargs)
        if isinstance(cond.value, torch.Tensor):
            message = given.arguments.get("message")
            text = str(message() if callable(message) else message or "a check of the model's code fails")
            return tracer.create_proxy("call_function", torch._assert_async, (cond.all(), text), {})
        given.arguments[checked] = bool(cond) if isinstance(cond.value, bool) else int(cond)
        return original(*given.args, **given.kwargs)

    return call


CHECKS: dict[str, Callable[..., Any]] = {
    name: _checking(function)
    for name, function in vars(torch).items()
    if name.startswith("_check") and {"cond", "i", "b"} & set(inspect.signature(function).parameters)
}
"""The attributes that ``torch`` is asked for by name while a model is traced."""
