"""Pruning steps of a model whose parameters are spread over processes (FSDP2, tensor parallel).

Plans are made on a graph of the same structure without parameters; numbers are gathered one tensor at a time. What
``fully_shard`` has wrapped cannot be shortened, so every step makes a new graph, which ``wrap`` shards as it did the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.optim import Optimizer

from stp_fx.analysis.build import analyze
from stp_fx.criteria import score
from stp_fx.errors import InputError, RewriteError
from stp_fx.ir.provenance import provenance_of
from stp_fx.ir.sharded import check_sharded, is_sharded, local_part
from stp_fx.ir.stamp import stamp_of
from stp_fx.measure.distributed import together
from stp_fx.measure.measured import Measured, reading_for
from stp_fx.measure.statistics import Statistics, collect_statistics
from stp_fx.passes import Artifacts, SelectUnits
from stp_fx.rewrite.compensation import Method, compensate_streamed
from stp_fx.rewrite.removal import is_partial, mask, remove
from stp_fx.rewrite.rms_norm import rms_scale_factors
from stp_fx.rewrite.slicing import copied, take
from stp_fx.selection import PrunePlan
from stp_fx.selection.selection import Selection
from stp_fx.training.commit import Change, entry
from stp_fx.training.distributed import assert_same_plan, share_buffers
from stp_fx.training.optimizers import train_new
from stp_fx.training.sharded_states import moved_states, replaced
from stp_fx.training.shards import Alike, Shards, resharded, streamed_copy, structure_of_shards
from stp_fx.training.step import Prepared, StepPasses

__all__ = ["Sharded", "check_possible"]

_NO = "of a sharded model (fully_shard, tensor parallel)"


def check_possible(shards: Sharded | None, passes: StepPasses, selection: Selection, **others: Any) -> None:
    """Refuses what reads more than one tensor of a sharded model at a time; ``others``: arguments of the manager that do.

    Raises:
        InputError: names the argument.
    """
    if shards is None:
        return
    for name, value in others.items():
        if value is not None and value not in ((), False, "auto"):  # the last two are values of `validate`
            raise InputError(f"`{name}` is not possible {_NO}: leave it out, or train with DistributedDataParallel")
    if not set(passes.needs) <= {"statistics", "maps", "covariance", "patches"} or passes.damage.passes:
        raise InputError(
            f"the criterion or the allocation reads gradients or damages, which is not possible {_NO}: give one of weights or "
            "statistics, such as 'magnitude' or 'variance', and allocation 'scope'"
        )
    if any(need == "covariance" for need in getattr(passes.criterion, "needs", ())):
        raise InputError(f"the criterion reads covariances, which is not possible {_NO}: give 'magnitude' or 'variance'")
    if any(not hasattr(each, "method") for each in passes.compensation.passes):
        raise InputError(f"this compensation is not possible {_NO}: give None, 'mean' or 'least_squares'")
    if passes.recalibration is not None:
        raise InputError(f"`recalibrate` is not possible {_NO}: leave it out, and train on")
    if selection.target == "latency":
        raise InputError(f"target 'latency' is not possible {_NO}: give 'macs' or 'params'")


@dataclasses.dataclass(frozen=True)
class Sharded:
    """A model in shards, as a manager holds it. ``graph``: its structure, with the numbers of when it was made; ``parallel``:
    what ``wrap`` gave."""

    model: fx.GraphModule
    graph: fx.GraphModule
    wrap: Callable[[nn.Module], nn.Module]
    parallel: nn.Module

    @staticmethod
    def of(model: fx.GraphModule, wrap: Callable[[nn.Module], nn.Module] | None) -> Sharded | None:
        """None for a model that is not sharded. To be called by all processes.

        Raises:
            InputError: no ``wrap``, or shards that cannot be cut.
        """
        if not is_sharded(model):
            return None
        if wrap is None:
            raise InputError(
                "the model is sharded (fully_shard, tensor parallel), so every step makes a new one: give `wrap`, the function "
                "that shards a graph as this one is, such as lambda gm: fully_shard(gm, mesh=mesh)"
            )
        check_sharded(model)
        with together("taking a sharded model"):
            return Sharded(model, structure_of_shards(model), wrap, model)

    def prepare(self, passes: StepPasses, selection: Selection, *, masking: bool) -> Prepared:
        """A step with this selection, as a graph without shards; the model is only read.

        Raises:
            StpFxError: what a pass of the step raises; PassError: another rank has failed.
        """
        with together("a pruning step"):
            graph = structure_of_shards(self.model)
            share_buffers(graph)
            shards = Shards(self.model)
            statistics = self._statistics(passes, graph, shards)
            measured = Measured(statistics)
            scores = score(graph, passes.criterion, measured, ignore=selection.ignore, tensors=shards)
            select = SelectUnits(selection, whole=passes.sizes)
            plan = select.apply(graph, Artifacts(measured, scores)).artifacts.planned("PATPassManager")
            assert_same_plan(plan)
            _check_plan(graph, plan, masking)
            written: dict[str, torch.Tensor] = {}
            for each in passes.compensation.passes:
                assert statistics is not None
                graph = self._compensated(graph, plan, statistics, each.method(), written)  # type: ignore[attr-defined]
            result = mask(graph, plan, self.device) if masking else remove(graph, plan)
            return Prepared(result, plan, written=written)

    @property
    def device(self) -> torch.device:
        """Where this process has its parts."""
        return next(self.model.parameters()).device

    def _statistics(self, passes: StepPasses, graph: fx.GraphModule, shards: Shards) -> Statistics | None:
        reading = reading_for(passes.needs, passes.loader if passes.needs else None)
        if reading.statistics is None or passes.loader is None:
            return None
        streamed = streamed_copy(graph, self.device, shards.__getitem__)
        found = collect_statistics(graph, Alike(passes.loader), streamed=streamed, **reading.statistics)
        return dataclasses.replace(found, stamp=stamp_of(graph))

    def _compensated(
        self, graph: fx.GraphModule, plan: PrunePlan, statistics: Statistics, method: Method, written: dict[str, torch.Tensor]
    ) -> fx.GraphModule:
        """The graph with its vectors compensated; the weights that change go to ``written``, in shards."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))

        def read(name: str) -> torch.Tensor:
            return Shards(self.model, written)[name]

        def write(name: str, tensor: torch.Tensor) -> None:
            like: Any = parameters[name]
            from torch.distributed.tensor import DTensor

            part = local_part(tensor, like).clone()
            written[name] = DTensor.from_local(
                part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=tensor.stride()
            )

        source = streamed_copy(graph, self.device, Shards(self.model).__getitem__)
        target = streamed_copy(graph, self.device, read, write)
        compensate_streamed(graph, plan, statistics, method, source, target)
        memo: dict[int, Any] = {}
        for name, p in graph.named_parameters():
            if p.is_meta:
                memo[id(target.module.get_parameter(name))] = nn.Parameter(p.detach(), requires_grad=p.requires_grad)
        return copied(target.module, memo)

    def changes(
        self, ready: Prepared, optimizers: Sequence[Optimizer], following: Sequence[Optimizer]
    ) -> tuple[Sharded, list[Change]]:
        """The model in shards that is ``ready``, and what makes optimizers train it. To be called by all processes.

        Raises:
            InputError: ``wrap`` fails, or a state that cannot be cut.
            PassError: another rank has failed.
        """
        with together("sharding the model anew"):
            kept: dict[str, dict[int, np.ndarray]] = {}
            for (name, dim), positions in ready.plan.kept.items():
                kept.setdefault(name, {})[dim] = positions
            first = analyze(self.graph).first_name
            shards = Shards(self.model, ready.written)
            result = dict(ready.result.named_parameters())

            def values(name: str) -> torch.Tensor:
                if name not in shards and name in provenance_of(ready.result).added:  # of a saved run, whose numbers come later
                    return torch.zeros_like(result[name], device=self.device)
                whole, shape = shards[name], result[name].shape
                cut = whole if whole.shape == shape else take(whole, kept.get(first(name), {}))
                if cut.shape != shape:
                    raise RewriteError(f"{name!r} has shape {tuple(cut.shape)} after the cut, and the graph {tuple(shape)}")
                return cut

            new, parallel = resharded(ready.result, self.wrap, values, self.device)
            shards.let_go()
            before = dict(self.model.named_parameters())
            pairs = {id(before[name]): (name, before[name], p) for name, p in new.named_parameters() if name in before}
            changes = moved_states(following, pairs, {name: kept.get(first(name), {}) for name in before})
            added = [(name, new.get_parameter(name)) for name in provenance_of(ready.result).added if name not in before]
            changes += [*train_new(optimizers, self.model, added), *replaced(following, pairs)]
            return Sharded(new, ready.result, self.wrap, parallel), changes

    def held(self, manager: MutableMapping[str, Any]) -> list[Change]:
        """The changes that put this model into a manager."""
        return [entry(manager, "model", self.model), entry(manager, "_shards", self), entry(manager, "_parallel", self.parallel)]


def _check_plan(graph: fx.GraphModule, plan: PrunePlan, masking: bool) -> None:
    if plan.blocks:
        raise InputError(f"removing blocks is not possible {_NO}: leave out `blocks`, or prune before it is sharded")
    known = analyze(graph)
    if masking or plan.is_empty:
        return
    factors = rms_scale_factors(graph, known, known.survivors(plan, partial=is_partial(graph)))
    name = next((each for each in factors if graph.get_parameter(each).is_meta), None)
    if name is not None:
        raise InputError(f"{name!r} is the scale of a norm over several dimensions, which cannot be renewed in shards: ignore it")
