"""prune_graph end to end on small networks, and every kind of bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

import stp_fx
from stp_fx.errors import CriterionError, InputError, NothingToPruneError, PassError, PlanError, StpFxError, TraceError


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 12, 3, padding=1)
        self.outer = nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).sigmoid()
        x = x + self.outer(self.inner(x).sigmoid())
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net() -> Residual:
    torch.manual_seed(0)
    return Residual().eval()


@pytest.fixture
def gm(net: Residual) -> fx.GraphModule:
    return stp_fx.trace(net, torch.randn(2, 3, 6, 6))


def _zero_columns(model: nn.Module, plan: stp_fx.PrunePlan, weights: dict[str, int]) -> nn.Module:
    """The oracle: consumers' input columns of what goes are zero; shares no code with the library."""
    model = copy.deepcopy(model)
    for name, dim in weights.items():
        weight = model.get_parameter(name)
        gone = torch.ones(weight.shape[dim], dtype=torch.bool)
        gone[torch.as_tensor(plan.kept[name, dim])] = False
        with torch.no_grad():
            weight.index_fill_(dim, gone.nonzero().flatten(), 0.0)
    return model


def test_removal_equals_zeroed_consumer_columns(net: Residual) -> None:
    net = net.double()
    pruned = stp_fx.prune_graph(net, ratio=0.5, example_inputs=torch.randn(2, 3, 6, 6).double())
    plan = stp_fx.plan_of(pruned)
    oracle = _zero_columns(net, plan, {"inner.weight": 1, "outer.weight": 1, "head.weight": 1})
    x = torch.randn(4, 3, 6, 6).double()
    torch.testing.assert_close(pruned(x), oracle(x), rtol=1e-12, atol=1e-12)
    assert pruned.get_parameter("stem.weight").shape == (4, 3, 3, 3)
    assert pruned.get_parameter("inner.weight").shape == (6, 4, 3, 3)
    assert pruned.get_submodule("norm").num_features == 4
    assert pruned.get_submodule("head").in_features == 4


def test_masked_equals_removed_and_no_gradient_reaches_the_dead(gm: fx.GraphModule) -> None:
    gm = gm.double()
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    plan = stp_fx.plan_of(pruned)
    masked = stp_fx.apply_plan(gm, plan, mask=True)
    x = torch.randn(4, 3, 6, 6).double()
    torch.testing.assert_close(masked(x), pruned(x), rtol=1e-12, atol=1e-12)
    masked(x).square().sum().backward()
    dead = torch.ones(8, dtype=torch.bool)
    dead[torch.as_tensor(plan.kept["stem.weight", 0])] = False
    assert masked.get_parameter("inner.weight").grad[:, dead].abs().max() == 0
    assert masked.get_parameter("stem.weight").grad[dead].abs().max() == 0
    assert masked.get_parameter("stem.weight").grad[~dead].abs().max() > 0


def test_costs_of_masked_removed_and_planned_agree(gm: fx.GraphModule) -> None:
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    masked = stp_fx.apply_plan(gm, stp_fx.plan_of(pruned), mask=True)
    before, after, dead = stp_fx.cost(gm), stp_fx.cost(pruned), stp_fx.cost(masked)
    assert (after.macs, after.params) == (dead.macs, dead.params)
    assert after.params == sum(p.numel() for p in pruned.parameters())
    assert after.macs == 2 * 36 * 9 * (4 * 3 + 6 * 4 + 4 * 6) + 2 * 5 * 4
    assert before.macs == 2 * 36 * 9 * (8 * 3 + 12 * 8 + 8 * 12) + 2 * 5 * 8


def test_the_input_is_untouched(gm: fx.GraphModule) -> None:
    state = {k: v.clone() for k, v in gm.state_dict().items()}
    code, modules = gm.code, [id(m) for m in gm.modules()]
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    with torch.no_grad():
        for p in pruned.parameters():
            p.add_(1)
    assert gm.code == code
    assert [id(m) for m in gm.modules()] == modules
    assert all(torch.equal(v, state[k]) for k, v in gm.state_dict().items())


def test_ratio_zero_is_the_same_numbers(gm: fx.GraphModule) -> None:
    x = torch.randn(3, 3, 6, 6)
    same = stp_fx.prune_graph(gm, ratio=0.0)
    assert torch.equal(same(x), gm(x))
    assert stp_fx.plan_of(same).is_empty


def test_two_plans_are_their_composition(gm: fx.GraphModule) -> None:
    first = stp_fx.prune_graph(gm, ratio=0.3)
    second = stp_fx.prune_graph(first, "random", ratio=0.3)
    at_once = stp_fx.apply_plan(gm, stp_fx.plan_of(second))
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(second(x), at_once(x))
    assert {k: v.shape for k, v in second.state_dict().items()} == {k: v.shape for k, v in at_once.state_dict().items()}


def test_a_plan_survives_json(gm: fx.GraphModule) -> None:
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    plan = stp_fx.PrunePlan.from_json(stp_fx.plan_of(pruned).to_json())
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(stp_fx.apply_plan(gm, plan)(x), pruned(x))


def test_attributes_of_tensors_are_kept(net: Residual) -> None:
    net = net.to(memory_format=torch.channels_last)
    net.inner.weight.requires_grad_(False)
    gm = stp_fx.trace(net, torch.randn(2, 3, 6, 6))
    gm(torch.randn(2, 3, 6, 6)).sum().backward()
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    plan = stp_fx.plan_of(pruned)
    stem = pruned.get_parameter("stem.weight")
    assert not pruned.get_parameter("inner.weight").requires_grad
    assert stem.requires_grad
    assert stem.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(stem.grad, gm.get_parameter("stem.weight").grad[torch.as_tensor(plan.kept["stem.weight", 0])])
    assert pruned.half().get_parameter("stem.weight").dtype == torch.float16


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.second.weight = self.first.weight
            self.entry = nn.Linear(4, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.third(self.second(self.first(self.entry(x)).relu()).relu())

    pruned = stp_fx.prune_graph(Tied(), ratio=0.5, example_inputs=torch.randn(2, 4))
    assert pruned.get_parameter("first.weight") is pruned.get_parameter("second.weight")
    assert pruned.get_parameter("first.weight").shape == (3, 3)
    assert pruned(torch.randn(5, 4)).shape == (5, 3)


def test_every_scope_and_target(gm: fx.GraphModule) -> None:
    before = stp_fx.cost(gm)
    for scope in ("local", "global"):
        for target in ("macs", "params"):
            after = stp_fx.cost(stp_fx.prune_graph(gm, ratio=0.4, scope=scope, target=target))
            left = getattr(after, target) / getattr(before, target)
            assert left <= 0.6
            assert left > 0.4


def test_round_to_max_ratio_ignore_and_ratios(gm: fx.GraphModule) -> None:
    assert stp_fx.prune_graph(gm, ratio=0.6, round_to=4).get_parameter("inner.weight").shape[0] == 8
    assert stp_fx.prune_graph(gm, ratio=0.9, max_ratio=0.25).get_parameter("inner.weight").shape[:2] == (9, 6)
    kept = stp_fx.prune_graph(gm, ratio=0.5, ignore=["norm"]).get_parameter("inner.weight")
    assert kept.shape == (6, 8, 3, 3)
    assert stp_fx.prune_graph(gm, ratio=0.5, ignore=["inner.weight:0"]).get_parameter("inner.weight").shape[:2] == (12, 4)
    assert stp_fx.prune_graph(gm, ratio=0.5, ratios={"inner": 0.75}).get_parameter("inner.weight").shape[:2] == (3, 4)


def test_never_the_last_unit(gm: fx.GraphModule) -> None:
    pruned = stp_fx.prune_graph(gm, ratio=0.999)
    assert pruned.get_parameter("inner.weight").shape[:2] == (1, 1)
    assert pruned(torch.randn(2, 3, 6, 6)).shape == (2, 5)


def test_passes_compose_with_torchs_pass_manager(gm: fx.GraphModule) -> None:
    from stp_fx.passes import Pipeline, RemoveChannels, ScoreUnits, SelectUnits

    expected = stp_fx.prune_graph(gm, ratio=0.5)
    x = torch.randn(2, 3, 6, 6)
    pipeline = Pipeline(ScoreUnits("magnitude"), SelectUnits(ratio=0.5), RemoveChannels())
    for passes in ([pipeline], [RemoveChannels(stp_fx.plan_of(expected))]):
        result = PassManager(passes=passes)(gm)
        assert torch.equal(result.graph_module(x), expected(x))
        assert result.modified


def test_a_pipeline_prints_itself_and_names_the_pass_that_failed(gm: fx.GraphModule) -> None:
    from stp_fx.passes import Pipeline, RemoveChannels, ScoreUnits

    pipeline = Pipeline(ScoreUnits("random"), RemoveChannels())
    assert repr(pipeline).startswith("Pipeline(ScoreUnits(criterion='random'")
    with pytest.raises(PassError) as caught:
        pipeline(stp_fx.trace(gm, torch.randn(2, 3, 6, 6)))
    assert "RemoveChannels needs a plan" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"ratio": 1.0}, InputError, "[0, 1)"),
        ({"ratio": -0.1}, InputError, "[0, 1)"),
        ({"ratio": "half"}, InputError, "ratio"),
        ({"criterion": "nonesuch"}, InputError, "magnitude"),
        ({"criterion": 3}, InputError, "callable"),
        ({"ignore": ["inner.weigth"]}, InputError, "inner.weight"),
        ({"ratios": {"nope": 0.5}}, InputError, "nope"),
        ({"ratios": {"head": 0.5}}, InputError, "graph output"),
        ({"ratios": {"inner": 1.5}}, InputError, "[0, 1)"),
        ({"scope": "galactic"}, InputError, "local"),
        ({"target": "joy"}, InputError, "macs"),
        ({"products": "left"}, InputError, "outer"),
        ({"round_to": 0}, InputError, "round_to"),
        ({"max_ratio": 0.0}, InputError, "max_ratio"),
        ({"compensation": "mean"}, InputError, "compensation"),
        ({"ignore": ["inner"]}, NothingToPruneError, "ignore"),
        ({"target": "macs", "ratio": 0.99}, InputError, "smallest in reach"),
    ],
)
def test_bad_arguments_say_what_and_change_nothing(gm: fx.GraphModule, arguments: dict, error: type, words: str) -> None:
    before, code = {k: v.clone() for k, v in gm.state_dict().items()}, gm.code
    with pytest.raises(error) as caught:
        stp_fx.prune_graph(gm, **arguments)
    assert words in str(caught.value)
    assert isinstance(caught.value, StpFxError)
    assert gm.code == code
    assert all(torch.equal(v, before[k]) for k, v in gm.state_dict().items())


def test_missing_or_wrong_example_inputs(net: Residual) -> None:
    with pytest.raises(InputError, match="example_inputs"):
        stp_fx.prune_graph(net)
    with pytest.raises((InputError, TraceError), match=r"\(2, 4, 6, 6\)|channels|4"):
        stp_fx.prune_graph(net, example_inputs=torch.randn(2, 4, 6, 6))
    with pytest.raises(InputError):
        stp_fx.prune_graph("model")


def test_a_graph_with_nothing_to_prune_says_why() -> None:
    with pytest.raises(NothingToPruneError, match="graph output"):
        stp_fx.prune_graph(nn.Linear(4, 3), example_inputs=torch.randn(2, 4))
    with pytest.raises(NothingToPruneError, match="no parameters"):
        stp_fx.prune_graph(nn.ReLU(), example_inputs=torch.randn(2, 4))


class _Positions(nn.Module):
    """A table of positions of which only the example's are read, as transformers' embeddings have it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("position_ids", torch.arange(12)[None])
        self.tokens, self.places = nn.Embedding(20, 4), nn.Embedding(12, 4)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places(self.position_ids[:, : ids.shape[1]])
        return x + self.down(self.up(x).relu())


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_a_table_that_is_read_in_part_stays_whole(criterion: str) -> None:
    model = _Positions().eval()
    gm = stp_fx.trace(model, torch.zeros(2, 5, dtype=torch.int64))
    pruned = stp_fx.prune_graph(gm, criterion, 0.5)
    assert pruned.get_parameter("up.weight").shape == (4, 4)
    assert pruned.get_buffer("position_ids").shape == (1, 12)
    assert pruned(torch.zeros(2, 9, dtype=torch.int64)).shape == (2, 9, 4)
    with pytest.raises(NothingToPruneError, match="ignore"):
        stp_fx.prune_graph(gm, ignore=["up"])


def test_nan_and_integer_weights(net: Residual) -> None:
    gm = stp_fx.trace(net, torch.randn(2, 3, 6, 6))
    with torch.no_grad():
        net.inner.weight[0, 0] = float("nan")
    with pytest.raises(CriterionError, match=r"inner\.weight"):
        stp_fx.prune_graph(gm, ratio=0.5)
    with pytest.raises(CriterionError, match="weight"):
        stp_fx.prune_graph(_IntegerWeights(), ratio=0.5, example_inputs=torch.ones(2, 4))


class _IntegerWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(6, 4, dtype=torch.int32), requires_grad=False)
        self.second = nn.Parameter(torch.ones(3, 6, dtype=torch.int32), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.first.float()), self.second.float())


def test_plans_that_do_not_fit(gm: fx.GraphModule) -> None:
    plan = stp_fx.plan_of(stp_fx.prune_graph(gm, ratio=0.5))
    kept, sizes = dict(plan.kept), dict(plan.sizes)
    shifted = {**kept, ("inner.weight", 1): [(int(k) + 1) % 8 for k in kept["inner.weight", 1]]}
    shifted["inner.weight", 1] = sorted(shifted["inner.weight", 1])
    missing = {k: v for k, v in kept.items() if k != ("outer.weight", 1)}
    for bad_kept, words in (
        ({**kept, ("nope", 0): [0]}, "nope"),
        ({**kept, ("head.weight", 0): [0, 1]}, "pinned"),
        (shifted, "coupled"),
        (missing, "outer.weight"),
    ):
        bad_sizes = {k: sizes.get(k, {"nope": 2, "head.weight": 5}.get(k[0], 0)) for k in bad_kept}
        with pytest.raises(PlanError) as caught:
            stp_fx.apply_plan(gm, stp_fx.PrunePlan(bad_kept, bad_sizes))
        assert words in str(caught.value)
    with pytest.raises(InputError, match="PrunePlan"):
        stp_fx.apply_plan(gm, {"inner.weight": [0]})


def test_a_user_criterion_is_a_function(gm: fx.GraphModule) -> None:
    def last_ones(group, context):
        return torch.arange(group.size, dtype=torch.float32)

    plan = stp_fx.plan_of(stp_fx.prune_graph(gm, last_ones, ratio=0.5))
    assert plan.kept["inner.weight", 0].tolist() == [6, 7, 8, 9, 10, 11]


def test_the_result_can_be_copied_pickled_and_pruned_again(gm: fx.GraphModule) -> None:
    import io

    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    buffer = io.BytesIO()
    torch.save(pruned, buffer)
    buffer.seek(0)
    x = torch.randn(2, 3, 6, 6)
    for twin in (copy.deepcopy(pruned), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), pruned(x))
        assert stp_fx.plan_of(twin) == stp_fx.plan_of(pruned)
        assert stp_fx.prune_graph(twin, ratio=0.5).get_parameter("inner.weight").shape[:2] == (3, 2)


class Nothing(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("nothing", torch.zeros(0, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.nothing.sum(0)


def test_an_axis_without_positions_is_no_obstacle() -> None:
    pruned = stp_fx.prune_graph(Nothing().eval(), example_inputs=torch.randn(2, 3, 6, 6))
    assert pruned.get_buffer("nothing").shape == (0, 5)
    assert pruned.get_parameter("inner.weight").shape == (6, 4, 3, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"compensation": "mean"},
        {"compensation": "least_squares"},
        {"compensation": "sequential"},
        {"criterion": "taylor", "recalibrate": 1},
        {"criterion": "variance", "allocation": "optimal", "target": "macs"},
    ],
    ids=str,
)
def test_in_inference_mode_the_result_is_the_same_and_can_be_trained(net: Residual, options: dict) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 6, 6), torch.arange(8) % 5
    outside = stp_fx.prune_graph(net, ratio=0.4, example_inputs=x, calibration=[(x, y)], **options)
    with torch.inference_mode():
        pruned = stp_fx.prune_graph(net, ratio=0.4, example_inputs=x.clone(), calibration=[(x.clone(), y.clone())], **options)
    for (name, expected), (_, found) in zip(outside.state_dict().items(), pruned.state_dict().items(), strict=True):
        assert torch.equal(found, expected), name
    torch.nn.functional.cross_entropy(pruned(x), y).backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())
    torch.optim.SGD(pruned.parameters(), 0.1).step()
