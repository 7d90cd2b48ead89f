"""Calls that behave differently in training and evaluation, kept switchable by ``.train()`` and ``.eval()``."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from stp_fx.ir.shapes import meta_twin

__all__ = [
    "AutogradCall",
    "BatchCount",
    "ModeSwitch",
    "attention_with_dropout",
    "held_modes",
    "in_mode",
    "mode_calls",
    "modes_kept",
    "one_sided",
    "switch_modes",
    "take_flags",
]

_log = logging.getLogger(__name__)
ALONE = "captured in"
"""How the note begins that :func:`one_sided` gives."""


class ModeSwitch(nn.Module):
    """Calls ``function`` with ``training`` as this module has it: what ``F.dropout(x, p, self.training)`` meant."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, training=self.training, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.function.__module__}.{self.function.__name__}"


class BatchCount(nn.Module):
    """Adds one to a count, in training only: what a batch norm does to its ``num_batches_tracked``."""

    _is_impure = True  # its call has no result, and passes of torch.fx must not remove it as unused

    def forward(self, count: torch.Tensor) -> None:
        if self.training:
            count.add_(1)


class AutogradCall(nn.Module):
    """Calls a custom ``torch.autograd.Function``, so that its own backward is kept."""

    def __init__(self, function: type) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function.apply(*args)  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        return self.function.__name__


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """A block after which every module of ``model`` has the train/eval flag that it had before."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _flags_of(model: nn.Module, training: bool) -> dict[str, bool]:
    """The flag of every module after ``model.train(training)``; ``model`` is left alone.

    A ``train`` of the model's own may keep modules frozen, or do more (merge weights): it is called on a twin without numbers.
    """
    plain = _trains_plainly(model)
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    if not plain:
        twin = meta_twin(model)
        try:
            twin.train(training)
        except Exception as error:
            _log.warning("%s: train(%s) fails on tensors without numbers: %s", type(model).__name__, training, error)
        else:
            return {name: module.training for name, module in twin.named_modules(remove_duplicate=False)}
    return dict.fromkeys(names, training)


def _trains_plainly(model: nn.Module) -> bool:
    return all(type(module).train is nn.Module.train and "train" not in vars(module) for module in model.modules())


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """A block in which the modules of ``model`` have the flags that ``model.train(training)`` gives them."""
    flags = _flags_of(model, training)
    with modes_kept(model):
        for name, module in model.named_modules(remove_duplicate=False):
            module.training = flags.get(name, training)
        yield


def held_modes(model: nn.Module) -> dict[bool, tuple[str, ...]]:
    """The modules that the model's own ``train`` keeps in the other mode, by the mode that it is called with."""
    if _trains_plainly(model):
        return {}
    held = {mode: tuple(name for name, flag in _flags_of(model, mode).items() if flag != mode) for mode in (False, True)}
    return {mode: names for mode, names in held.items() if names}


def take_flags(gm: nn.Module, model: nn.Module) -> None:
    """Modules of a capture that stand for the model's take its flags, those of our own the flag of the whole."""
    originals = dict(model.named_modules(remove_duplicate=False))
    own = {id(module) for module in originals.values()}
    for name, module in gm.named_modules(remove_duplicate=False):
        if id(module) not in own:
            module.training = originals[name].training if name in originals else model.training


def one_sided(gm: fx.GraphModule, model: nn.Module, reason: str) -> str:
    """A note that ``gm`` was captured in the mode of ``model`` alone. As far as one mode tells, calls follow the mode:
    what was given ``training=False`` in evaluation (functional dropout and the like) is taken to ask for it."""
    names = {name for name, training in mode_calls(gm.graph).items() if not training} if not model.training else set()
    if names:
        switch_modes(gm, names, model.training)
        gm.recompile()
    mode, other = ("train", "eval") if model.training else ("eval", "train")
    return f"{ALONE} {mode} mode alone, where the code asks for the mode; in {other} mode it cannot be captured: {reason}"


def attention_with_dropout(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    dropout: float,
    training: bool,
) -> torch.Tensor:
    """Scaled dot-product attention whose dropout is on in training only."""
    return F.scaled_dot_product_attention(query, key, value, mask, dropout if training else 0.0, is_causal, scale=scale)


def mode_calls(graph: fx.Graph) -> dict[str, bool]:
    """Nodes that were given ``training`` as a literal, with it."""
    found = {}
    for node in graph.nodes:
        if node.op == "call_function":
            bound = _bound(node)
            if bound is not None and isinstance(bound.get("training"), bool):
                found[node.name] = bound["training"]
    return found


def switch_modes(gm: fx.GraphModule, names: set[str], training: bool) -> None:
    """Makes the named calls follow ``gm.training``."""
    for node in list(gm.graph.nodes):
        if node.name not in names:
            continue
        arguments = dict(_bound(node) or {})
        arguments.pop("training")
        target = f"{node.name}_switch"
        switch = ModeSwitch(node.target)
        switch.training = training
        gm.add_submodule(target, switch)
        with gm.graph.inserting_before(node):
            first, *rest = arguments.items()
            new = gm.graph.call_module(target, (first[1],), dict(rest))
            new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


def _bound(node: fx.Node) -> dict[str, Any] | None:
    """A call's arguments by name, where the function has a Python signature with ``training``."""
    signature = _signature_with_training(node.target)
    return None if signature is None else dict(signature.bind(*node.args, **node.kwargs).arguments)


@functools.lru_cache(maxsize=1024)
def _signature_with_training(function: Any) -> inspect.Signature | None:
    if not inspect.isfunction(function):
        return None
    signature = inspect.signature(function)
    return signature if "training" in signature.parameters else None
