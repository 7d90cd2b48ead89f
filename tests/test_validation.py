"""Nothing leaves unchecked: wrong captures and removals are found, right ones are not accused, and nothing is touched."""

from __future__ import annotations

import copy
import dataclasses
import logging
import operator
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

import stp_fx
from stp_fx.errors import FunctionChangedError, InputError, NothingToPruneError, RewriteError, TraceError
from stp_fx.ir import provenance_of
from stp_fx.ir.agreement import compared, tolerance
from stp_fx.ir.as_it_was import as_it_was
from stp_fx.ir.provenance import with_provenance
from stp_fx.ir.validation import Budget, Validation
from stp_fx.rules import rule
from stp_fx.rules.registry import RULES
from stp_fx.testing.untouched import assert_untouched, snapshot

TRACE: Any = sys.modules["stp_fx.ir.trace"]
X = torch.randn(2, 3, 8, 8)
Break = Callable[[fx.GraphModule], None]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn(self.a(x))) + 0.5
        return self.b(self.drop(y)).reshape(len(x), -1)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for name in ("_values", "_owners"):
        monkeypatch.setattr(RULES, name, dict(getattr(RULES, name)))


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets front ends give graphs that have been tampered with."""

    def tamper(change: Break, *names: str) -> None:
        for name in names or ("fx", "export"):
            original = TRACE._FRONT_ENDS[name]

            def front(*arguments: Any, original: Any = original) -> fx.GraphModule:
                gm = original(*arguments)
                change(gm)
                gm.graph.lint()
                gm.recompile()
                return gm

            monkeypatch.setitem(TRACE._FRONT_ENDS, name, front)

    return tamper


def validation_of(gm: fx.GraphModule) -> Validation:
    found = provenance_of(gm).validation
    assert found is not None
    return found


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Inputs of the convolutions that run for real. (A counter on the model would be put back.)"""
    seen: list[torch.Size] = []
    original = nn.Conv2d.forward

    def counted(self: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        if isinstance(x, torch.Tensor) and not x.is_meta and self.in_channels == 3:
            seen.append(x.shape)
        return original(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", counted)
    return seen


# -- captures that are wrong -----------------------------------------------------------------------------------------------


def drop_half(gm: fx.GraphModule) -> None:
    """The forward adds 0.5, the graph does not."""
    node = next(n for n in gm.graph.nodes if n.target in (operator.add, torch.add, "add"))
    node.replace_all_uses_with(node.args[0])
    gm.graph.erase_node(node)


def bake_batch(gm: fx.GraphModule) -> None:
    """Reshapes to the example's batch."""
    node = next(n for n in gm.graph.nodes if n.target in ("reshape", "view", torch.reshape))
    node.args = (node.args[0], 2, -1)


def mix_rows(gm: fx.GraphModule) -> None:
    """Right for two rows, wrong for others."""
    output = next(n for n in gm.graph.nodes if n.op == "output")
    with gm.graph.inserting_before(output):
        rows = gm.graph.call_method("size", (output.args[0], 0))
        factor = gm.graph.call_function(operator.truediv, (rows, 2))
        output.args = (gm.graph.call_function(operator.mul, (output.args[0], factor)),)


def double(gm: fx.GraphModule) -> None:
    output = next(n for n in gm.graph.nodes if n.op == "output")
    with gm.graph.inserting_before(output):
        output.args = (gm.graph.call_function(operator.mul, (output.args[0], 2)),)


def shift_in_training(gm: fx.GraphModule) -> None:
    class Shift(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if self.training else x

    output = next(n for n in gm.graph.nodes if n.op == "output")
    gm.add_submodule("shift", Shift().train(gm.training))
    with gm.graph.inserting_before(output):
        output.args = (gm.graph.call_module("shift", (output.args[0],)),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_half, r"eval: the output differs by .* first, the input of node 'drop'"),
        (bake_batch, r"batch 3: "),
        (mix_rows, r"batch 3: the output differs by 0\.3"),
    ],
)
def test_a_wrong_graph_is_found(broken: Callable[..., None], change: Break, message: str) -> None:
    broken(change, "fx")
    with pytest.raises(TraceError, match=message):
        stp_fx.trace(Net().eval(), X, frontend="fx")
    gm = stp_fx.trace(Net().eval(), X)
    assert provenance_of(gm).frontend == "export", "the other front end is right"
    assert "eval" in validation_of(gm).ran


def test_both_front_ends_wrong(broken: Callable[..., None]) -> None:
    broken(double)
    with pytest.raises(TraceError, match=r"(?s)fx: the graph computes something else.*export: the graph computes something else"):
        stp_fx.trace(Net().eval(), X)
    assert provenance_of(stp_fx.trace(Net().eval(), X, validate=False)).validation is None


def test_the_other_mode_is_recorded(broken: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    broken(shift_in_training)
    with caplog.at_level(logging.WARNING):
        gm = stp_fx.trace(Net().eval(), X)
    assert "in train mode the graph differs: the output differs" in caplog.text
    assert list(validation_of(gm).differs) == ["train"]
    assert any("in train mode the graph differs" in note for note in provenance_of(gm).notes)
    report = stp_fx.report_of(stp_fx.prune_graph(gm))
    assert report is not None
    assert "in train mode the graph differs" in report.validated
    assert "in train mode the graph differs" in str(report).replace("\n", " ")


def test_the_mode_that_the_model_is_in_must_be_right(broken: Callable[..., None]) -> None:
    broken(shift_in_training)
    with pytest.raises(TraceError, match="train: the output differs"):
        stp_fx.trace(Net().train(), X)


def test_updates_of_buffers_are_compared(broken: Callable[..., None]) -> None:
    def freeze(gm: fx.GraphModule) -> None:
        node = next(n for n in gm.graph.nodes if n.target == "bn")
        frozen = copy.deepcopy(gm.bn)
        frozen.momentum = 0.5
        gm.add_submodule("bn2", frozen)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            frozen._buffers[name] = gm.bn._buffers[name]
        node.target = "bn2"

    broken(freeze, "fx")
    with pytest.raises(TraceError, match=r"train: buffer 'bn2?\.running_(mean|var)' differs"):
        stp_fx.trace(Net().train(), X, frontend="fx")


# -- captures that are right -----------------------------------------------------------------------------------------------


class Gumbel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(4, 8), nn.Linear(8, 4), nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.dropout(F.gumbel_softmax(self.a(self.drop(x))), 0.5, self.training)) + torch.randn_like(x)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("ema", torch.zeros(4))
        self.calls, self.log, self.last = 0, [], None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        self.ema.data.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        self.line.weight.data.clamp_(-0.1, 0.1)
        self.calls += 1
        self.log.append(self.calls)
        self.last = x
        return self.line(x) * 2


def test_random_models_raise_no_alarm() -> None:
    gm = stp_fx.trace(Gumbel().eval(), torch.randn(3, 4))
    assert validation_of(gm).ran == ["eval", "batch 2", "train"]
    assert not validation_of(gm).differs
    attention = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.3, batch_first=True).eval()
    assert validation_of(stp_fx.trace(attention, torch.randn(2, 5, 16))).ran == ["eval", "train", "length 4, batch 3"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [Net, Counting, Gumbel, lambda: torchvision.models.resnet18(num_classes=4)])
def test_the_model_is_as_it_was(make: Callable[[], nn.Module], training: bool) -> None:
    model = make().train(training)
    model.register_forward_hook(lambda module, args, out: module.__dict__.setdefault("seen", []).append(out))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    inputs = torch.randn(2, 4) if isinstance(model, (Counting, Gumbel)) else torch.randn(2, 3, 32, 32)
    versions = [t._version for t in (*model.parameters(), *model.buffers())]
    before = snapshot(model, inputs)
    try:
        gm = stp_fx.trace(model, inputs)
    except TraceError:
        assert isinstance(model, Counting)
        gm = None
    assert_untouched(before)
    assert versions == [t._version for t in (*model.parameters(), *model.buffers())]
    if gm is not None and not isinstance(model, (Counting, Gumbel)):
        stp_fx.prune_graph(gm)
        assert_untouched(before)


def test_what_a_call_writes_is_put_back() -> None:
    model = Counting().train()
    model.noise = torch.Generator().manual_seed(3)
    before, state = snapshot(model), model.noise.get_state()
    with as_it_was(model):
        model.eval().requires_grad_(False)
        model(torch.randn(2, 4))
        torch.randn(2, generator=model.noise)
        model.line.weight.grad = torch.ones(4, 4)
        model.register_buffer("late", torch.zeros(1))
    assert_untouched(before)
    assert torch.equal(model.noise.get_state(), state)


def test_a_model_in_training_is_checked_with_its_own_modes() -> None:
    class Frozen(Net):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.bn.eval()
            self.a.requires_grad_(not mode)
            return self

    model = Frozen().train()
    before = snapshot(model)
    gm = stp_fx.trace(model, X)
    assert_untouched(before)
    assert validation_of(gm).ran[0] == "train"
    assert not validation_of(gm).differs
    gm = stp_fx.trace(model.eval(), X)
    assert "train" in validation_of(gm).ran
    assert not validation_of(gm).differs
    assert [name for name, module in gm.train().named_modules() if not module.training] == ["bn"]


def test_a_model_with_its_own_numbers_each_time_is_not_comparable() -> None:
    draws = iter(range(1000))

    class Fresh(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = Outside()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.line(x)

    class Outside(nn.Linear):
        __module__ = "torch.nn.outside"  # a leaf

        def __init__(self) -> None:
            super().__init__(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + next(draws)

    gm = stp_fx.trace(Fresh().eval(), torch.randn(2, 4))
    assert "other numbers each time" in validation_of(gm).left_out["eval"]


# -- what cannot be run is said --------------------------------------------------------------------------------------------


def test_meta_models_are_unchecked_and_say_so() -> None:
    with torch.device("meta"):
        model = Net().eval()
    gm = stp_fx.trace(model, X)
    assert validation_of(gm).left_out == {"all": "the model is on the meta device"}
    pruned = stp_fx.prune_graph(gm, stp_fx.criteria.Random())
    assert validation_of(pruned).left_out["masked = removed"] == "the graph is on the meta device"
    assert validation_of(pruned).line().startswith("unchecked; not checked: all")


def test_inputs_without_data_are_made_up() -> None:
    for inputs in (X.to("meta"), torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), torch.nan)):
        assert validation_of(stp_fx.trace(Net().eval(), inputs)).ran == ["eval", "batch 3", "train", "size 10x10"]


def test_what_the_model_itself_refuses_is_no_requirement() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                raise RuntimeError("no training here")
            return self.b(self.a(x).view(2, 8))

    found = validation_of(stp_fx.trace(Fixed().eval(), torch.randn(2, 4)))
    assert found.ran == ["eval"]
    assert "no training here" in found.left_out["train"]
    assert any(name.startswith("batch") for name in found.left_out)


def test_time_is_bounded() -> None:
    class Slow(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.2)
            return super().forward(x)

    model = Slow().eval()
    found = validation_of(stp_fx.trace(model, X, validate=0.5))
    assert found.forwards <= 2  # of 0.2 s at least; another two would not fit
    assert "the limit is 0.5 s" in " ".join(found.left_out.values())
    unbounded = validation_of(stp_fx.trace(model, X, validate=True))
    assert len(unbounded.ran) == 4
    assert unbounded.forwards > 2


def test_the_time_of_a_capture_is_none_of_the_checks() -> None:
    class Slow(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.fx._symbolic_trace.is_fx_tracing():
                time.sleep(2.0)
            return super().forward(x)

    found = validation_of(stp_fx.trace(Slow().eval(), X, validate=1.9))
    assert "eval" in found.ran
    assert found.seconds < 1.9


def test_a_removal_knows_what_the_capture_has_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds and the slowest pass are handed on, so that both together keep the bound; a capture leaves time to the removal."""
    gm = stp_fx.trace(Net().eval(), X)
    assert 0 < validation_of(gm).slowest <= validation_of(gm).seconds
    report = stp_fx.report_of(stp_fx.prune_graph(gm, ratio=0.5))
    assert report is not None
    assert report.validation is not None
    assert "masked = removed" in report.validation.ran
    slow = dataclasses.replace(validation_of(gm), seconds=20.0, slowest=6.0)
    report = stp_fx.report_of(stp_fx.prune_graph(with_provenance(copy.deepcopy(gm), validation=slow), ratio=0.5))
    assert report is not None
    assert report.validation is not None
    assert report.validation.left_out["masked = removed"] == "a forward pass takes 6 s, and the limit is 10 s"

    monkeypatch.setattr("stp_fx.ir.validation.SECONDS", 1.0)
    monkeypatch.setattr(Budget, "count", lambda self, seconds: setattr(self, "slowest", 0.25))
    found = validation_of(stp_fx.trace(Net().eval(), X))
    assert found.ran == ["eval"]
    assert "a forward pass takes 0.25 s, and the limit is 1 s" in found.left_out.values()
    report = stp_fx.report_of(stp_fx.prune_graph(stp_fx.trace(Net().eval(), X), ratio=0.5))
    assert report is not None
    assert report.validation is not None
    assert "masked = removed" in report.validation.ran


@pytest.mark.parametrize("validate", ["yes", 0, -1.0, float("nan"), None])
def test_other_values_are_refused(validate: Any) -> None:
    for call in (
        lambda: stp_fx.trace(Net(), X, validate=validate),
        lambda: stp_fx.prune_graph(Net(), example_inputs=X, validate=validate),
        lambda: stp_fx.passes.RemoveChannels(validate=validate),
    ):
        with pytest.raises(InputError, match="`validate` is True, False, 'auto' or a positive number"):
            call()


def test_forward_passes_are_counted(forwards: list[torch.Size]) -> None:
    for name, model, inputs in [
        ("images", Net().eval(), X),
        ("one image", Net().eval(), X[:1]),
        ("training", Net().train(), X),
    ]:
        forwards.clear()
        pruned = stp_fx.prune_graph(model, example_inputs=inputs)
        assert len(forwards) == validation_of(pruned).forwards <= 10, name
        assert validation_of(pruned).ran[-1] == "masked = removed"
    forwards.clear()
    pruned = stp_fx.prune_graph(Net().eval(), example_inputs=X, validate=False)
    assert not forwards
    assert provenance_of(pruned).validation is None
    report = stp_fx.report_of(pruned)
    assert report is not None
    assert report.validated == "unchecked"


# -- removals ----------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("stp_validation::turn", mutates_args=())
def turn(x: torch.Tensor) -> torch.Tensor:
    return x.flip(1)


@turn.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Turning(nn.Module):
    """Three pairs of layers; a rule of the user's takes the flip in the second for elementwise."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for k, (first, act, second) in enumerate(self.pairs):
            x = act(first(x))
            x = second(turn(x) if k == 2 else x)
        return x


@pytest.fixture
def wrong_rule() -> fx.GraphModule:
    rule(torch.ops.stp_validation.turn.default, pattern="n c -> n c")
    return stp_fx.trace(Turning().eval(), torch.randn(2, 8))


def test_a_wrong_rule_pins_its_group(wrong_rule: fx.GraphModule) -> None:
    before = snapshot(wrong_rule)
    pruned = stp_fx.prune_graph(wrong_rule, stp_fx.criteria.Random(seed=3))
    assert_untouched(before)
    report = stp_fx.report_of(pruned)
    assert report is not None
    assert pruned.get_parameter("pairs.2.0.weight").shape[0] == 8
    assert pruned.get_parameter("pairs.1.2.weight").shape[1] == 4, "the others go"
    assert report.pinned["removing it changes the function (checked)"] >= 1
    assert any("pairs.2.0.weight:0" in note and "changes the function" in note for note in report.notes)
    assert "masked = removed" in report.validated
    masked = stp_fx.apply_plan(wrong_rule, stp_fx.plan_of(pruned), mask=True)
    x = torch.randn(5, 8)
    assert torch.allclose(masked(x), pruned(x), atol=1e-5)


def test_a_given_plan_is_refused(wrong_rule: fx.GraphModule) -> None:
    plan = stp_fx.analyze(wrong_rule).plan_for({"pairs.2.0": [0, 1, 2], "pairs.4.0": [1]})
    before = snapshot(wrong_rule)
    with pytest.raises(RewriteError, match=r"removing pairs\.2\.0\.weight:0 changes the function: the output differs") as raised:
        stp_fx.apply_plan(wrong_rule, plan)
    assert raised.value.groups == ("pairs.2.0.weight:0",)  # type: ignore[attr-defined]
    assert_untouched(before)
    assert stp_fx.plan_of(stp_fx.apply_plan(wrong_rule, plan, validate=False)) == plan


def test_what_was_asked_by_name_is_not_dropped(wrong_rule: fx.GraphModule) -> None:
    with pytest.raises(FunctionChangedError, match=r"pairs\.2"):
        stp_fx.prune_graph(wrong_rule, stp_fx.criteria.Random(), ratios={"pairs.2.0": 0.5})
    only = [f"pairs.{k}" for k in (0, 1, 3, 4, 5)]
    with pytest.raises(NothingToPruneError, match="changes the function"):
        stp_fx.prune_graph(wrong_rule, stp_fx.criteria.Random(), ignore=only)


def test_pat_refuses_and_changes_nothing(wrong_rule: fx.GraphModule) -> None:
    pat = stp_fx.PATPassManager(wrong_rule, criterion=stp_fx.criteria.Random(), regularizer="group_lasso")
    before = snapshot(pat.model)
    with pytest.raises(FunctionChangedError, match=r"pairs\.2"):
        pat.prune(0)
    assert_untouched(before)
    assert pat.taken == 0
    pat = stp_fx.PATPassManager(wrong_rule, criterion=stp_fx.criteria.Random(), validate=False)
    assert pat.prune(0)


def test_noise_that_is_drawn_for_fewer_channels_is_no_difference() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return self.b(y + torch.randn_like(y))

    pruned = stp_fx.prune_graph(Noisy().eval(), example_inputs=torch.randn(2, 4))
    assert validation_of(pruned).left_out["masked = removed"] == "not comparable: the outputs are random"


def test_integers_are_made_up_so_that_they_tell() -> None:
    class Words(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.emb, self.a, self.b = nn.Embedding(size, 8, padding_idx=0), nn.Linear(8, 8, bias=False), nn.Linear(8, 2)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.b(F.relu(self.a(self.emb(ids))))

    for size in (1, 9):  # with one row, an index of 1 fails
        found = validation_of(stp_fx.prune_graph(Words(size).eval(), example_inputs=torch.zeros(2, 5, dtype=torch.long)))
        assert "masked = removed" in found.differences


def test_an_inexact_group_must_run_and_stay_finite() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    gm = stp_fx.trace(net, torch.randn(2, 4))
    assert {group.exact for group in stp_fx.analyze(gm).groups} == {True, False}
    found = validation_of(stp_fx.prune_graph(gm))
    assert found.differences["masked = removed"] < 1e-5


# -- known networks ----------------------------------------------------------------------------------------------------------

NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "mobilenet_v2": {},
    "vit_b_16": {"image_size": 32},
    "swin_t": {},
    "densenet121": {},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_no_difference_is_reported_where_there_is_none(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **NETWORKS[name]).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)  # a head of zeros tells nothing
    found = validation_of(stp_fx.prune_graph(model, example_inputs=torch.randn(1, 3, 32, 32), validate=True))
    assert {"eval", "batch 3", "train", "masked = removed"} <= set(found.differences)
    assert not found.differs
    assert found.forwards <= 10


def test_auxiliary_heads_are_recorded() -> None:
    model = torchvision.models.googlenet(weights=None, init_weights=False).eval()
    found = validation_of(stp_fx.trace(model, torch.randn(1, 3, 64, 64)))
    assert set(found.differences) == {"eval", "train", "size 96x96, batch 3"}
    assert not found.differs
    assert found.forwards == 6  # and four for the removal: ten in all


# -- comparing ---------------------------------------------------------------------------------------------------------------


def test_values_are_compared_up_to_rounding() -> None:
    one = torch.tensor([1.0, torch.nan, torch.inf])
    assert compared({"a": [one]}, {"a": [one.clone()]}).text is None
    assert compared(one, one * (1 + tolerance(torch.float32) / 2)).text is None
    for expected, actual, message in [
        (one, one + 1, "the output differs by 0.5"),
        (one, torch.tensor([1.0, 1.0, torch.inf]), "1 of 3 values are NaN"),
        (one, one[:2], r"shape (2,) in place of (3,)"),
        (one, one.double(), "dtype torch.float64 in place of torch.float32"),
        ({"a": 1}, {"a": 2}, "the output['a'] is 2 in place of 1"),
        ({"a": 1}, {"b": 1}, "other names"),
        ([one], [one, one], "2 values in place of 1"),
        (one, None, "a NoneType in place of a Tensor"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "1 of 2 numbers"),
    ]:
        assert message in (compared(expected, actual).text or ""), message


def test_it_is_short_and_plain() -> None:
    found = validation_of(stp_fx.trace(Net().eval(), X))
    assert repr(found).startswith("Validation(checked: eval, batch 3, train, size 10x10; largest difference ")
    assert found.line() == "checked: eval, batch 3, train, size 10x10"
    assert found.to_dict()["ran"] == ["eval", "batch 3", "train", "size 10x10"]
