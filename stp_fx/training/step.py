"""One pruning step: everything that can fail, as values; the graph that it starts from is only read."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from stp_fx.criteria import Criterion, needs_of, score
from stp_fx.ir.provenance import provenance_of, with_provenance
from stp_fx.measure.distributed import several_processes, together
from stp_fx.measure.measured import measure
from stp_fx.passes import (
    Artifacts,
    GraphPass,
    MaskChannels,
    Pipeline,
    RecalibrateBatchNorm,
    RemoveChannels,
    SelectUnits,
)
from stp_fx.passes.artifacts import Outcome
from stp_fx.passes.compensations import Compensation
from stp_fx.rewrite.masks import drop_masks
from stp_fx.rewrite.slicing import copied
from stp_fx.selection import PrunePlan
from stp_fx.selection.selection import Selection
from stp_fx.training.adopt import adopt
from stp_fx.training.commit import Change
from stp_fx.training.distributed import assert_same_plan, share_buffers
from stp_fx.training.followers import followed
from stp_fx.training.optimizers import Cuts, cut_states, train_new
from stp_fx.training.regularizers import Regularizer

__all__ = ["Prepared", "StepPasses", "changes_to", "without_observers"]

_log = logging.getLogger("stp_fx.pat")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The graph after a step, its ``plan``, the followers' graphs, and of a sharded model the weights that were ``written``."""

    result: fx.GraphModule
    plan: PrunePlan
    followed: tuple[fx.GraphModule, ...] = ()
    written: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class StepPasses:
    """The parts of each step of a run: measurements, scores, selection, compensation, a rewrite, and recalibration at the
    last.

    ``needs``: of :data:`stp_fx.measure.measured`. ``sizes``: of all groups at first. ``regrow``: each step plans on the graph
    without its masks, so that the units masked before compete with the others, by the weights that they still have.
    """

    criterion: Criterion
    needs: tuple[str, ...]
    compensation: Compensation
    damage: Any
    loader: Iterable[Any] | None
    loss: Any
    recalibration: RecalibrateBatchNorm | None
    removal: RemoveChannels
    sizes: dict[str, int]
    regrow: bool = False

    @property
    def reads_data(self) -> bool:
        """Whether a plan needs batches."""
        return bool(self._to_select)

    @property
    def _to_select(self) -> tuple[str, ...]:
        return (*needs_of(self.criterion), *self.damage.needs)

    def planned(self, model: fx.GraphModule, selection: Selection) -> PrunePlan:
        """The plan of a step with this selection for the model as it is now, masked units included; nothing is changed.

        Raises:
            StpFxError: what one of the passes raises; PassError: another rank has failed.
        """
        with together("the choice of what the next step removes"):
            graph = self._unmasked(_readable(model, None))
            plan = self._selected(graph, selection, self._to_select).artifacts.planned("PATPassManager")
            assert_same_plan(plan)
            return plan

    def _selected(self, graph: fx.GraphModule, selection: Selection, needs: tuple[str, ...], *more: GraphPass) -> Outcome:
        measured = measure(graph, needs, self.loader if needs else None, self.loss)
        scores = score(graph, self.criterion, measured, ignore=selection.ignore)
        passes = Pipeline(*self.damage.passes, SelectUnits(selection, whole=self.sizes), *more)
        return passes.apply(graph, Artifacts(measured, scores))

    def prepare(
        self,
        model: fx.GraphModule,
        followers: Sequence[fx.GraphModule],
        selection: Selection,
        *,
        masking: bool,
        last: bool,
        regularizer: Regularizer | None,
    ) -> Prepared:
        """The step with this selection. Neither ``model`` nor ``followers`` are changed.

        Raises:
            StpFxError: what one of the passes raises; PassError: another rank has failed.
        """
        with together("a pruning step"):
            graph = self._unmasked(_readable(model, regularizer if last else None))
            repaired = self._selected(graph, selection, self.needs, *self.compensation.passes)
            plan = repaired.artifacts.planned("PATPassManager")
            assert_same_plan(plan)
            _tell_frozen(graph, repaired.graph_module)
            rewrite = MaskChannels() if masking else self.removal
            result = rewrite.apply(repaired.graph_module, repaired.artifacts).graph_module
            recalibration = self.recalibration if last else None
            if recalibration is not None:
                result = recalibration(result).graph_module
            others = tuple(
                followed(self._unmasked(each), plan, result, masking=masking, compensation=self.compensation,
                         batches=self.loader, recalibration=recalibration)
                for each in followers
            )  # fmt: skip
            return Prepared(result, plan, others)

    def _unmasked(self, graph: fx.GraphModule) -> fx.GraphModule:
        """With ``regrow`` a copy without masks that shares the parameters; else the graph itself."""
        if not self.regrow or provenance_of(graph).masked is None:
            return graph
        result = copied(graph, {id(p): p for p in graph.parameters()})
        drop_masks(result)
        return with_provenance(result, masked=None)


def changes_to(
    model: fx.GraphModule,
    followers: Sequence[fx.GraphModule],
    ready: Prepared,
    optimizers: Sequence[torch.optim.Optimizer],
    following: Sequence[torch.optim.Optimizer],
) -> tuple[list[Change], bool]:
    """The changes that turn a model and its followers into ``ready``, and whether they change shapes or parameters.

    ``optimizers`` train new parameters, the state of those ``following`` is cut.

    Raises:
        InputError: a state that cannot be cut, or a new bias that no optimizer can train.
    """
    adopted = adopt(model, ready.result)
    cuts = Cuts.of(model, ready.plan, adopted.tensors)
    changes = [*(cut_states(following, cuts) if cuts else ()), *adopted.changes]
    # in the order of the notes, which is all that a resumed run knows
    added = [(name, adopted.added[name]) for name in provenance_of(ready.result).added if name in adopted.added]
    changes += train_new(optimizers, ready.result, added)
    for held, each in zip(followers, ready.followed, strict=True):
        changes += adopt(held, each).changes
    return changes, bool(cuts or added)


def _readable(model: fx.GraphModule, regularizer: Regularizer | None) -> fx.GraphModule:
    """The graph to measure and rewrite: the model, or a copy where ranks share rank 0's buffers or ``regularizer`` is over."""
    graph = model if regularizer is None else without_observers(model, regularizer)
    if several_processes():
        graph = copied(model, {id(p): p for p in model.parameters()}) if graph is model else graph
        share_buffers(graph)
    return graph


def without_observers(model: fx.GraphModule, regularizer: Regularizer) -> fx.GraphModule:
    """A copy that shares the parameters, and from which the regularizer is detached."""
    result = copied(model, {id(p): p for p in model.parameters()})
    regularizer.detach(result)
    return result


def _tell_frozen(before: fx.GraphModule, after: fx.GraphModule) -> None:
    """Logs which parameters that do not train compensation has rewritten: it has to, and the user should know."""
    if before is after:
        return
    now = dict(after.named_parameters())
    frozen = [
        name
        for name, p in before.named_parameters()
        if not p.requires_grad and name in now and not (p.is_meta or torch.equal(p, now[name]))
    ]
    if frozen:
        added = f"; {len(provenance_of(after).added)} biases added" if provenance_of(after).added else ""
        _log.warning("compensation rewrites %d parameters that are frozen: %s%s", len(frozen), ", ".join(frozen), added)
