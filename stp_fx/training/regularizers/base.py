"""Regularizers: up to three hooks around a training step, and their names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import fx

from stp_fx.analysis.groups import Group
from stp_fx.checks import is_number, is_whole, shown
from stp_fx.errors import InputError
from stp_fx.registry import Registry
from stp_fx.selection import PrunePlan

__all__ = ["BaseRegularizer", "Regularizer", "check_keys", "check_number", "known_regularizers", "register", "resolve"]

Groups = Iterable[Group] | None


@runtime_checkable
class Regularizer(Protocol):
    """Up to three hooks; ``forms`` names those that do something.

    - "loss": ``loss(gm, groups)`` gives a differentiable scalar, to be added to the task's loss.
    - "gradients": ``apply_gradients(gm, groups)`` adds to ``.grad`` in place, after the backward pass, and returns the L1
      norm of these gradients (report, section 2.2). It adds the gradients of "loss", where both exist.
    - "step": ``after_step(gm, groups)`` works on the weights, or on the regularizer itself, after each optimizer step.

    ``groups`` are those of ``analyze(gm)`` that may lose units; None: all. Use "loss" or "gradients", not both. Masked units
    do not count, and parameters that do not require gradients get none. ``attach(gm)`` is called before
    training; ``detach(gm)`` at the last step of pruning, with a copy of the graph that becomes what the loop holds if the step is
    made.
    """

    forms: ClassVar[tuple[str, ...]]

    def attach(self, gm: fx.GraphModule) -> None:
        """Called once, before training."""
        ...

    def detach(self, gm: fx.GraphModule) -> None:
        """Called once, after the last pruning step: undoes :meth:`attach`."""
        ...

    def loss(self, gm: fx.GraphModule, groups: Groups = None) -> torch.Tensor:
        """The loss term: a differentiable scalar."""
        ...

    def apply_gradients(self, gm: fx.GraphModule, groups: Groups = None) -> float:
        """Adds to the parameters' ``.grad`` in place; returns the L1 norm of these gradients."""
        ...

    def after_step(self, gm: fx.GraphModule, groups: Groups = None) -> None:
        """Called after each optimizer step; may change the weights in place."""
        ...


class BaseRegularizer:
    """The hooks that a regularizer does not have: loss and gradients raise, the others do nothing.

    ``aims`` says whether :meth:`aim` does something, which whoever trains asks before planning: ``getattr(regularizer, "aims",
    False)``. A regularizer need not have either.
    """

    forms: ClassVar[tuple[str, ...]] = ()
    aims: bool = False

    def aim(self, gm: fx.GraphModule, plan: PrunePlan | None) -> None:
        """Is told what the next pruning step would remove, if it were taken now, masked units included; None: no step follows.

        To be called before training, after each step, and in between as often as scores are to be looked at anew.
        """

    def attach(self, gm: fx.GraphModule) -> None:
        """Nothing to put into the graph."""

    def detach(self, gm: fx.GraphModule) -> None:
        """Nothing to take out of it."""

    def loss(self, gm: fx.GraphModule, groups: Groups = None) -> torch.Tensor:
        """The loss term: a differentiable scalar.

        Raises:
            InputError: the regularizer has none.
        """
        raise InputError(f"{type(self).__name__} has no loss term; it has the forms {', '.join(self.forms)}")

    def apply_gradients(self, gm: fx.GraphModule, groups: Groups = None) -> float:
        """Adds to the parameters' ``.grad`` in place; returns the L1 norm of these gradients.

        Raises:
            InputError: the regularizer adds none.
        """
        raise InputError(f"{type(self).__name__} adds no gradients; it has the forms {', '.join(self.forms)}")

    def after_step(self, gm: fx.GraphModule, groups: Groups = None) -> None:
        """Nothing to do."""


def check_number(what: str, value: object, low: float, high: float = math.inf, *, whole: bool = False) -> None:
    """Raise :class:`InputError` unless ``value`` is a finite number in [low, high), or with ``whole`` such an integer."""
    if not is_number(value) or (whole and not is_whole(value)) or not math.isfinite(value) or not low <= value < high:
        upper = f" and below {high:g}" if math.isfinite(high) else ""
        raise InputError(f"`{what}` is a{' whole' if whole else ' finite'} number from {low:g}{upper}; got {shown(value)}")


def check_keys(regularizer: Any, state: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    """Raise :class:`InputError` unless ``state`` has just the ``keys`` that ``state_dict()`` gives."""
    if not isinstance(state, Mapping) or set(state) != set(keys):
        found = ", ".join(map(repr, state)) if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise InputError(f"the state of a {type(regularizer).__name__} has the keys {', '.join(map(repr, keys))}; got {found}")


_REGULARIZERS: Registry[Callable[..., Regularizer]] = Registry("regularizer")
F = TypeVar("F", bound=Callable[..., Any])


def register(name: str) -> Callable[[F], F]:
    """Lets ``name`` stand for the decorated class.

    Raises:
        InputError: another module has registered the name.
    """
    return _REGULARIZERS.register(name)


def known_regularizers() -> tuple[str, ...]:
    """Names that :func:`resolve` knows, sorted."""
    return _REGULARIZERS.names()


def resolve(regularizer: str | Regularizer, *arguments: Any) -> Regularizer:
    """The regularizer of that name, made from ``arguments``, or the given one.

    Raises:
        InputError: an unknown name, a class in place of a value, or something without the hooks.
    """
    if isinstance(regularizer, str):
        return _REGULARIZERS.get(regularizer)(*arguments)
    if isinstance(regularizer, type):
        raise InputError(f"regularizer {regularizer.__name__} is a class; pass a value of it: {regularizer.__name__}(...)")
    if not isinstance(regularizer, Regularizer):
        raise InputError(
            f"a regularizer is a name ({', '.join(known_regularizers())}) or has `forms` and the hooks of BaseRegularizer; "
            f"got {shown(regularizer)}"
        )
    return regularizer
