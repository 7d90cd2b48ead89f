"""A penalty that grows on the units to be removed (Wang et al., ICLR 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.criteria import Criterion
from stp_fx.criteria import resolve as resolve_criterion
from stp_fx.criteria.scores import score
from stp_fx.errors import InputError
from stp_fx.selection import PrunePlan
from stp_fx.selection.choice import select
from stp_fx.selection.selection import Selection
from stp_fx.training.regularizers.base import BaseRegularizer, Groups, check_keys, check_number, register
from stp_fx.training.regularizers.sums import RowNorms, chosen, rows_of

__all__ = ["GrowingReg"]


@register("growing")
class GrowingReg(BaseRegularizer):
    """Weight decay that grows, on the units of lowest score only (Wang et al., "Neural pruning via growing regularization",
    ICLR 2021, GReg-1): every ``every`` optimizer steps by ``step``, up to ``ceiling``.

    The units are those that ``criterion`` would remove at ``ratio``, chosen at the first step and again when the graph has
    lost channels. The criterion must not need data.
    """

    forms: ClassVar[tuple[str, ...]] = ("gradients", "step")

    def __init__(
        self,
        step: float = 1e-4,
        ratio: float = 0.5,
        every: int = 10,
        ceiling: float = 1.0,
        criterion: str | Criterion = "magnitude",
    ) -> None:
        check_number("step", step, 0.0)
        check_number("ratio", ratio, 0.0, 1.0)
        check_number("every", every, 1, whole=True)
        check_number("ceiling", ceiling, 0.0)
        self.criterion: Criterion = resolve_criterion(criterion)
        if getattr(self.criterion, "needs", ()):
            raise InputError("a growing penalty chooses its units by a criterion that reads weights alone, such as 'magnitude'")
        self.step: float = step
        self.ratio: float = ratio
        self.every: int = every
        self.ceiling: float = ceiling
        self.steps: int = 0
        self._plan: PrunePlan | None = None
        self._rows: tuple[ChannelGraph, RowNorms, torch.Tensor] | None = None

    @property
    def strength(self) -> float:
        """The penalty's factor now."""
        return min(self.ceiling, self.step * (self.steps // self.every + 1))

    def apply_gradients(self, gm: fx.GraphModule, groups: Groups = None) -> float:
        graph = analyze(gm)
        if self._rows is None or self._rows[0] is not graph:
            self._rows = (graph, *self._choose(gm, graph, groups))
        _, rows, units = self._rows
        return rows.add_multiples(dict(gm.named_parameters(remove_duplicate=False)), units * self.strength)

    def after_step(self, gm: fx.GraphModule, groups: Groups = None) -> None:
        self.steps += 1

    def _choose(self, gm: fx.GraphModule, graph: ChannelGraph, groups: Groups) -> tuple[RowNorms, torch.Tensor]:
        sizes = {(axis.tensor, axis.dim): axis.size for axis in graph.axes}
        if self._plan is None or any(sizes.get(key) != size for key, size in self._plan.sizes.items()):
            may_go = {group.index for group in chosen(graph, groups)}
            held = tuple(group.name for group in graph.groups if group.index not in may_go)
            self._plan = select(gm, score(gm, self.criterion, ignore=held), Selection(self.ratio))
        picked = ~graph.survivors(self._plan, partial=True).units
        rows = rows_of(gm, graph, graph.groups, lambda axis: True)
        device = next(iter(rows.by_tensor.values()))[0].index.device
        parameters = dict(gm.named_parameters(remove_duplicate=False))
        return rows, torch.from_numpy(picked).to(device, rows.dtype(parameters))

    def state_dict(self) -> dict[str, Any]:
        """Plain data: the steps so far and the chosen units."""
        return {"steps": self.steps, "plan": None if self._plan is None else self._plan.to_json()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the steps so far and the chosen units of :meth:`state_dict`.

        Raises:
            InputError: the state of another regularizer.
        """
        check_keys(self, state, ("steps", "plan"))
        self.steps, self._rows = int(state["steps"]), None
        self._plan = None if state["plan"] is None else PrunePlan.from_json(state["plan"])
