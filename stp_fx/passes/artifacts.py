"""``Artifacts``: what passes hand to each other. One frozen value; a graph carries none of it."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from stp_fx.analysis.plan import PrunePlan
from stp_fx.checks import is_a
from stp_fx.criteria.scores import Scores
from stp_fx.errors import InputError, PassError
from stp_fx.ir.stamp import check_stamp, stamp_of
from stp_fx.measure.gradients import Gradients
from stp_fx.measure.measured import Measured
from stp_fx.measure.statistics import Statistics
from stp_fx.report.run_report import RunReport
from stp_fx.selection.damage import Damages

__all__ = ["Artifacts", "Outcome", "outcome_of"]


@dataclasses.dataclass(frozen=True, eq=False)
class Artifacts:
    """``measured`` on calibration data, the ``scores`` of all units, the ``damages`` of their removal, the ``plan`` of a
    selection and its ``report``; each None until a pass has made it. Measurements, scores and damages know which graph and
    weights they were made from."""

    measured: Measured = dataclasses.field(default_factory=Measured)
    scores: Scores | None = None
    plan: PrunePlan | None = None
    report: RunReport | None = None
    damages: Damages | None = None

    def with_(self, **changes: Any) -> Artifacts:
        """These artifacts with fields replaced."""
        return dataclasses.replace(self, **changes)

    def carried_to(self, gm: fx.GraphModule) -> Artifacts:
        """The same artifacts for a graph of the same structure whose weights a pass has repaired: what was measured and scored
        describes the network that the plan was made for."""
        now = stamp_of(gm)
        known = self.measured
        statistics = known.statistics and dataclasses.replace(known.statistics, stamp=now)
        gradients = known.gradients and dataclasses.replace(known.gradients, stamp=now)
        scores = self.scores and dataclasses.replace(self.scores, stamp=now)
        damages = self.damages and dataclasses.replace(self.damages, stamp=now)
        return self.with_(measured=Measured(statistics, gradients), scores=scores, damages=damages)

    def planned(self, name: str) -> PrunePlan:
        """The plan; ``name`` is the pass that needs it.

        Raises:
            PassError: there is none.
        """
        if self.plan is None:
            raise PassError(f"{name} needs a plan: run ScoreUnits and SelectUnits before it in one Pipeline, or give it `plan`")
        return self.plan

    def scored(self, name: str) -> Scores:
        """The scores; ``name`` is the pass that needs them.

        Raises:
            PassError: there are none.
        """
        if self.scores is None:
            raise PassError(f"{name} needs scores: run ScoreUnits before it in one Pipeline")
        return self.scores

    def statistics_for(self, gm: fx.GraphModule, name: str, given: Statistics | None = None) -> Statistics:
        """``given``, or the collected statistics; ``name`` is the pass that needs them.

        Raises:
            PassError: there are none.
            InputError: they are of another graph or of other weights.
        """
        found = self.measured.statistics if given is None else given
        if found is None:
            raise PassError(f"{name} needs statistics: run CollectStatistics before it in one Pipeline, or give it `statistics`")
        if not is_a(found, Statistics):
            raise InputError(f"`statistics` is a {type(found).__name__}; give what collect_statistics returned")
        check_stamp(gm, found.stamp, "the statistics", "collect them again on this graph")
        return found

    def gradients(self) -> Gradients | None:
        """The collected gradients, or None."""
        return self.measured.gradients


class Outcome(PassResult):
    """The result of a pass: torch's ``PassResult`` (``graph_module``, ``modified``) with ``artifacts``."""

    # torch's named tuple gives its fields no types
    graph_module: fx.GraphModule  # pyright: ignore[reportIncompatibleVariableOverride]
    modified: bool  # pyright: ignore[reportIncompatibleVariableOverride]
    artifacts: Artifacts

    def __new__(cls, graph_module: fx.GraphModule, modified: bool, artifacts: Artifacts | None = None) -> Outcome:
        made: Any = super().__new__(cls, graph_module, modified)
        made.artifacts = artifacts or Artifacts()
        return made


def outcome_of(result: object, culprit: str, artifacts: Artifacts) -> Outcome:
    """The result of ``culprit``, torch's ``PassResult``, with ``artifacts``.

    Raises:
        PassError: it returned something else.
    """
    pair = cast("tuple[object, ...]", result) if is_a(result, tuple) else ()
    if len(pair) == 2 and isinstance(pair[0], fx.GraphModule):
        return Outcome(pair[0], bool(pair[1]), artifacts)
    raise PassError(f"{culprit} returned a {type(result).__name__}; return PassResult(graph_module, modified)")
