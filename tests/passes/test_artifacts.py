"""Passes talk through artifacts: nothing is kept on a graph, and nothing is used for what it was not made from."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils.data import DataLoader, Dataset

import stp_fx
from stp_fx.criteria import score
from stp_fx.errors import InputError, NothingToPruneError, PassError, VerificationError
from stp_fx.ir.provenance import has_provenance, provenance_of
from stp_fx.measure.measured import measure
from stp_fx.passes import (
    Artifacts,
    CollectStatistics,
    CompensateMean,
    GraphPass,
    MaskChannels,
    Outcome,
    Pipeline,
    RemoveChannels,
    ScoreUnits,
    SelectUnits,
)
from stp_fx.selection.choice import select
from stp_fx.selection.selection import Selection


@pytest.fixture
def gm() -> fx.GraphModule:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1))
    return stp_fx.trace(net.eval(), torch.randn(2, 3, 8, 8))


@pytest.fixture
def batches() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 3, 8, 8) for _ in range(3)]


# -- nothing is left behind --------------------------------------------------------------------------------------------


def test_a_manager_leaves_no_plan_on_the_graph(gm: fx.GraphModule) -> None:
    meta = dict(gm.meta)
    stp_fx.PATPassManager(gm, criterion="magnitude", ratio=0.5)
    assert gm.meta == meta
    with pytest.raises(PassError, match="RemoveChannels needs a plan"):
        RemoveChannels()(gm)


def test_passes_leave_nothing_on_the_graph(gm: fx.GraphModule, batches: list[torch.Tensor]) -> None:
    meta = dict(gm.meta)
    made = Pipeline(CollectStatistics(batches), ScoreUnits("variance"), SelectUnits(0.5))(gm).artifacts
    assert gm.meta == meta
    assert made.plan is not None
    with pytest.raises(PassError, match="SelectUnits needs scores"):
        SelectUnits(0.5)(gm)
    with pytest.raises(PassError, match="needs statistics"):
        CompensateMean(made.plan)(gm)


def test_the_plan_of_a_pipeline_can_be_read_and_carried_out(gm: fx.GraphModule) -> None:
    made = Pipeline(ScoreUnits("magnitude"), SelectUnits(0.5))(gm).artifacts
    assert made.plan is not None
    assert made.report is not None
    assert made.plan == stp_fx.plan_of(stp_fx.prune_graph(gm, "magnitude", 0.5))
    assert made.plan == stp_fx.plan_of(stp_fx.apply_plan(gm, made.plan))
    assert made.report.macs[1] == stp_fx.cost(stp_fx.apply_plan(gm, made.plan)).macs


def test_a_report_does_not_depend_on_what_ran_before(gm: fx.GraphModule) -> None:
    plan = stp_fx.plan_of(stp_fx.prune_graph(gm, ratio=0.5))
    fresh = stp_fx.report_of(stp_fx.apply_plan(gm, plan))
    Pipeline(ScoreUnits(), SelectUnits(0.5))(gm)
    assert stp_fx.report_of(stp_fx.apply_plan(gm, plan)) == fresh is None
    pruned = stp_fx.prune_graph(gm, ratio=0.25)
    assert stp_fx.report_of(pruned) is not None
    assert stp_fx.report_of(stp_fx.apply_plan(pruned, stp_fx.PrunePlan({}, {}))) is None


def test_looking_up_a_provenance_writes_nothing(gm: fx.GraphModule) -> None:
    again = pickle.loads(pickle.dumps(gm))
    before = dict(again.meta), dict(again.__dict__)
    assert has_provenance(again)
    provenance_of(again)
    assert (dict(again.meta), dict(again.__dict__)) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        provenance_of(gm).plan = None  # type: ignore[misc]


# -- artifacts know what they were made from ---------------------------------------------------------------------------


def _halve(parameter: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.mul_(0.5)


CHANGES = {
    "in place": lambda gm: _halve(gm.get_parameter("0.weight")),
    "through .data": lambda gm: gm.get_parameter("0.weight").data.mul_(0.5),
    "new data": lambda gm: setattr(gm.get_parameter("0.weight"), "data", gm.get_parameter("0.weight").detach() * 0.5),
    "loaded": lambda gm: gm.load_state_dict({k: v * 0.5 if v.is_floating_point() else v for k, v in gm.state_dict().items()}),
    "a buffer": lambda gm: gm.get_buffer("1.running_mean").add_(1.0),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_scores_and_statistics_of_other_weights_are_refused(change: str, gm: fx.GraphModule, batches: list[torch.Tensor]) -> None:
    measured = measure(gm, ("statistics",), batches)
    scores = score(gm, "variance", measured)
    plan = select(gm, scores, Selection(0.5))
    CHANGES[change](gm)
    with pytest.raises(InputError, match="scores were made before the weights"):
        select(gm, scores, Selection(0.5))
    with pytest.raises(InputError, match="statistics were made before the weights"):
        score(gm, "variance", measured)
    with pytest.raises(InputError, match="statistics were made before the weights"):
        CompensateMean(plan, measured.statistics)(gm)
    RemoveChannels(plan)(gm)  # a plan is for a structure, whatever the weights are


def test_artifacts_of_another_graph_are_refused(gm: fx.GraphModule, batches: list[torch.Tensor]) -> None:
    other = stp_fx.trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), torch.randn(2, 3, 8, 8))
    scores = score(gm, "magnitude")
    with pytest.raises(InputError, match="made from another graph: score this graph again"):
        select(other, scores, Selection(0.5))
    with pytest.raises(InputError, match="made from another graph: collect them again"):
        score(other, "variance", measure(gm, ("statistics",), batches))


def test_a_repair_keeps_artifacts_and_a_rewrite_drops_them(gm: fx.GraphModule, batches: list[torch.Tensor]) -> None:
    made = Pipeline(CollectStatistics(batches, maps=True), ScoreUnits(), SelectUnits(0.5), CompensateMean())(gm)
    assert made.artifacts.plan is not None
    twice = CompensateMean()(made.graph_module, made.artifacts)
    assert twice.artifacts.plan == made.artifacts.plan
    removed = RemoveChannels()(twice.graph_module, twice.artifacts)
    assert removed.artifacts.plan is removed.artifacts.scores is removed.artifacts.measured.statistics is None
    assert removed.artifacts.report is not None
    assert removed.artifacts.report.compensation == "mean"


# -- calibration data --------------------------------------------------------------------------------------------------


class Counted(Dataset[tuple[torch.Tensor, int]]):
    def __init__(self, size: int) -> None:
        self.size, self.read = size, 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.read += 1
        return torch.randn(3, 8, 8), index % 4


def test_a_loader_is_never_held_in_memory(gm: fx.GraphModule) -> None:
    alive: list[int] = []
    peak = 0

    class Tracked(torch.Tensor):
        pass

    class Loader:
        """Batches of which the number alive at once is counted."""

        def __iter__(self) -> Iterator[Any]:
            nonlocal peak
            import weakref

            for number in range(40):
                batch = torch.randn(2, 3, 8, 8)
                alive.append(number)
                weakref.finalize(batch, alive.remove, number)
                peak = max(peak, len(alive))
                yield batch, torch.zeros(2, dtype=torch.long)
                del batch

    net = stp_fx.trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
                       torch.randn(2, 3, 8, 8))  # fmt: skip
    stp_fx.prune_graph(net, "taylor", 0.5, calibration=Loader(), compensation="least_squares", recalibrate=True)
    assert peak <= 4, f"{peak} of 40 batches were alive at once"


def test_loaders_are_read_once_a_collection_and_iterators_only_as_far_as_needed(gm: fx.GraphModule) -> None:
    data = Counted(24)
    stp_fx.prune_graph(gm, "variance", 0.5, calibration=DataLoader(data, batch_size=4))
    assert data.read == 24
    drawn: list[int] = []

    def endless() -> Iterator[torch.Tensor]:
        while True:
            drawn.append(1)
            yield torch.randn(2, 3, 8, 8)

    pat = stp_fx.PATPassManager(gm, criterion="variance", ratio=0.5, train_loader=endless(), calibration_batches=3, recalibrate=2)
    pat.prune(0)
    assert len(drawn) == 3


def test_a_one_shot_iterator_serves_statistics_and_gradients(gm: fx.GraphModule) -> None:
    net = stp_fx.trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 4))
    data = [(torch.randn(5, 4), torch.randint(0, 3, (5,))) for _ in range(3)]
    once = stp_fx.prune_graph(net, "taylor", 0.5, calibration=iter(data), compensation="mean")
    listed = stp_fx.prune_graph(net, "taylor", 0.5, calibration=data, compensation="mean")
    for name, parameter in listed.named_parameters():
        assert torch.equal(parameter, once.get_parameter(name))


def _never() -> Iterator[torch.Tensor]:
    raise AssertionError("a batch was read before the arguments were checked")
    yield


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"scope": "Global"}, InputError, "unknown scope 'Global'; known: local, global, isomorphic"),
        ({"target": "flops"}, InputError, "unknown target"),
        ({"ratio": 5}, InputError, r"`ratio` .* in \[0, 1\); got 5"),
        ({"ratios": {"nope": 0.5}}, InputError, "names 'nope'"),
        ({"ratios": 0.5}, InputError, "`ratios` maps layers"),
        ({"ignore": ["nope"]}, InputError, "names 'nope'"),
        ({"ignore": 5}, InputError, "`ignore` holds 5"),
        ({"ignore": ["0", "3", "5"]}, NothingToPruneError, "everything is in `ignore`"),
        ({"round_to": 0}, InputError, "`round_to`"),
        ({"max_ratio": 2}, InputError, "`max_ratio`"),
        ({"products": "all"}, InputError, "unknown products"),
        ({"compensation": "median"}, InputError, "unknown compensation"),
        ({"criterion": "variances"}, InputError, "did you mean 'variance'"),
        ({"recalibrate": 0}, InputError, "at least 1"),
        ({"scop": "global"}, InputError, "no argument 'scop'"),
    ],
)
def test_arguments_are_checked_before_any_batch_is_read(
    options: dict[str, Any], error: type[Exception], words: str, gm: fx.GraphModule
) -> None:
    arguments: dict[str, Any] = {"criterion": "variance", "calibration": _never(), **options}
    with pytest.raises(error, match=words):
        stp_fx.prune_graph(gm, **arguments)


@pytest.mark.parametrize("calibration", [5, "images", b"", {"x": 1}, object()])
def test_calibration_that_is_no_iterable_of_batches(calibration: Any, gm: fx.GraphModule) -> None:
    with pytest.raises(InputError, match="`calibration` is a"):
        stp_fx.prune_graph(gm, "variance", calibration=calibration)
    with pytest.raises(InputError, match="`train_loader` is a"):
        stp_fx.PATPassManager(gm, criterion="variance", train_loader=calibration)


def test_passes_check_their_arguments_when_they_are_made() -> None:
    for make in (
        lambda: SelectUnits(ratio=5),
        lambda: SelectUnits(0.5, scope="Global"),
        lambda: SelectUnits(Selection(0.5), scope="global"),
        lambda: SelectUnits(0.5, scop="global"),
        lambda: ScoreUnits("magnitud"),
        lambda: ScoreUnits(ignore=5),
        lambda: Pipeline(ScoreUnits),
        lambda: Pipeline("ScoreUnits"),
    ):
        with pytest.raises(InputError):
            make()


def test_errors_name_a_remedy_that_the_caller_has(gm: fx.GraphModule) -> None:
    model = nn.Linear(4, 4)
    for call in (stp_fx.cost, stp_fx.analyze, stp_fx.plan_of, stp_fx.report_of):
        with pytest.raises(InputError, match=r"stp_fx.trace\(model, example_inputs\)") as caught:
            call(fx.symbolic_trace(model))
        assert "to this call" not in str(caught.value)
    with pytest.raises(InputError) as caught:
        stp_fx.apply_plan(model, stp_fx.PrunePlan({}, {}))  # type: ignore[arg-type]
    assert "pass example_inputs" not in str(caught.value)
    with pytest.raises(InputError, match="or pass example_inputs"):
        stp_fx.prune_graph(model)
    with pytest.raises(InputError, match="got a str"):
        stp_fx.prune_graph("1")  # type: ignore[arg-type]


# -- what the base of all passes checks --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Does(GraphPass):
    """A pass that does what it is told."""

    action: Any

    def call(self, gm: fx.GraphModule) -> PassResult:
        return self.action(gm)


@dataclasses.dataclass(frozen=True)
class Looks(Does):
    kind: ClassVar[Any] = "analysis"


def _in_place(gm: fx.GraphModule) -> PassResult:
    _halve(gm.get_parameter("0.weight"))
    return PassResult(copy.deepcopy(gm), True)


def _train(gm: fx.GraphModule) -> PassResult:
    gm.train()
    return PassResult(gm, False)


def _meta(gm: fx.GraphModule) -> PassResult:
    gm.meta["note"] = 1
    return PassResult(gm, False)


def _edit(gm: fx.GraphModule) -> PassResult:
    node = next(n for n in gm.graph.nodes if n.op == "call_module")
    node.target = "2"
    return PassResult(copy.deepcopy(gm), True)


def _broken(gm: fx.GraphModule) -> PassResult:
    result = copy.deepcopy(gm)
    result.get_submodule("3").weight = nn.Parameter(torch.randn(6, 5, 3, 3))
    return PassResult(result, True)


@pytest.mark.parametrize(
    ("made", "error", "words"),
    [
        (Does(_in_place), PassError, "a number in a parameter or buffer"),
        (Does(_train), PassError, "a train/eval flag"),
        (Does(_meta), PassError, "its meta"),
        (Does(_edit), PassError, "its nodes"),
        (Does(lambda gm: PassResult(gm, True)), PassError, "a rewrite returns a new GraphModule"),
        (Does(lambda gm: gm), PassError, "return PassResult"),
        (Does(lambda gm: None), PassError, "return PassResult"),
        (Does(_broken), VerificationError, "does not run on meta tensors"),
        (Looks(lambda gm: PassResult(copy.deepcopy(gm), True)), PassError, "is an analysis and returned another graph"),
        (Looks(lambda gm: PassResult(copy.deepcopy(gm), False)), PassError, "is an analysis and returned another graph"),
    ],
)
def test_a_pass_that_breaks_its_contract_is_named(
    made: GraphPass, error: type[Exception], words: str, gm: fx.GraphModule
) -> None:
    for each in (made, Pipeline(ScoreUnits(), made)):
        with pytest.raises(error, match=words):
            each(copy.deepcopy(gm))


def test_a_pass_without_a_body_says_so(gm: fx.GraphModule) -> None:
    @dataclasses.dataclass(frozen=True)
    class Empty(GraphPass):
        pass

    with pytest.raises(PassError, match="overrides neither `call` nor `run`"):
        Empty()(gm)


def test_a_pipeline_checks_what_its_passes_require_before_any_runs(gm: fx.GraphModule) -> None:
    with pytest.raises(InputError, match="names 'nope'"):
        Pipeline(CollectStatistics(_never()), ScoreUnits("variance", ("nope",)))(gm)
    with pytest.raises(InputError, match="names 'nope'"):
        Pipeline(CollectStatistics(_never()), ScoreUnits("variance"), SelectUnits(0.5, ratios={"nope": 0.1}))(gm)
    with pytest.raises(InputError, match="names 'nope'"):
        Pipeline(Pipeline(CollectStatistics(_never())), Pipeline(ScoreUnits("variance", ("nope",))))(gm)


def test_callables_and_torchs_results_may_be_members(gm: fx.GraphModule) -> None:
    seen: list[int] = []

    def look(graph: fx.GraphModule) -> PassResult:
        seen.append(len(graph.graph.nodes))
        return PassResult(graph, False)

    outcome = Pipeline(ScoreUnits(), SelectUnits(0.5), look, RemoveChannels())(gm)
    assert isinstance(outcome, Outcome)
    assert seen == [len(gm.graph.nodes)]
    graph_module, modified = outcome
    assert modified
    assert graph_module.get_parameter("0.weight").shape[0] == 4
    with pytest.raises(PassError, match="return PassResult"):
        Pipeline(lambda graph: 5)(gm)


# -- textual pipelines -------------------------------------------------------------------------------------------------

TEXTS = [
    "Pipeline()",
    "Pipeline(ScoreUnits(), SelectUnits(0.5), RemoveChannels())",
    "Pipeline(ScoreUnits(criterion='lamp', ignore=('0',)), SelectUnits(0.25, scope='global', round_to=2), MaskChannels())",
    "Pipeline(ScoreUnits(criterion=Magnitude(p=1.0, reduction='max', normalizer='mean')), SelectUnits(0.5, ratios={'0': 0.75}))",
    "Pipeline(Pipeline(ScoreUnits(criterion='random', seed=3)), SelectUnits(0.5), RemoveChannels())",
    "Pipeline(CompensateLeastSquares(ridge=0.01), UpdateBatchNormVariance(floor=0.1), UnmaskChannels())",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_pipeline_is_read_from_what_it_prints(text: str) -> None:
    pipeline = Pipeline.parse(text)
    assert str(Pipeline.parse(str(pipeline))) == str(pipeline)
    assert Pipeline.parse(text) == pipeline


def test_a_text_prunes_as_the_function_does(gm: fx.GraphModule, batches: list[torch.Tensor]) -> None:
    text = "CollectStatistics(maps=True), ScoreUnits('variance'), SelectUnits(0.5), CompensateMean(), RemoveChannels()"
    pruned = Pipeline.parse(text, calibration=batches)(gm).graph_module
    expected = stp_fx.prune_graph(gm, "variance", 0.5, calibration=batches, compensation="mean")
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, pruned.get_parameter(name))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ScoreUnits(", "is not a pipeline"),
        ("ScoreUnit()", "'ScoreUnit\\(\\)' is not a pass; known: .*ScoreUnits"),
        ("__import__('os').system('false')", "is not a pass"),
        ("SelectUnits(ratio=5)", r"in \[0, 1\)"),
        ("SelectUnits(0.5, scop='global')", "no argument 'scop'"),
        ("ScoreUnits(open('x'))", "is not a criterion"),
        ("ScoreUnits(criterion=[1 for _ in ()])", "is not a literal"),
        ("RemoveChannels(**{})", "is not read"),
        ("CollectStatistics()", "calibration"),
        ("ScoreUnits(5)", "criterion"),
        ("(" * 500 + ")" * 500, "is not a pipeline"),
        ("x" * 50_000, "characters"),
        (5, "read from text"),
    ],
)
def test_texts_that_are_no_pipeline(text: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Pipeline.parse(text)


def test_arguments_for_a_text_must_be_taken_by_a_pass(batches: list[torch.Tensor]) -> None:
    with pytest.raises(InputError, match=r"no pass of .* takes 'calibration'"):
        Pipeline.parse("ScoreUnits()", calibration=batches)


def test_masks_and_plans_print_without_their_data(gm: fx.GraphModule) -> None:
    plan = stp_fx.plan_of(stp_fx.prune_graph(gm, ratio=0.5))
    assert str(Pipeline(RemoveChannels(plan), MaskChannels(plan))) == "Pipeline(RemoveChannels(), MaskChannels())"
    assert isinstance(Artifacts().planned, object)
