"""Does a removal compute what masking computes: both are run on an example, and a difference is traced to its groups.

A plan's exact groups are the ones for which the two must agree. Its inexact groups are removed on both sides; what must hold of
them is that the result runs, gives outputs of the same shapes, and is finite where the original is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.analysis.groups import Group
from stp_fx.analysis.plan import PrunePlan
from stp_fx.errors import StpFxError
from stp_fx.ir.agreement import Difference, compared, tolerance
from stp_fx.ir.examples import Example
from stp_fx.ir.modes import has_modes
from stp_fx.ir.nested import leaves_of
from stp_fx.ir.provenance import example_of, provenance_of
from stp_fx.ir.validate import Run, run_once
from stp_fx.ir.validation import Budget, Validation
from stp_fx.measure.calibration import eval_twin
from stp_fx.measure.latency import example_values
from stp_fx.rewrite.removal import is_partial, mask, remove
from stp_fx.rewrite.slicing import copied

__all__ = ["CHECK", "Guilty", "validate_blocks", "validate_removal"]

CHECK = "masked = removed"
_BLOCKS = "blocks masked = removed"
_MASKED_COPY = 1 << 32
"""Bytes of parameters of which a masked copy is made without being told to (validate=True)."""
_DOUBLE_COPY = 1 << 30
"""Bytes of parameters in double precision, of which two copies are made to confirm a difference."""
_LARGEST = 1 << 28
"""Elements of an example that is run."""
_VANISHED = 1e-12
"""Outputs below this are zero but for rounding (a classifier whose weights are still zero), and tell nothing."""
_ROUNDING = 30.0
"""Where a difference cannot be confirmed in double precision, it must be so many times the tolerance."""


@dataclasses.dataclass(frozen=True)
class Guilty:
    """``groups``: names of those whose removal changes the function; ``text``: what differs."""

    groups: tuple[str, ...]
    text: str


def validate_removal(
    gm: fx.GraphModule, plan: PrunePlan, removed: fx.GraphModule, budget: Budget
) -> tuple[Validation, Guilty | None]:
    """The comparisons, and the groups of ``plan`` that must not be removed; ``removed`` is ``gm`` without the plan's units."""
    reason = _unfit(gm, budget) or budget.refuses(2)
    if reason is not None:
        return Validation(left_out={CHECK: reason}, seconds=budget.seconds), None
    comparison, text = None, None
    for example in _examples(gm):
        if comparison is None or (comparison.failed and budget.refuses(2) is None):
            comparison = _Comparison(gm, plan, example, budget)
            text = comparison.problem(comparison.flags, removed)
            budget.allow(int(comparison.failed))  # a pass that has failed is none
    assert comparison is not None
    if text is None:
        differences = {} if comparison.silent else {CHECK: comparison.largest}
        left = {CHECK: comparison.silent} if comparison.silent else {}
        left |= {f"{CHECK} in train mode": comparison.untold} if comparison.untold else {}
        return Validation(differences, {}, left, budget.seconds, budget.forwards, budget.slowest), None
    guilty = comparison.guilty()
    found = Validation({CHECK: comparison.largest}, {}, {}, budget.seconds, budget.forwards, budget.slowest)
    return found, Guilty(tuple(group.name for group in guilty), text)


def validate_blocks(
    gm: fx.GraphModule, names: Sequence[str], removed: fx.GraphModule, budget: Budget
) -> tuple[Validation, str | None]:
    """The comparisons, and the differences between ``gm`` with the named blocks masked and ``removed``, which is ``gm`` without
    them."""
    reason = _unfit(gm, budget) or budget.refuses(2)
    if reason is not None:
        return Validation(left_out={_BLOCKS: reason}, seconds=budget.seconds), None
    reference, comparison, text = mask(gm, PrunePlan({}, {}, tuple(names))), None, None
    for example in _examples(gm):
        if comparison is None or (comparison.failed and budget.refuses(2) is None):
            comparison = _Comparison(gm, PrunePlan({}, {}), example, budget)
            text = comparison.graphs_differ(reference, removed)
            budget.allow(int(comparison.failed))
    assert comparison is not None
    differences = {} if comparison.silent else {_BLOCKS: comparison.largest}
    left = {_BLOCKS: comparison.silent} if comparison.silent else {}
    left |= {f"{_BLOCKS} in train mode": comparison.untold} if comparison.untold else {}
    return Validation(differences, {}, left, budget.seconds, budget.forwards, budget.slowest), text


def _unfit(gm: fx.GraphModule, budget: Budget) -> str | None:
    """Why nothing can be run."""
    tensors = [*gm.parameters(), *gm.buffers()]
    if any(t.is_meta for t in tensors):
        return "the graph is on the meta device"
    if budget.bounded and sum(t.numel() * t.element_size() for t in tensors) > _MASKED_COPY:
        return "a masked copy takes too much memory"
    if sum(t.numel() for t in leaves_of(torch.Tensor, example_of(gm))) > _LARGEST:
        return "the example is too large"
    return None


def _examples(gm: fx.GraphModule) -> Iterator[Example]:
    """The recorded example with made-up numbers; integers are ones and zeros in turn (indices, masks), then zeros, which always
    are indices. An index out of range would end a CUDA process, so there are zeros alone there."""
    values, read = example_values(gm), provenance_of(gm).read
    zeros, known = Example(values, {}), [values[k] for k in read]
    devices = {t.device.type for t in zeros.tensors}

    def in_turn(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() or tensor.is_complex() or any(tensor is each for each in known):
            return tensor
        return (torch.arange(1, tensor.numel() + 1) % 2).reshape(tensor.shape).to(tensor.dtype)

    if devices == {"cpu"} and any(not t.is_floating_point() for t in zeros.tensors):
        yield zeros.mapped(in_turn)
    yield zeros


class _Comparison:
    """A graph, a plan for it, and what parts of the plan do to the function."""

    def __init__(self, gm: fx.GraphModule, plan: PrunePlan, example: Example, budget: Budget) -> None:
        self._gm, self._example, self._budget = gm, example, budget
        self._graph = analyze(gm)
        self.flags = ~self._graph.survivors(plan, partial=is_partial(gm)).units
        self._touched = [group for group in self._graph.groups if self.flags[group.units].any()]
        self._inexact = np.zeros(len(self.flags), dtype=bool)
        for group in self._touched:
            self._inexact[group.units] = not group.exact
        self.largest = 0.0
        self.silent = ""
        """Why a comparison says nothing; empty if it says something."""
        self.untold: str | None = None
        """Why the other mode of a graph of two was not compared."""
        self.failed = False
        """Whether the original does not run on the example."""

    def problem(self, flags: np.ndarray, removed: fx.GraphModule | None = None) -> str | None:
        """The failure when the flagged units are removed, in words."""
        exact, inexact = flags & ~self._inexact, flags & self._inexact
        try:
            first, rest = self._graph.plan_removing(inexact), self._graph.plan_removing(exact)
            shorter = remove(self._gm, first) if inexact.any() else self._gm
            reference = mask(shorter, rest.after(first)) if exact.any() else self._gm
            removed = remove(self._gm, self._graph.plan_removing(flags)) if removed is None else removed
        except StpFxError as error:
            return str(error)
        return self._in_both_modes(exact, inexact, reference, removed)

    def graphs_differ(self, reference: fx.GraphModule, removed: fx.GraphModule) -> str | None:
        """The difference between two graphs that must give the same, in words."""
        return self._in_both_modes(np.ones(1, dtype=bool), np.zeros(1, dtype=bool), reference, removed)

    def _in_both_modes(
        self, exact: np.ndarray, inexact: np.ndarray, reference: fx.GraphModule, removed: fx.GraphModule
    ) -> str | None:
        text = self._differs(exact, inexact, reference, removed)
        if text is None and not self.silent and has_modes(self._gm.graph):
            self._budget.allow(2)
            self.untold = self._budget.refuses(2)
            if self.untold is None:
                text = self._differs(exact, inexact, reference, removed, training=True)
            self.silent, self.failed = "", False  # evaluation has told enough
        return text

    def _differs(
        self, exact: np.ndarray, inexact: np.ndarray, reference: fx.GraphModule, removed: fx.GraphModule, training: bool = False
    ) -> str | None:
        """The difference in one mode between the reference and the result, in words."""
        expected = self._run(reference, training)
        if expected.error is not None and inexact.any() and exact.any():
            expected = self._run(self._gm, training)
            exact = np.zeros_like(exact)
        actual = Run() if expected.error is not None else self._run(removed, training)
        if expected.error is not None or actual.no_memory:
            error, self.failed = expected.error or actual.error, expected.error is not None
            self.silent = f"not comparable: {type(error).__name__}: {str(error)[:100]}"
            return None
        if actual.error is not None:
            return f"the result does not run: {type(actual.error).__name__}: {str(actual.error)[:160]}"
        if not exact.any():
            return self._holds(expected, actual)
        return self._compare(expected, actual, (reference, removed), training)

    def _compare(self, expected: Run, actual: Run, graphs: tuple[fx.GraphModule, fx.GraphModule], training: bool) -> str | None:
        largest = max(_magnitude(expected), _magnitude(actual))
        if largest <= _VANISHED:
            what = "is finite" if largest < 0 else "differs from zero"
            self.silent = f"not comparable: no output {what} on random inputs"
            return None
        found = compared(expected.output, actual.output)
        if found.text is not None and (expected.drew or actual.drew):
            self.silent = "not comparable: the outputs are random"
            return None
        found = found if found.text is None else self._confirmed(found, graphs, training)
        self.largest = max(self.largest, found.largest)
        return found.text

    def _confirmed(self, found: Difference, graphs: tuple[fx.GraphModule, fx.GraphModule], training: bool) -> Difference:
        """The difference in double precision, where that can be run: rounding is none."""
        floats = [t for t in (*self._gm.parameters(), *self._example.tensors) if t.is_floating_point()]
        if not floats or all(t.dtype is torch.float64 for t in floats) or 8 * sum(t.numel() for t in floats) > _DOUBLE_COPY:
            return found
        self._budget.allow(2)
        # Whatever time is left: of EfficientNet-B7, rounding alone passes any bound, and would keep its groups whole.
        example = self._example.mapped(lambda t: t.double() if t.is_floating_point() else t)
        doubled = [copied(each).double() for each in graphs]
        runs = [run_once(each, example, self._budget, training=training, fixed=training) for each in doubled]
        if runs[0].error is None and runs[1].error is None:
            return compared(runs[0].output, runs[1].output)
        allowed = max(tolerance(t.dtype, t.device) for t in floats)
        return found if found.largest > _ROUNDING * allowed else Difference(found.largest)

    def _holds(self, expected: Run, actual: Run) -> str | None:
        """The checks of inexact groups: shapes, and finite values where the original has them."""
        theirs, ours = (leaves_of(torch.Tensor, run.output) for run in (expected, actual))
        if [t.shape for t in theirs] != [t.shape for t in ours]:
            return f"outputs have the shapes {[tuple(t.shape) for t in ours]} in place of {[tuple(t.shape) for t in theirs]}"
        for one, other in zip(theirs, ours, strict=True):
            if one.is_floating_point() and bool(one.isfinite().all()) and not bool(other.isfinite().all()):
                return "an output is NaN or infinite where the original is not"
        return None

    def _run(self, gm: fx.GraphModule, training: bool) -> Run:
        twin = eval_twin(gm)  # no mode flag of the user's is touched
        return run_once(twin, self._example, self._budget, training=True if training else None, fixed=training)

    def guilty(self) -> Sequence[Group]:
        """The groups to blame, by bisection. Where it takes too long, or no half is to blame alone, all that are left."""
        steps = 4 * math.ceil(math.log2(len(self._touched) + 1)) + 4

        def among(groups: Sequence[Group]) -> Sequence[Group]:
            nonlocal steps
            if len(groups) == 1:
                return groups
            found: list[Group] = []
            middle = len(groups) // 2
            for half in (groups[:middle], groups[middle:]):
                steps -= 1
                self._budget.allow(4)
                if steps < 0 or self._budget.refuses(4) is not None:
                    return groups
                if self.problem(self._flags_of(half)) is not None:
                    found += among(half)
            return found or groups

        return among(self._touched)

    def _flags_of(self, groups: Sequence[Group]) -> np.ndarray:
        flags = np.zeros_like(self.flags)
        for group in groups:
            flags[group.units] = self.flags[group.units]
        return flags


def _magnitude(run: Run) -> float:
    """The largest finite number of an output; -1 if there are floating outputs, and none of their numbers is finite."""
    floats = [t.double() for t in leaves_of(torch.Tensor, run.output) if t.is_floating_point() and t.numel()]
    finite = [float(t[t.isfinite()].abs().max()) for t in floats if bool(t.isfinite().any())]
    return max(finite, default=-1.0 if floats else 1.0)
