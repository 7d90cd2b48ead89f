"""Entries: what is accepted, what is refused, and what the errors say."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import nn

import stp_fx
from stp_fx.errors import InputError
from stp_fx.rules import FactorMapping, OpCall, apply_pattern, parse, registered, rule
from stp_fx.rules.registry import RULES, overload_of, overloads

aten = torch.ops.aten


@torch.library.custom_op("stp_entries::shift", mutates_args=())
def shift(x: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """``x`` [n, c, h, w], ``amount`` [c]."""
    return x + amount[:, None, None]


@shift.register_fake
def _(x: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


OP = "stp_entries.shift.default"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.amount = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(shift(self.a(x), self.amount))


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules of a test are gone after it."""
    for name in ("_values", "_owners"):
        monkeypatch.setattr(RULES, name, dict(getattr(RULES, name)))


def analyzed() -> stp_fx.ChannelGraph:
    return stp_fx.analyze(stp_fx.trace(Net().eval(), torch.randn(2, 3, 4, 4)))


# -- two forms -----------------------------------------------------------------------------------------------------------


def members() -> set[tuple[str, str]]:
    (group,) = analyzed().groups
    return {(m.axis.name, m.axis.role) for m in group.members}


def test_a_rule_is_a_pattern_or_a_function() -> None:
    roles = {1: ("bias", None, None)}
    rule(OP, pattern="n c .., c -> n c ..", roles=roles)
    declared = members()
    assert ("amount:0", "bias") in declared

    @rule(OP)
    def _(call: OpCall) -> None:
        assert call.name == "shift"
        assert [tuple(t.shape) for t in call.operands] == [(2, 8, 4, 4), (8,)]
        assert call["amount"] is call.args[1]
        apply_pattern(call, "n c .., c -> n c ..", call.args, call.outs, roles=roles)

    assert members() == declared


def test_ops_are_given_as_overloads_or_by_name() -> None:
    rule(torch.ops.stp_entries.shift.default, pattern="n c .., c -> n c ..")
    assert isinstance(registered()[OP], FactorMapping)


def test_overloads_of_other_versions_are_left_out() -> None:
    assert overloads("aten.mm.default", "aten.not_in_any_version.default") == (aten.mm.default,)


# -- refused at registration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pattern": "n c .. -> n c .."}, r"has 1 inputs, the op has 2 \(x, amount\); describe each tensor"),
        ({"pattern": "n c .., c, c -> n c .."}, r"has 3 inputs, the op has 2"),
        ({"pattern": "n c .., c -> n c .., c"}, r"has 2 results, the op has 1"),
        ({"pattern": "n c .., c -> n d .."}, r"the letter 'd' in a result and in no input"),
        ({"pattern": "n c .., c"}, r"has no arrow; write it like"),
        ({"pattern": "n (g c .., c -> n c .."}, r"unbalanced parentheses"),
        ({"pattern": "n c .. .., c -> n c .."}, r"two runs"),
        ({"pattern": "n c + .., c -> n c .."}, r"none of the notation"),
        ({"pattern": "n c .., c? -> n c? .."}, r"optional dimension in a result"),
        ({"pattern": "n (g c) .., (g c) -> n (g c) .."}, r"nothing tells the sizes of 'g' and 'c' in '\(g c\)'.*sizes="),
        ({"pattern": "n c .., c -> n c ..", "sizes": {"g": "amount"}}, r"sizes names 'g'.*its letters are n c"),
        (
            {"pattern": "n (g c) .., (g c) -> n (g c) ..", "sizes": {"g": "groups"}},
            r"'groups', which the op lacks; it has x, amount",
        ),
        ({"pattern": "n c .., c -> n c ..", "inexact": {"d": "why"}}, r"inexact names 'd'"),
        ({"pattern": "n c .., c -> n c ..", "roles": {2: ("bias", None, None)}}, r"roles has position 2.*tensors 0 to 1"),
        ({"sizes": {"c": "amount"}}, r"sizes belong to a pattern"),
    ],
)
def test_a_pattern_that_does_not_fit_the_op_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rule(OP, **given)
    assert OP not in RULES


def test_a_pattern_for_a_list_of_tensors_is_refused() -> None:
    with pytest.raises(InputError, match=r"aten\.block_diag\.default.*'tensors' is a list of tensors; write a function"):
        rule("aten.block_diag.default", pattern="a b -> a b")


@pytest.mark.parametrize(
    ("op", "message"),
    [
        ("stp_entries.shfit.default", r"no op 'stp_entries\.shfit\.default'; close names: stp_entries\.shift\.default"),
        ("stp_entries.shift.out", r"close names: stp_entries\.shift\.default"),
        ("aten.max_pool2d_with_indexes.default", r"close names: aten\.max_pool2d_with_indices\.default"),
        ("stp_entries.shift", r"Write 'namespace\.op\.overload'"),
        ("nobody.knows.default", r"torch knows no op of the namespace 'nobody'.*define a custom op before its rule"),
        (aten.mm, r"no op overload"),
        (torch.relu, r"no op overload"),
    ],
)
def test_an_op_that_does_not_exist_is_refused(op: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rule(op, pattern="n c .., c -> n c ..")


def module(name: str) -> types.ModuleType:
    made = types.ModuleType(name)
    exec(f"from stp_fx.rules import rule\ndef again(): rule({OP!r}, pattern='n c .., c -> n c ..')", made.__dict__)
    return made


def test_a_module_may_replace_its_own_rule() -> None:
    notebook = module("notebook")
    notebook.again()
    first = registered()[OP]
    notebook.again()
    assert registered()[OP] is not first


def test_another_module_may_not_replace_a_rule() -> None:
    module("one").again()
    with pytest.raises(InputError, match=r"op rule 'stp_entries\.shift\.default' is already registered by one, and two"):
        module("two").again()
    with pytest.raises(InputError, match=r"already registered by stp_fx\.rules\.ops\.matmul"):
        rule("aten.mm.default", pattern="m k, k n -> m n")


# -- refused at a call ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("n c h, c -> n c h", r"'x' of shape \(2, 8, 4, 4\) has 4 dimensions, the pattern gives it 3.*Write one token"),
        ("n c h w d, c -> n c h w d", r"'x' of shape \(2, 8, 4, 4\) has 4 dimensions, the pattern gives it 5"),
        ("n c .., c d -> n c ..", r"'amount' of shape \(8,\) has 1 dimensions, the pattern gives it 2"),
        ("n c .., n -> n c ..", r"'amount' of shape \(8,\) has size 8 in dimension 0, where the pattern has n=2"),
        ("n c .., 1 -> n c ..", r"'amount' of shape \(8,\) has size 8 in dimension 0, where the pattern has '1'"),
        ("n c .., c -> c n ..", r"the result has size 2 in dimension 0, where the pattern has 'c' of 8"),
    ],
)
def test_a_pattern_that_does_not_fit_the_shapes_is_refused(pattern: str, message: str) -> None:
    rule(OP, pattern=pattern)
    with pytest.raises(InputError, match=rf"rule of stp_entries\.shift\.default: .*{message}"):
        analyzed()


def test_a_function_that_gives_too_few_tensors_is_refused() -> None:
    @rule(OP)
    def _(call: OpCall) -> None:
        apply_pattern(call, "n c .., c -> n c ..", call.args[:1], call.outs)

    with pytest.raises(InputError, match=r"has 2 inputs, the rule gives 1; describe each tensor"):
        analyzed()


def test_names_of_several_letters_are_one_letter() -> None:
    assert parse("batch head dim, dim out -> batch head out").contracted == ("dim",)


def test_overload_of_hands_overloads_back() -> None:
    assert overload_of("aten.mm.default") is aten.mm.default
    assert overload_of(aten.mm.default) is aten.mm.default
