"""The laws of ARCHITECTURE.md, section 8, as checks of one module, its inputs and a request.

Each ``check_*`` raises AssertionError; :func:`check_laws` runs all of them and tells what there was to check.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

import stp_fx
from stp_fx.analysis.norm_calls import norm_calls
from stp_fx.analysis.plan import PrunePlan
from stp_fx.errors import NothingToPruneError, PlanError
from stp_fx.testing.absent import run_absent
from stp_fx.testing.measure import (
    Inputs,
    assert_same,
    buffers_restored,
    count_macs,
    count_params,
    loss_of,
    run,
    shapes_of,
    state_of,
)
from stp_fx.testing.oracle import all_channels_named, columns_suffice, run_silenced
from stp_fx.testing.strategies import Request

__all__ = ["Case", "Outcome", "assert_same", "check_laws", "touched_groups"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The data of a check. ``exact`` is None if nothing was pruned; ``columns``: the simple oracle applied too."""

    pruned: bool
    exact: bool | None = None
    columns: bool = False

    @property
    def label(self) -> str:
        if not self.pruned:
            return "nothing pruned"
        return ("exact" if self.exact else "inexact") + (", two oracles" if self.columns else "")


@dataclasses.dataclass(eq=False)
class Case:
    """A module in double precision and eval mode, inputs to compare numbers on, and other inputs it must run on.

    ``columns``: zeroing input columns silences every consumer; None asks the blocks that the module is made of. ``frontend`` is
    what captures the module.
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    request: Request = dataclasses.field(default_factory=Request)
    others: Sequence[tuple[Any, ...]] = ()
    criterion: Any = None
    columns: bool | None = None
    frontend: str = "auto"

    @functools.cached_property
    def gm(self) -> fx.GraphModule:
        return stp_fx.trace(self.module, self.inputs, frontend=self.frontend, validate=False)  # the laws compare more

    @functools.cached_property
    def graph(self) -> stp_fx.ChannelGraph:
        return stp_fx.analyze(self.gm)

    @functools.cached_property
    def pruned(self) -> fx.GraphModule:
        return self.prune(self.gm, self.request.ratio)

    @functools.cached_property
    def plan(self) -> PrunePlan:
        return stp_fx.plan_of(self.pruned)

    @functools.cached_property
    def masked(self) -> fx.GraphModule:
        return stp_fx.apply_plan(self.gm, self.plan, mask=True)

    @property
    def simple(self) -> bool:
        """Whether the simple oracle is complete."""
        return columns_suffice(self.module) if self.columns is None else self.columns

    def prune(self, gm: fx.GraphModule, ratio: float, seed: int = 0) -> fx.GraphModule:
        request = self.request
        criterion = self.criterion or stp_fx.criteria.Random(seed=request.seed + seed)
        options: Any = {"scope": request.scope, "products": request.products, "validate": False}
        return stp_fx.prune_graph(gm, criterion, ratio, **options)


def check_laws(case: Case) -> Outcome:
    """All laws on one case. A network without any group is only checked to be captured, explained and left alone."""
    before = _snapshot(case)
    check_capture(case)
    check_explained(case)
    if not case.graph.groups:
        check_nothing_to_prune(case)
        check_untouched(case, before)
        return Outcome(pruned=False)
    check_nothing_asked(case)
    if case.plan.is_empty:
        check_untouched(case, before)
        return Outcome(pruned=False)
    check_state(case)
    exact = check_numbers(case)
    check_costs(case)
    check_composition(case)
    check_refusal(case)
    check_runs(case)
    check_untouched(case, before)
    return Outcome(True, exact, columns=exact and case.simple)


# -- numbers -----------------------------------------------------------------------------------------------------------


def check_capture(case: Case) -> None:
    """The graph gives the module's numbers (bit for bit where no attention was lowered) and keeps its mode."""
    assert case.gm.training == case.module.training
    expected, actual = run(case.module, case.inputs), run(case.gm, case.inputs)
    lowered = any(isinstance(m, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) for m in case.module.modules())
    assert_same(actual, expected, "the captured graph", tolerance=1e-12 if lowered else 0.0)


def check_nothing_asked(case: Case) -> None:
    """Law 2: a ratio of 0 gives the same numbers, bit for bit."""
    same = case.prune(case.gm, 0.0)
    assert stp_fx.plan_of(same).is_empty
    assert_same(run(same, case.inputs), run(case.gm, case.inputs), "ratio 0", tolerance=0.0)


def check_numbers(case: Case) -> bool:
    """Law 2: removed == absent (independent) always; == masked (the library's), == silenced (simple, independent) if exact.

    Returns whether all touched groups are exact.
    """
    removed = run(case.pruned, case.inputs)
    exact = all(group.exact for group in touched_groups(case.graph, case.plan))
    if all_channels_named(case.module) or (exact and case.simple):
        assert_same(removed, run_absent(case.module, case.plan, case.inputs), "removed, against absent")
    if exact:
        assert_same(run(case.masked, case.inputs), removed, "masked, against removed")
        if case.simple:
            assert_same(removed, run_silenced(case.module, case.plan, case.inputs), "removed, against silenced columns")
    return exact


def touched_groups(graph: stp_fx.ChannelGraph, plan: PrunePlan) -> list[Any]:
    """The groups that lose a unit: one of whose units has no position left anywhere."""
    touched = []
    for group in graph.groups:
        lives = np.zeros(group.size, dtype=bool)
        for member in group.members:
            kept = plan.kept.get((member.axis.tensor, member.axis.dim))
            stays = np.ones(member.axis.size, dtype=bool)
            if kept is not None:
                stays[:] = False
                stays[kept] = True
            np.logical_or.at(lives, member.unit, stays[member.index])
        if not lives.all():
            touched.append(group)
    return touched


# -- state, costs, composition -------------------------------------------------------------------------------------------


def check_state(case: Case) -> None:
    """Every parameter, gradient and floating buffer of the result is the original's, cut as the plan says; names survive.

    Scales of RMSNorms are multiplied by sqrt(C / C').
    """
    scales = {norm.weight for norm in norm_calls(case.gm) if norm.kind == "rms"}
    originals, pruned = _named(case.gm), _named(case.pruned)
    assert set(pruned) <= set(originals)
    lost = [name for name, t in originals.items() if isinstance(t, nn.Parameter) and name not in pruned]
    assert not lost, f"parameters lost by removal: {lost}"
    for name, tensor in pruned.items():
        source = originals[name]
        assert tensor.requires_grad == source.requires_grad
        if tensor.is_floating_point():
            expected = _cut(source.detach(), name, case.plan)
            ratio = source.shape[-1] / tensor.shape[-1] if name in scales else 1.0
            if ratio != 1.0:
                torch.testing.assert_close(tensor.detach(), expected * ratio**0.5, rtol=1e-12, atol=0)
            else:
                assert torch.equal(tensor, expected), f"{name} is not the original, cut"
        if source.grad is not None:
            assert tensor.grad is not None, f"{name} lost its gradient"
            assert torch.equal(tensor.grad, _cut(source.grad, name, case.plan)), f"{name}.grad is not the original's, cut"


def _named(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _cut(tensor: torch.Tensor, name: str, plan: PrunePlan) -> torch.Tensor:
    for (each, dim), kept in plan.kept.items():
        if each == name:
            tensor = tensor.index_select(dim, torch.as_tensor(kept.copy()))
    return tensor


def check_costs(case: Case) -> None:
    """Law 3: what the plan predicts, what the masked graph counts, what the result counts, and what torch counts are one."""
    found = stp_fx.cost(case.pruned)
    predicted = case.graph.survivors(case.plan).cost
    masked = stp_fx.cost(case.masked)
    assert predicted.params == masked.params == found.params, "predicted, masked and the result's parameters"
    degenerate = _degenerate(case, predicted, found)
    for cost, what in ((predicted, "predicted"), (masked, "masked"), (found, "the result's")):
        rest = {name: macs for name, macs in cost.per_node.items() if name not in degenerate}
        expected = {name: macs for name, macs in predicted.per_node.items() if name not in degenerate}
        assert rest == expected, f"{what} MACs, against the predicted ones"
    for gm in (case.gm, case.pruned):
        counted = (count_macs(gm, case.inputs), count_params(gm))
        assert (stp_fx.cost(gm).macs, stp_fx.cost(gm).params) == counted, "cost, against torch's counter"


def _degenerate(case: Case, predicted: stp_fx.Cost, found: stp_fx.Cost) -> set[str]:
    """Calls of torch.einsum that multiply pointwise in the result: it does where a letter has size one."""
    calls = {torch.einsum, torch.tensordot}
    names = {node.name for node in case.gm.graph.nodes if node.target in calls}
    return {name for name in names if predicted.per_node.get(name) and not found.per_node.get(name)}


def check_composition(case: Case) -> None:
    """Law 3: removing a plan, then another from what is left, is removing both at once."""
    try:
        twice = case.prune(case.pruned, case.request.ratio, seed=1)
    except NothingToPruneError:
        return
    total = stp_fx.plan_of(twice)
    second = _relative(total, case.plan)
    assert case.plan.then(second) == total
    at_once, in_turn = (stp_fx.apply_plan(gm, plan, validate=False) for gm, plan in ((case.gm, total), (case.pruned, second)))
    assert_same(run(at_once, case.inputs), run(twice, case.inputs), "both plans at once, against one after the other")
    for other in (at_once, in_turn):
        assert_same(dict(_named(other)), dict(_named(twice)), "state after two plans", tolerance=1e-14)
        assert stp_fx.plan_of(other) == total


def _relative(total: PrunePlan, first: PrunePlan) -> PrunePlan:
    """The plan that is left of ``total`` once ``first`` is done, in the indices of what ``first`` left."""
    kept, sizes = {}, {}
    for key, indices in total.kept.items():
        before = first.kept.get(key, np.arange(total.sizes[key]))
        kept[key], sizes[key] = np.searchsorted(before, indices), len(before)
    return PrunePlan(kept, sizes)


# -- running, refusing, leaving alone --------------------------------------------------------------------------------------


def check_runs(case: Case) -> None:
    """Law 1: other batches and sizes, train and eval, with the original's output shapes; a backward pass and a step."""
    for inputs in (case.inputs, *(each for each in case.others if not _fixed_by_export(case, each))):
        assert shapes_of(run(case.pruned, inputs)) == shapes_of(run(case.module, inputs))
    modes = [module.training for module in case.module.modules()]
    inputs = case.others[0] if case.others else case.inputs
    try:
        case.pruned.train()
        case.module.train()
        with buffers_restored(case.module):
            expected = shapes_of(run(case.module, inputs))
            wanted = _gradients(case.module, inputs)
        assert shapes_of(run(case.pruned, inputs)) == expected
        for parameter in case.pruned.parameters():
            parameter.grad = None
        loss_of(case.pruned(*inputs)).backward()
        got = {name for name, p in case.pruned.named_parameters() if p.grad is not None and p.grad.shape == p.shape}
        assert wanted <= got, f"no gradient for {sorted(wanted - got)}"
        torch.optim.SGD(case.pruned.parameters(), lr=1e-3).step()
        assert shapes_of(run(case.pruned.eval(), inputs)) == expected
    finally:
        for module, mode in zip(case.module.modules(), modes, strict=True):
            module.training = mode


def _fixed_by_export(case: Case, inputs: Inputs) -> bool:
    """Whether the graph refuses another size than the example's, of anything but the batch: torch.export may fix those."""
    sizes = zip(shapes_of(inputs), shapes_of(case.inputs), strict=True)
    if case.frontend != "export" or all(now[1:] == then[1:] for now, then in sizes):
        return False
    try:
        run(case.gm, inputs)
    except AssertionError:
        return True
    return False


def _gradients(module: nn.Module, inputs: Inputs) -> set[str]:
    """Names of the parameters that a backward pass reaches; gradients are put back as they were."""
    named = dict(module.named_parameters())
    wanted = {name: p for name, p in named.items() if p.requires_grad}
    found = torch.autograd.grad(loss_of(module(*inputs)), list(wanted.values()), allow_unused=True)
    return {name for name, gradient in zip(wanted, found, strict=True) if gradient is not None}


def check_refusal(case: Case) -> None:
    """Law 4: a plan that leaves out a coupled axis is refused, and nothing is half-done."""
    if len(case.plan.kept) < 2:
        return
    before = state_of(case.gm)
    keys = list(case.plan.kept)[1:]
    broken = PrunePlan({key: case.plan.kept[key] for key in keys}, {key: case.plan.sizes[key] for key in keys})
    try:
        result = stp_fx.apply_plan(case.gm, broken, validate=False)
    except PlanError:
        pass
    else:  # what is left of the plan may be a plan of its own, if the first axis stood alone
        assert stp_fx.plan_of(result) == broken
    assert_same(state_of(case.gm), before, "the graph after a refused plan", tolerance=0.0)


def check_nothing_to_prune(case: Case) -> None:
    """A graph without groups is refused by name of the reason."""
    try:
        case.prune(case.gm, case.request.ratio)
    except NothingToPruneError:
        return
    raise AssertionError("no group, and yet prune_graph had something to do")


def check_explained(case: Case) -> None:
    """Law 5: `explain` covers every axis of every parameter, and gives a reason for every position no group holds."""
    free: dict[tuple[str, int], set[int]] = {}
    for group in case.graph.groups:
        for member in group.members:
            free.setdefault((member.axis.tensor, member.axis.dim), set()).update(member.index.tolist())
    for name, parameter in case.gm.named_parameters():
        for dim, size in enumerate(parameter.shape):
            if size == 1:
                continue
            text = case.graph.explain(f"{name}:{dim}")
            assert text.strip(), f"no explanation of {name}:{dim}"
            held = len(free.get((name, dim), ()))
            if held < size:
                assert any(word in text for word in REASONS), f"no reason why {name}:{dim} is pinned: {text}"


REASONS = ("pinned",)


def _snapshot(case: Case) -> dict[str, Any]:
    """The state that must not change; gradients are made up first, so that there is something to change."""
    generator = torch.Generator().manual_seed(case.request.seed)
    for parameter in case.gm.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return {"module": state_of(case.module), "graph": state_of(case.gm), "code": case.gm.code, "nodes": str(case.gm.graph)}


def check_untouched(case: Case, before: Mapping[str, Any]) -> None:
    """Law 4: tensors, gradients, modes and code of module and graph are what they were."""
    assert case.gm.code == before["code"]
    assert str(case.gm.graph) == before["nodes"]
    assert_same(state_of(case.module), before["module"], "the module given", tolerance=0.0)
    assert_same(state_of(case.gm), before["graph"], "the graph given", tolerance=0.0)
    assert not any(module.training for module in (*case.module.modules(), *case.gm.modules()))
