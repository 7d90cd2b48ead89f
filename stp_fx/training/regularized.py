"""A regularizer in a run: what the manager asks of it, on the groups that may be pruned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.hooks import RemovableHandle

from stp_fx.analysis.build import analyze
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.groups import Group
from stp_fx.analysis.names import prunable_groups
from stp_fx.errors import InputError
from stp_fx.selection import PrunePlan
from stp_fx.training import regularizers
from stp_fx.training.commit import Change
from stp_fx.training.regularizers import Regularizer

__all__ = ["Regularized"]


class Regularized:
    """``regularizer``: by name or as a value, or None. ``ignore``: as for a selection."""

    def __init__(self, regularizer: str | Regularizer | None, ignore: Any) -> None:
        self.value: Regularizer | None = None if regularizer is None else regularizers.resolve(regularizer)
        self._ignore = ignore
        self._groups: tuple[ChannelGraph, list[Group]] | None = None
        self._after_step: RemovableHandle | None = None

    @property
    def forms(self) -> tuple[str, ...]:
        return () if self.value is None else self.value.forms

    @property
    def aims(self) -> bool:
        """Whether it acts on the units that the next step removes."""
        return bool(getattr(self.value, "aims", False))

    def check(self, optimizer: object) -> None:
        """Raises:
        InputError: the regularizer acts after the steps of an optimizer, and there is none.
        """
        if "step" in self.forms and optimizer is None:
            raise InputError(f"{type(self.value).__name__} works after each step of the optimizer: give `optimizer`")

    def gradients(self, model: fx.GraphModule) -> float:
        """Adds its gradients to those of the parameters; their L1 norm, 0.0 where it has none."""
        if self.value is None or "gradients" not in self.forms:
            return 0.0
        return self.value.apply_gradients(model, self._prunable(model))

    def loss(self, model: fx.GraphModule) -> torch.Tensor | None:
        """The loss term; None where it has none, or another form."""
        if self.value is None or "loss" not in self.forms or "gradients" in self.forms:
            return None
        return self.value.loss(model, self._prunable(model))

    def hook(self, model: fx.GraphModule, optimizers: Sequence[torch.optim.Optimizer], finished: Callable[[], bool]) -> None:
        """Calls it after each step of the last optimizer until the run is ``finished``; an earlier hook is removed."""
        if self._after_step is not None:
            self._after_step.remove()
        regularizer = self.value
        if regularizer is None or "step" not in self.forms or not optimizers:
            return

        def after_step(*_: Any) -> None:
            if not finished():
                regularizer.after_step(model, self._prunable(model))

        self._after_step = optimizers[-1].register_step_post_hook(after_step)

    def aimed(self, model: fx.GraphModule, plan: PrunePlan | None) -> Change:
        """The change that tells it what the next step removes of the model, as that is when the change is made."""
        value: Any = self.value
        before = copy.deepcopy(value.state_dict()) if hasattr(value, "state_dict") else None

        def undo() -> None:
            if before is not None:
                value.load_state_dict(copy.deepcopy(before))

        return Change(lambda: value.aim(model, plan), undo)

    def _prunable(self, model: fx.GraphModule) -> list[Group]:
        graph = analyze(model)
        if self._groups is None or self._groups[0] is not graph:
            self._groups = (graph, [g for g in prunable_groups(model, graph, self._ignore) if not g.chosen])
        return self._groups[1]
