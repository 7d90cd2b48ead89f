"""One construct at a time: what users write between two layers is pruned right, or refused with a reason."""

from __future__ import annotations

import os

import pytest
import torch

import stp_fx
from stp_fx.testing import Request
from stp_fx.testing.laws import Case, check_laws, touched_groups
from stp_fx.testing.recipe import randomise

from . import attention, in_place, joins, layers, numbers, reductions, shapes, structures, weights
from .catalogue import CONSTRUCTS, Construct
from .joins import BooleanMask

THEMES = (attention, in_place, joins, layers, numbers, reductions, shapes, structures, weights)


def doubled(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(value.double() if value.is_floating_point() else value for value in inputs)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


def case_of(construct: Construct, frontend: str = "auto") -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = construct.build()
        randomise(module)
        inputs, more = doubled(construct.inputs()), doubled(construct.inputs(3))
    return Case(
        module.double().eval(), inputs, Request(ratio=0.5), [more], "magnitude", construct.columns, frontend=frontend
    )  # fmt: skip


def each(*expectations: str) -> list[pytest.param]:
    return [pytest.param(c, c, id=c.name) for c in CONSTRUCTS.values() if c.expect in expectations]


@pytest.mark.parametrize(("construct", "case"), each("exact", "inexact"), indirect=["case"])
def test_what_can_be_pruned_is(construct: Construct, case: Case) -> None:
    outcome = check_laws(case)
    assert outcome.pruned
    name, dim = axis_of(construct)
    assert (name, dim) in case.plan.kept, case.graph.explain(name)
    touching = [
        group
        for group in touched_groups(case.graph, case.plan)
        if any((m.axis.tensor, m.axis.dim) == (name, dim) for m in group.members)
    ]
    assert touching
    if construct.expect == "exact":
        assert all(group.exact for group in touching), [group.notes for group in touching]
    else:
        assert any(not group.exact and group.notes for group in touching)
    if construct.reason:
        assert construct.reason in case.graph.explain(construct.axis)


@pytest.mark.parametrize(("construct", "case"), each("pinned"), indirect=["case"])
def test_what_cannot_be_pruned_is_refused_with_a_reason(construct: Construct, case: Case) -> None:
    if check_laws(case).pruned:
        assert axis_of(construct) not in case.plan.kept
    text = case.graph.explain(construct.axis)
    assert "pinned" in text
    assert construct.reason in text


@pytest.mark.parametrize(("construct", "case"), each("sound"), indirect=["case"])
def test_what_may_be_pruned_is_pruned_right_or_explained(construct: Construct, case: Case) -> None:
    check_laws(case)
    assert case.graph.explain(construct.axis)


EXPORTED = list(CONSTRUCTS.values())[:: 1 if os.environ.get("STP_FX_FUZZ") else 5]
"""An export takes half a second, so all of them are for `STP_FX_FUZZ=1`."""


@pytest.mark.parametrize("construct", EXPORTED, ids=lambda construct: construct.name)
def test_what_torch_export_captures_is_pruned_alike(construct: Construct) -> None:
    case = case_of(construct, "export")
    outcome = check_laws(case)
    if construct.expect in ("exact", "inexact"):
        assert axis_of(construct) in case.plan.kept, case.graph.explain(construct.axis)
    elif construct.expect == "pinned":
        assert not outcome.pruned or axis_of(construct) not in case.plan.kept
    assert case.graph.explain(construct.axis)


def test_a_boolean_mask_as_an_index_is_refused_when_traced() -> None:
    """How many channels it takes depends on its data, which a trace does not have; the error says so and where."""
    with pytest.raises(stp_fx.errors.TraceError, match=r"depends on the data.*integer index"):
        stp_fx.trace(BooleanMask(), torch.randn(2, 3, 6, 6))


def axis_of(construct: Construct) -> tuple[str, int]:
    name, _, dim = construct.axis.rpartition(":")
    return name, int(dim)


def test_the_catalogue_is_not_short() -> None:
    assert len(CONSTRUCTS) >= 370
    assert all(any(c.expect == e for c in CONSTRUCTS.values()) for e in ("exact", "inexact", "pinned", "sound"))
    assert stp_fx.__version__
