"""The example with which a model is captured: its arguments by name, and whether the model runs on them at all."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from stp_fx.errors import InputError, StpFxError
from stp_fx.ir.kept import containers_kept
from stp_fx.ir.meta_run import MetaRun
from stp_fx.ir.nested import holds, leaves_of, mapped
from stp_fx.ir.shapes import meta_like, meta_twin

__all__ = ["bound_arguments", "by_name", "check_that_it_runs", "described", "is_plain", "on_meta"]


def by_name(model: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The same arguments, with a mapping in place of positional ones taken for arguments by name if its keys are all parameters
    of ``forward``: what a tokenizer gives.

    Raises:
        InputError: an argument in both; a module without a forward.
    """
    if type(model).forward is nn.Module.forward and "forward" not in vars(model):
        inside = next((name for name, child in model.named_children() if type(child).forward is not nn.Module.forward), None)
        advice = "give a module that has" if inside is None else f"give a module that has, such as its {inside!r}"
        raise InputError(f"{type(model).__name__} has no forward of its own: {advice}")
    if not isinstance(example_inputs, Mapping) or not example_inputs:
        return example_inputs, dict(kwargs)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = {name for name, each in inspect.signature(model.forward).parameters.items() if each.kind in kinds}
    if not known.issuperset(example_inputs):
        return example_inputs, dict(kwargs)
    twice = sorted(set(example_inputs) & set(kwargs))
    if twice:
        raise InputError(f"{twice[0]!r} is both in `example_inputs` and in `kwargs`: give it once")
    return (), {**example_inputs, **kwargs}


def bound_arguments(model: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by parameter name of ``forward``; spread ones are numbered.

    Raises:
        InputError: no example, or not what ``forward`` takes.
    """
    if example_inputs is None and not kwargs:
        raise InputError(f"example_inputs is missing: give a tensor or a tuple of what {type(model).__name__}.forward takes")
    positional = _positional(example_inputs)
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*positional, **kwargs)
    except TypeError as error:
        raise InputError(f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}") from error
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            arguments.update({f"{name}_{k}": each for k, each in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        else:
            arguments[name] = value
    if not any(holds(torch.Tensor, value) for value in arguments.values()):
        raise InputError("example_inputs hold no tensor, so there is nothing to trace with")
    return arguments


def is_plain(value: Any) -> bool:
    """Whether a value can stay on the graph: it is copied, pickled and compared like a number."""
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(is_plain(v) for v in value)
    if isinstance(value, dict):
        return all(is_plain(v) for v in value.values())
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


def on_meta(value: Any) -> Any:
    """The same value with its tensors on the meta device."""
    return mapped(torch.Tensor, meta_like, value)


def described(values: Mapping[str, Any]) -> str:
    """Names, shapes and dtypes, for messages."""
    return ", ".join(f"{name}: {_kind(value)}" for name, value in values.items())


def _kind(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__


def _positional(example_inputs: Any) -> tuple[Any, ...]:
    if isinstance(example_inputs, (list, tuple)):
        return tuple(example_inputs)
    return () if example_inputs is None else (example_inputs,)


_OF_META = ("meta", "data-dependent", "unsupported scalartype")
"""Words of errors that the meta device is the reason of; the last is that of ``torch.autocast("meta")``."""


def check_that_it_runs(
    model: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any], arguments: Mapping[str, Any], *, cheaply: bool = False
) -> None:
    """Runs a model that could not be captured as it is, to tell an example that it does not take from code that cannot be traced.

    First on meta tensors, and if that fails for real, where the example and the model are.

    Args:
        cheaply: nothing is run for real where meta tensors may be what fails.

    Raises:
        InputError: the model itself fails on the example.
    """
    args = _positional(example_inputs)
    failed = _failure(meta_twin(model), on_meta(args), on_meta(dict(kwargs)), model)
    if failed is None:
        return
    of_meta = isinstance(failed, NotImplementedError) or any(word in str(failed).lower() for word in _OF_META)
    tensors = [*leaves_of(torch.Tensor, (args, dict(kwargs))), *model.parameters(), *model.buffers()]
    if of_meta and (cheaply or any(tensor.is_meta for tensor in tensors)):
        return  # what meta tensors cannot do, others may
    if not any(tensor.is_meta for tensor in tensors):
        place = next((p.device for p in model.parameters()), None)
        moved = mapped(torch.Tensor, lambda t: t if place is None else t.to(place), (args, dict(kwargs)))
        failed = _failure(model, moved[0], moved[1], model)
    if failed is None or isinstance(failed, (StpFxError, MemoryError, torch.OutOfMemoryError)):
        return
    raise itself_fails(model, arguments, failed) from failed


def itself_fails(model: nn.Module, arguments: Mapping[str, Any], failed: BaseException) -> InputError:
    """The error for an example that the model does not take, which failed as it says."""
    line = next(iter(str(failed).strip().splitlines()), "no message")
    mode = "train" if model.training else "eval"
    return InputError(
        f"{type(model).__name__} itself fails on this example ({described(arguments)}) in {mode} mode: "
        f"{type(failed).__name__}: {line[:300]}. Give an example that model(*example_inputs, **kwargs) takes"
    )


def _failure(runs: nn.Module, args: Any, kwargs: Any, model: nn.Module) -> Exception | None:
    try:
        with torch.no_grad(), containers_kept(model, [], ran=runs is model):
            if runs is model:
                runs(*args, **kwargs)
            else:
                with MetaRun():
                    runs(*args, **kwargs)
    except Exception as error:  # whatever a model's own code raises
        return error
    return None
