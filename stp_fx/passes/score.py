"""ScoreUnits: a score for every unit that may be removed."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.analysis.names import entries_of, prunable_groups
from stp_fx.checks import check_seed
from stp_fx.criteria import Criterion, resolve, score
from stp_fx.passes.artifacts import Artifacts, Outcome
from stp_fx.passes.base import GraphPass

__all__ = ["ScoreUnits"]


@dataclasses.dataclass(frozen=True)
class ScoreUnits(GraphPass):
    """Scores every unit that may be removed with ``criterion`` (a name or a Criterion); ``ignore`` names what is kept whole.

    Raises:
        InputError: an unknown criterion, or a name in ``ignore`` that matches nothing.
        CriterionError: weights that cannot be scored, or data that is missing.
        NothingToPruneError: the graph has no unit that may be removed.
    """

    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    criterion: str | Criterion = "magnitude"
    ignore: Any = ()
    seed: int = 0

    def __post_init__(self) -> None:
        resolve(self.criterion)
        check_seed(self.seed)
        object.__setattr__(self, "ignore", entries_of(self.ignore, "ignore"))

    def requires(self, gm: fx.GraphModule) -> None:
        super().requires(gm)
        prunable_groups(gm, analyze(gm), self.ignore)

    def run(self, gm: fx.GraphModule, artifacts: Artifacts) -> Outcome:
        scores = score(gm, self.criterion, artifacts.measured, ignore=self.ignore, seed=self.seed)
        return Outcome(gm, False, artifacts.with_(scores=scores, plan=None, report=None))
