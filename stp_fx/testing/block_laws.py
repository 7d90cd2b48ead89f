"""The laws of removing blocks, as checks of one module, its inputs and what is chosen.

The oracle is the module itself, run eagerly, with hooks that zero the outputs of these branches. It knows those of
:class:`~stp_fx.testing.blocks.join.Residual`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

import stp_fx
from stp_fx.analysis.blocks import outermost
from stp_fx.analysis.plan import PrunePlan
from stp_fx.errors import NothingToPruneError
from stp_fx.ir.random_ops import FixedDraws
from stp_fx.testing.blocks.join import Residual
from stp_fx.testing.measure import assert_same, count_macs, count_params, run, state_of

__all__ = ["BlockCase", "check_block_laws", "run_without_branches"]


@dataclasses.dataclass(eq=False)
class BlockCase:
    """A module in double precision and eval mode, inputs, and which of its blocks are removed: those at ``picks``, modulo their
    number. ``seed``: of the random scores by which channels are chosen."""

    module: nn.Module
    inputs: tuple[Any, ...]
    picks: Sequence[int]
    seed: int = 0

    @functools.cached_property
    def gm(self) -> fx.GraphModule:
        return stp_fx.trace(self.module, self.inputs, validate=False)

    @functools.cached_property
    def blocks(self) -> tuple[stp_fx.Block, ...]:
        return stp_fx.blocks_of(self.gm)

    @functools.cached_property
    def chosen(self) -> tuple[str, ...]:
        """Names of the blocks that are removed, none inside another."""
        free = [block for block in self.blocks if block.removable]
        picked = {free[pick % len(free)].name for pick in self.picks} if free else set()
        return tuple(block.name for block in outermost([b for b in free if b.name in picked], self.blocks))

    def without(self, gm: fx.GraphModule, names: Iterable[str]) -> fx.GraphModule:
        return stp_fx.passes.RemoveBlocks(tuple(names), validate=False)(gm).graph_module

    def pruned(self, gm: fx.GraphModule) -> fx.GraphModule:
        return stp_fx.prune_graph(gm, stp_fx.criteria.Random(seed=self.seed), 0.5, validate=False)


def check_block_laws(case: BlockCase) -> str:
    """All laws on one case; returns what there was to check: "no block", "masks", or "masks, oracle"."""
    before, code = state_of(case.gm), case.gm.code
    for block in case.blocks:
        assert block.name in block.explain()
        assert block.reason in block.explain()
    if not case.chosen:
        return "no block"
    removed = case.without(case.gm, case.chosen)
    check_masked(case, removed)
    oracle = check_against_module(case, removed)
    check_left(case, removed)
    check_in_turn(case, removed)
    check_with_channels(case, removed)
    assert case.gm.code == code
    assert_same(state_of(case.gm), before, "the graph given", tolerance=0.0)
    return "masks, oracle" if oracle else "masks"


def check_masked(case: BlockCase, removed: fx.GraphModule) -> None:
    """The graph with masked blocks computes what the smaller one does, in eval and in train mode, and costs as much."""
    masked = stp_fx.passes.MaskBlocks(case.chosen)(case.gm).graph_module
    assert_same(run(removed, case.inputs), run(masked, case.inputs), "removed, against masked", tolerance=1e-12)
    assert_same(_trained(removed, case), _trained(masked, case), "removed, against masked, in train mode", tolerance=1e-12)
    assert (stp_fx.cost(masked).macs, stp_fx.cost(masked).params) == (stp_fx.cost(removed).macs, stp_fx.cost(removed).params)
    unmasked = stp_fx.passes.UnmaskChannels()(masked).graph_module
    assert_same(run(unmasked, case.inputs), run(case.gm, case.inputs), "unmasked", tolerance=0.0)


def check_against_module(case: BlockCase, removed: fx.GraphModule) -> bool:
    """The smaller graph computes what the module does with the outputs of these branches zeroed; False if some are no
    :class:`Residual`."""
    totals = {block.name: block.total for block in case.blocks}
    stacks = {node.name: list(node.meta.get("nn_module_stack") or ()) for node in case.gm.graph.nodes}
    paths = [(stacks[totals[name]] or [""])[-1] for name in case.chosen]
    if not all(isinstance(case.module.get_submodule(path), Residual) for path in paths) or len(set(paths)) < len(paths):
        return False
    expected = run_without_branches(case.module, [f"{path}.branch" for path in paths], case.inputs)
    assert_same(run(removed, case.inputs), expected, "removed, against the module with zeroed branches", tolerance=1e-12)
    return True


def run_without_branches(module: nn.Module, paths: Iterable[str], inputs: Sequence[Any]) -> Any:
    """The output of ``module`` when the outputs of its submodules at ``paths`` are zero."""
    handles = [module.get_submodule(path).register_forward_hook(_zeroed) for path in paths]
    try:
        return run(module, inputs)
    finally:
        for handle in handles:
            handle.remove()


def _zeroed(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(output)


def check_left(case: BlockCase, removed: fx.GraphModule) -> None:
    """The remaining tensors are the original's, and each of them is read; the cost is torch's count; other names stay."""
    originals = dict(case.gm.named_parameters(remove_duplicate=False))
    names = {name for block in case.blocks if block.name in case.chosen for name in block.parameters}
    left = dict(removed.named_parameters(remove_duplicate=False))
    assert names.isdisjoint(left), "parameters that only a removed block reads are still there"
    assert set(dict(case.gm.named_parameters())) - names == set(dict(removed.named_parameters())), "other parameters were removed"
    assert all(torch.equal(parameter, originals[name]) for name, parameter in left.items())
    assert (stp_fx.cost(removed).macs, stp_fx.cost(removed).params) == (
        count_macs(removed, case.inputs),
        count_params(removed),
    )
    gone = set(stp_fx.plan_of(removed).blocks)
    after = {block.name: block for block in stp_fx.blocks_of(removed)}
    assert after.keys() == {block.name for block in case.blocks} - gone, "names of other blocks have changed"


def check_in_turn(case: BlockCase, removed: fx.GraphModule) -> None:
    """One block after the other is all at once, and the record of it can be carried out and read back."""
    step = case.gm
    for name in case.chosen:
        step = case.without(step, [name])
    assert_same(run(step, case.inputs), run(removed, case.inputs), "blocks in turn, against at once", tolerance=0.0)
    plan = stp_fx.plan_of(step)
    assert plan == stp_fx.plan_of(removed)
    again = stp_fx.apply_plan(case.gm, PrunePlan.from_json(plan.to_json()), validate=False)
    assert_same(run(again, case.inputs), run(removed, case.inputs), "the plan carried out", tolerance=0.0)
    assert list(again.state_dict()) == list(removed.state_dict())


def check_with_channels(case: BlockCase, removed: fx.GraphModule) -> None:
    """Channels before or after blocks: the plan of both together does the same at once, and masked is removed where exact."""
    for first in (removed, case.gm):
        try:
            both = case.pruned(first)
        except NothingToPruneError:
            continue
        if first is case.gm:
            both = case.without(both, case.chosen)
        plan = stp_fx.plan_of(both)
        at_once = stp_fx.apply_plan(case.gm, plan, validate=False)
        assert stp_fx.plan_of(at_once) == plan
        assert_same(run(at_once, case.inputs), run(both, case.inputs), "channels and blocks at once")
        reference = stp_fx.apply_plan(removed, plan.without_blocks(), validate=False)
        assert_same(run(both, case.inputs), run(reference, case.inputs), "channels and blocks, in either order")
        masked = stp_fx.apply_plan(case.gm, plan, mask=True)
        graph = stp_fx.analyze(removed)
        lost = ~graph.survivors(plan.without_blocks(), partial=True).units
        if all(group.exact for group in graph.groups if lost[group.units].any()):
            assert_same(run(masked, case.inputs), run(both, case.inputs), "channels and blocks masked, against removed")
        assert stp_fx.cost(masked).params == stp_fx.cost(both).params


def _trained(gm: fx.GraphModule, case: BlockCase) -> Any:
    trained = copy.deepcopy(gm).train()
    try:
        with FixedDraws():
            return run(trained, case.inputs)
    except ValueError as error:  # a norm over one value a channel
        return torch.zeros(()) if "Expected more than 1" in str(error) else _raise(error)


def _raise(error: Exception) -> Any:
    raise error
