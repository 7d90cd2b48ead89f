"""SelectUnits: from scores to a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import fx

from stp_fx.checks import is_a, shown
from stp_fx.errors import InputError
from stp_fx.passes.artifacts import Artifacts, Outcome
from stp_fx.passes.base import GraphPass
from stp_fx.report.run_report import run_report
from stp_fx.selection.choice import CostOf, check_names, choose
from stp_fx.selection.selection import Selection, takes_selection

__all__ = ["SelectUnits"]


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class SelectUnits(GraphPass):
    """Turns the scores of :class:`ScoreUnits` into a plan, and a report of it.

    ``SelectUnits(0.5, scope="global")`` and ``SelectUnits(Selection(0.5, scope="global"))`` are the same; the arguments are those
    of :class:`stp_fx.Selection`. ``whole`` maps names of groups to the units that they had before an earlier removal: with the
    target "channels" in the local scope, and in ``ratios``, a ratio is a fraction of those. ``cost`` replaces what a target other
    than "channels" counts: the cost of the network without the units flagged in a bool array.

    Raises:
        InputError: an argument out of range, a name in ``ratios`` or ``ignore`` that matches nothing.
        TargetError: a target that cannot be met; the message names the cost in reach.
        PassError: no scores.
    """

    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    selection: Selection = dataclasses.field(default_factory=Selection)
    whole: Mapping[str, int] | None = None
    cost: CostOf | None = None

    @takes_selection("ratio")
    def __init__(
        self,
        ratio: float | Selection = 0.5,
        *,
        whole: Mapping[str, int] | None = None,
        cost: CostOf | None = None,
        **options: Any,
    ) -> None:
        if isinstance(ratio, Selection) and options:
            raise InputError(f"SelectUnits takes a Selection or its options, not both; got {', '.join(options)} beside one")
        if whole is not None and not is_a(whole, Mapping):
            raise InputError(f"`whole` maps groups to their units at first; got {shown(whole)}")
        if cost is not None and not callable(cost):
            raise InputError(f"`cost` is a callable (removed units) -> cost; got {shown(cost)}")
        selection = ratio if isinstance(ratio, Selection) else Selection(ratio, **options)
        for name, value in (("selection", selection), ("whole", whole), ("cost", cost)):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        whole = "" if self.whole is None else f", whole={self.whole!r}"
        return f"SelectUnits({self.selection.text()}{whole})"

    __str__ = __repr__

    def requires(self, gm: fx.GraphModule) -> None:
        super().requires(gm)
        check_names(gm, self.selection)

    def run(self, gm: fx.GraphModule, artifacts: Artifacts) -> Outcome:
        scores = artifacts.scored("SelectUnits")
        choice = choose(gm, scores, self.selection, cost=self.cost, whole=self.whole, damages=artifacts.damages)
        return Outcome(gm, False, artifacts.with_(plan=choice.plan, report=run_report(gm, scores, choice)))
