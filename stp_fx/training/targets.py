"""How much each step of a run removes, of the model as it is by then."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.analysis.cost import Cost, cost
from stp_fx.criteria import score
from stp_fx.selection.choice import select
from stp_fx.selection.selection import Selection

__all__ = ["Targets"]


@dataclasses.dataclass(frozen=True)
class Targets:
    """``ratios``: of the model as it was given, after each step; ``own``: those of single layers; ``whole`` and ``sizes``: the
    cost and the groups at first."""

    selection: Selection
    ratios: tuple[float, ...]
    own: Mapping[Any, tuple[float, ...]]
    whole: Cost
    sizes: Mapping[str, int]
    mask_until_last: bool

    def at(self, model: fx.GraphModule, step: int, taken: int) -> Selection:
        """The selection of ``step`` after those ``taken``, for the graph as it is now: a masked one still counts all its units, a
        shortened one those that are left."""
        ratio = self.ratios[step - 1]
        target, scope = self.selection.target, self.selection.scope
        if not self.mask_until_last and taken and (target != "channels" or scope != "local"):
            ratio = max(0.0, 1 - (1 - ratio) / self._left(model, taken))
        own = {name: shares[step - 1] for name, shares in self.own.items()}
        return dataclasses.replace(self.selection, ratio=ratio, ratios=own)

    def _left(self, model: fx.GraphModule, taken: int) -> float:
        """The fraction that earlier steps have left of what the target counts."""
        target = self.selection.target
        if target in ("macs", "params"):
            return getattr(cost(model), target) / getattr(self.whole, target)
        if target == "channels":
            return sum(group.size for group in analyze(model).groups) / sum(self.sizes.values())
        return 1 - self.ratios[taken - 1]

    def check(self, model: fx.GraphModule) -> None:
        """Plans once at the final ratio, by random scores, so that arguments that do not fit the model are refused now.

        Raises:
            StpFxError: they do not.
        """
        scores = score(model, "random", ignore=self.selection.ignore)
        selection = dataclasses.replace(self.at(model, len(self.ratios), 0), allocation="scope")  # no damages are known yet
        select(model, scores, selection, whole=dict(self.sizes))
