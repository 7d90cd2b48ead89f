"""A penalty that grows on the units to be removed (Wang et al., ICLR 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from stp_fx.training.regularizers.sums import RowNorms, chosen, rows_of, unmasked

__all__ = ["GrowingReg"]


@register("growing")
class GrowingReg(BaseRegularizer):
    """Weight decay that grows, on the units of lowest score only (Wang et al., "Neural pruning via growing regularization",
    ICLR 2021, GReg-1): every ``every`` optimizer steps by ``step``, up to ``ceiling``.

    With a ``ratio``, the units are those that ``criterion`` would remove, chosen at the first step and again when the graph has
    lost channels; the criterion must not need data. With ``ratio=None`` they are those that the next pruning step would remove,
    by its own criterion and ratio, which :meth:`aim` is told. The penalty of each of them grows from the step at which it was
    chosen; one that is no longer chosen is let go.

    Args:
        step: by which the factor of a unit's weights grows.
        ratio: the fraction of units that is chosen, or None.
        every: optimizer steps between two rises.
        ceiling: the largest factor.
        criterion: chooses the units, with a ``ratio``.
    """

    forms: ClassVar[tuple[str, ...]] = ("gradients", "step")

    def __init__(
        self,
        step: float = 1e-4,
        ratio: float | None = 0.5,
        every: int = 10,
        ceiling: float = 1.0,
        criterion: str | Criterion = "magnitude",
    ) -> None:
        check_number("step", step, 0.0)
        if ratio is not None:
            check_number("ratio", ratio, 0.0, 1.0)
        check_number("every", every, 1, whole=True)
        check_number("ceiling", ceiling, 0.0)
        self.criterion: Criterion = resolve_criterion(criterion)
        if getattr(self.criterion, "needs", ()):
            raise InputError("a growing penalty chooses its units by a criterion that reads weights alone, such as 'magnitude'")
        self.step: float = step
        self.ratio: float | None = ratio
        self.every: int = every
        self.ceiling: float = ceiling
        self.steps: int = 0
        self.aims: bool = ratio is None
        self._aimed = False
        self._chosen: list[tuple[int, PrunePlan]] = []
        """The step at which units were chosen, and the plan that removes them; no unit is in two of them."""
        self._rows: tuple[ChannelGraph, RowNorms, list[tuple[int, torch.Tensor]]] | None = None

    @property
    def strength(self) -> float:
        """The penalty's factor now, for the units that were chosen first."""
        return self._strength(min((start for start, _ in self._chosen), default=0 if self.ratio is not None else self.steps))

    def _strength(self, start: int) -> float:
        return min(self.ceiling, self.step * ((self.steps - start) // self.every + 1))

    def aim(self, gm: fx.GraphModule, plan: PrunePlan | None) -> None:
        """Chooses the units of ``plan`` that are not masked; does nothing where a ratio was given.

        Raises:
            PlanError: the plan does not fit the graph.
        """
        if self.ratio is not None:
            return
        graph, chosen = analyze(gm), list[tuple[int, PrunePlan]]()
        wanted = ~graph.survivors(plan, partial=True).units & unmasked(gm, graph)
        for start, earlier in self._chosen if _fit(graph, self._chosen) else ():
            flags = ~graph.survivors(earlier, partial=True).units & wanted
            if flags.any():
                chosen.append((start, graph.plan_removing(flags)))
                wanted &= ~flags
        if wanted.any():
            chosen.append((self.steps, graph.plan_removing(wanted)))
        self._chosen, self._rows, self._aimed = chosen, None, True

    def apply_gradients(self, gm: fx.GraphModule, groups: Groups = None) -> float:
        graph = analyze(gm)
        if self._rows is None or self._rows[0] is not graph:
            self._rows = (graph, *self._laid_out(gm, graph, groups))
        _, rows, chosen = self._rows
        if not chosen:
            return 0.0
        factor = torch.stack([units * self._strength(start) for start, units in chosen]).sum(0)
        return rows.add_multiples(dict(gm.named_parameters(remove_duplicate=False)), factor)

    def after_step(self, gm: fx.GraphModule, groups: Groups = None) -> None:
        self.steps += 1

    def _laid_out(
        self, gm: fx.GraphModule, graph: ChannelGraph, groups: Groups
    ) -> tuple[RowNorms, list[tuple[int, torch.Tensor]]]:
        """The rows of all units, and which of them (0 or 1) were chosen when."""
        if self.ratio is None and not self._aimed:
            raise InputError(
                "this GrowingReg(ratio=None) has not been told what the next step removes: call aim(gm, plan) first, or give a "
                "ratio"
            )
        fit = _fit(graph, self._chosen)
        if self.ratio is not None and not (fit and self._chosen):
            may_go = {group.index for group in chosen(graph, groups)}
            held = tuple(group.name for group in graph.groups if group.index not in may_go)
            self._chosen = [(0, select(gm, score(gm, self.criterion, ignore=held), Selection(self.ratio)))]
        elif not fit:  # they are removed, and the next ones are not chosen yet
            self._chosen = []
        rows = rows_of(gm, graph, graph.groups, lambda axis: True)
        device = next(iter(rows.by_tensor.values()))[0].index.device
        dtype = rows.dtype(dict(gm.named_parameters(remove_duplicate=False)))
        flags = ((start, ~graph.survivors(plan, partial=True).units) for start, plan in self._chosen)
        return rows, [(start, torch.from_numpy(picked).to(device, dtype)) for start, picked in flags]

    def state_dict(self) -> dict[str, Any]:
        """Plain data: the steps so far, and the chosen units, each with the step at which it was chosen."""
        chosen = [[start, plan.to_json()] for start, plan in self._chosen]
        return {"steps": self.steps, "aimed": self._aimed, "chosen": chosen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the steps so far and the chosen units of :meth:`state_dict`.

        Raises:
            InputError: the state of another regularizer.
        """
        check_keys(self, state, ("steps", "aimed", "chosen"))
        self._chosen = [(int(start), PrunePlan.from_json(text)) for start, text in state["chosen"]]
        self.steps, self._aimed, self._rows = int(state["steps"]), bool(state["aimed"]), None


def _fit(graph: ChannelGraph, chosen: Sequence[tuple[int, PrunePlan]]) -> bool:
    """Whether the graph has the axes that the units were chosen in."""
    sizes = {(axis.tensor, axis.dim): axis.size for axis in graph.axes}
    return all(sizes.get(key) == size for _, plan in chosen for key, size in plan.sizes.items())
