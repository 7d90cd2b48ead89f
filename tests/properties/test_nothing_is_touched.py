"""A law over every public function and pass: what it is given, and the process, are as before; also after an exception.

``PATPassManager`` changes its model by design; constructing one, and a step that fails, may not.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import pathlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import stp_fx
from stp_fx import passes, regularizers
from stp_fx.criteria import known_criteria, score
from stp_fx.errors import StpFxError, TargetError
from stp_fx.measure.measured import measure
from stp_fx.passes import Artifacts, GraphPass, known_passes
from stp_fx.rewrite.removal import mask, remove, unmask
from stp_fx.selection.choice import choose
from stp_fx.selection.selection import Selection
from stp_fx.testing.untouched import assert_untouched, snapshot


class Net(nn.Module):
    """BatchNorm, a residual sum, attention, dropout, a list that the forward reads, a hook, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, 5)
        self.tied = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)
        self.other.weight = self.tied.weight
        self.scales = [1.0, 2.0]
        self.stem.register_forward_hook(lambda module, args, out: out * 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.stem(x))) * self.scales[0]
        y = y + self.body(y) * self.scales[1]
        tokens = y.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(self.other(torch.relu(self.tied(self.drop(tokens).mean(1)))))


@dataclasses.dataclass
class Setting:
    model: nn.Module
    x: torch.Tensor
    gm: fx.GraphModule
    batches: list[Any]
    plan: stp_fx.PrunePlan
    masked: fx.GraphModule
    pruned: fx.GraphModule
    folder: pathlib.Path


@functools.cache
def _made(mode: str) -> Setting:
    """One setting for all tests, since each of them asserts that it has left it alone."""
    torch.manual_seed(0)
    model = Net().train(mode == "train")
    model.drop.train(mode != "train")  # one module in the other mode
    x = torch.randn(3, 3, 6, 6)
    model.head(torch.randn(2, 8)).sum().backward()  # gradients that somebody holds
    gm = stp_fx.trace(model, x)
    plan = stp_fx.plan_of(stp_fx.prune_graph(gm, ratio=0.5))
    masked, pruned = stp_fx.apply_plan(gm, plan, mask=True), stp_fx.apply_plan(gm, plan)
    batches = [(torch.randn(4, 3, 6, 6), torch.randint(0, 5, (4,))) for _ in range(2)]
    return Setting(model, x, gm, batches, plan, masked, pruned, pathlib.Path())


@pytest.fixture(params=["train", "eval"])
def setting(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Setting:
    found = dataclasses.replace(_made(request.param), folder=tmp_path)
    stp_fx.save(found.pruned, tmp_path / "pruned.safetensors")
    return found


def _fails(gm: fx.GraphModule, batch: Any) -> torch.Tensor:
    raise RuntimeError("a loss that fails")


def _nan(setting: Setting) -> list[Any]:
    return [(torch.full((4, 3, 6, 6), float("nan")), torch.zeros(4, dtype=torch.long))]


def _to_a_latency(setting: Setting) -> None:
    with contextlib.suppress(TargetError):  # on a machine with other work, no smaller network may be measured as faster
        stp_fx.prune_graph(setting.gm, ratio=0.0005, target="latency")


DATA = {"calibration": True}
CALLS: dict[str, Callable[[Setting], Any]] = {
    "trace": lambda s: stp_fx.trace(s.model, s.x),
    "trace, export": lambda s: stp_fx.trace(copy.deepcopy(s.model), s.x, frontend="export"),
    "analyze": lambda s: stp_fx.analyze(s.gm),
    "explain": lambda s: [stp_fx.analyze(s.gm).explain(), stp_fx.analyze(s.gm).explain("stem.weight:0", 1)],
    "plan_for": lambda s: stp_fx.analyze(s.gm).plan_for({"body": [0]}),
    "draw": lambda s: stp_fx.analyze(s.gm).draw(s.folder / "net.dot"),
    "cost": lambda s: [stp_fx.cost(s.gm), stp_fx.cost(s.masked)],
    "compare": lambda s: stp_fx.compare(s.gm, s.pruned, latency=True),
    "apply_plan": lambda s: [stp_fx.apply_plan(s.gm, s.plan, mask=each) for each in (True, False)],
    "blocks_of": lambda s: [block.explain() for block in stp_fx.blocks_of(s.gm)],
    **{
        f"score_blocks, {each}": lambda s, each=each: stp_fx.score_blocks(s.gm, each, s.batches)
        for each in ("influence", "taylor", "loss")
    },
    "plan_of": lambda s: stp_fx.plan_of(s.pruned),
    "explore": lambda s: stp_fx.explore(s.gm, s.folder / "page.html", pruned=s.pruned),
    "report_of": lambda s: stp_fx.report_of(s.pruned),
    "save": lambda s: stp_fx.save(s.masked, s.folder / "masked.safetensors"),
    "load": lambda s: stp_fx.load(s.folder / "pruned.safetensors", s.model),
    "write_back": lambda s: stp_fx.write_back(stp_fx.prune_graph(s.gm, ratio=0.5, products="outer"), s.model, s.x),
    "prune_submodule": lambda s: stp_fx.prune_submodule(nn.Sequential(s.model), "0", s.x),
    "estimate_keep_ratio": lambda s: stp_fx.estimate_keep_ratio(s.gm, 0.5),
    "sweep": lambda s: stp_fx.sweep(s.gm, [0.25, 0.5], "variance", calibration=s.batches, target="macs"),
    "sensitivity": lambda s: stp_fx.sensitivity(s.gm, s.batches, ratios=(0.5,)),
    "mean_check": lambda s: passes.mean_check(s.gm, s.pruned, s.batches),
    "latency_model": lambda s: passes.latency_model(s.gm),
    "PATPassManager": lambda s: stp_fx.PATPassManager(s.gm, criterion="variance", train_loader=s.batches, compensation="mean"),
    "measure": lambda s: measure(s.gm, ("covariance", "maps", "patches", "fisher", "hessian"), s.batches),
    "choose": lambda s: choose(s.gm, score(s.gm, "magnitude"), Selection(0.5, scope="isomorphic")),
    "mask again": lambda s: mask(s.masked, s.plan),
    "unmask": lambda s: unmask(s.masked),
    "remove what is masked": lambda s: remove(s.masked, s.plan),
    **{
        f"prune_graph, {name}": lambda s, name=name: stp_fx.prune_graph(s.gm, name, 0.5, calibration=s.batches)
        for name in known_criteria()
        if name != "bn_scale"  # not every group has a norm, which it says
    },
    **{
        f"prune_graph, {scope} {target}": lambda s, scope=scope, target=target: stp_fx.prune_graph(
            s.gm, ratio=0.4, scope=scope, target=target
        )
        for scope in ("local", "global", "isomorphic")
        for target in ("channels", "macs", "params")
    },
    "prune_graph, latency": lambda s: _to_a_latency(s),
    **{
        f"prune_graph, {each}": lambda s, each=each: stp_fx.prune_graph(
            s.gm, "variance", 0.5, calibration=s.batches, compensation=each, recalibrate=True
        )
        for each in ("mean", "least_squares", "sequential")
    },
}
OTHER = nn.Linear(3, 3)
HALF = stp_fx.PrunePlan({("stem.weight", 0): [0]}, {("stem.weight", 0): 8})
FAILURES: dict[str, Callable[[Setting], Any]] = {
    "trace, an example that does not fit": lambda s: stp_fx.trace(s.model, torch.zeros(2, 5)),
    "trace, export, likewise": lambda s: stp_fx.trace(s.model, torch.zeros(2, 5), frontend="export"),
    "a loss that fails": lambda s: stp_fx.prune_graph(s.gm, "taylor", calibration=s.batches, loss=_fails),
    "data that is not finite": lambda s: stp_fx.prune_graph(s.gm, "variance", calibration=_nan(s)),
    "a batch that does not fit": lambda s: stp_fx.prune_graph(s.gm, "variance", calibration=[torch.zeros(4, 2)]),
    "a plan that does not fit": lambda s: stp_fx.apply_plan(s.pruned, s.plan),
    "a plan of half an axis": lambda s: stp_fx.apply_plan(
        s.gm, stp_fx.PrunePlan({("stem.weight", 0): [0]}, {("stem.weight", 0): 8})
    ),
    "a target out of reach": lambda s: stp_fx.prune_graph(s.gm, ratio=0.999, target="macs"),
    "a criterion that fails": lambda s: stp_fx.prune_graph(
        s.gm, lambda group, context: torch.tensor([float("nan")] * group.size)
    ),
    "a file of another network": lambda s: stp_fx.load(s.folder / "pruned.safetensors", OTHER),
    "write_back to another model": lambda s: stp_fx.write_back(s.pruned, OTHER, torch.zeros(2, 3)),
    "a manager of a typo": lambda s: stp_fx.PATPassManager(s.gm, scope="Global"),
    "a manager of missing data": lambda s: stp_fx.PATPassManager(s.gm, criterion="variance"),
}


def _held(setting: Setting) -> list[Any]:
    return [setting.model, setting.gm, setting.masked, setting.pruned, setting.x, setting.batches]


@pytest.mark.parametrize("name", list(CALLS))
def test_a_call_touches_nothing(name: str, setting: Setting) -> None:
    before = snapshot(*_held(setting))
    CALLS[name](setting)
    assert_untouched(before)


@pytest.mark.parametrize("name", list(FAILURES))
def test_a_call_that_fails_touches_nothing(name: str, setting: Setting) -> None:
    before = snapshot(*_held(setting))
    with pytest.raises((StpFxError, RuntimeError)):
        FAILURES[name](setting)
    assert_untouched(before)


class Normed(nn.Module):
    """What a change of basis needs, for inputs like those of :class:`Net`."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm, self.head = nn.Conv2d(3, 8, 1), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.into(x).flatten(2).transpose(1, 2)))


def _instances(setting: Setting) -> list[GraphPass]:
    """One of every pass of the library."""
    given: dict[str, Any] = {"calibration": setting.batches, "plan": setting.plan, "steps": 4, "ratio": 0.1}
    given["blocks"] = ("attention",)
    made = []
    for name, cls in sorted(known_passes().items()):
        if not cls.__module__.startswith("stp_fx."):
            continue
        if name == "Pipeline":
            made.append(passes.Pipeline(passes.ScoreUnits(), passes.SelectUnits(0.5), passes.RemoveChannels()))
            continue
        known = {field.name for field in dataclasses.fields(cls) if field.init}
        made.append(cls(**{key: value for key, value in given.items() if key in known and name != "SelectUnits"}))
    return made


def test_every_pass_touches_nothing_and_keeps_to_its_kind(setting: Setting) -> None:
    needs = ("covariance", "maps", "patches", "gradients")
    artifacts = Artifacts(measure(setting.gm, needs, setting.batches), score(setting.gm, "magnitude"), setting.plan)
    normed = stp_fx.trace(Normed(), torch.randn(2, 3, 6, 6))
    seen = []
    for each in _instances(setting):
        graph = setting.masked if type(each).__name__ == "UnmaskChannels" else setting.gm
        graph = normed if type(each).__name__ in ("LayerNormToRMSNorm", "RotateResidual") else graph
        before = snapshot(*_held(setting), normed)
        outcome = each(graph, artifacts)
        assert_untouched(before)
        assert (outcome.graph_module is graph) == (each.kind == "analysis"), each
        assert not (outcome.modified and each.kind == "analysis"), each
        seen.append(type(each).__name__)
    assert len(seen) >= 12


@pytest.mark.parametrize("name", sorted(regularizers.known_regularizers()))
def test_a_regularizer_writes_gradients_alone(name: str) -> None:
    torch.manual_seed(0)
    gm = stp_fx.trace(Net(), torch.randn(2, 3, 6, 6))
    made = regularizers.resolve(name)
    meta, values = dict(gm.meta), {k: v.clone() for k, v in gm.state_dict().items()}
    code = gm.code
    made.attach(gm)
    gm(torch.randn(2, 3, 6, 6)).sum().backward()
    if "gradients" in made.forms:
        made.apply_gradients(gm)
    elif "loss" in made.forms:
        made.loss(gm)
    made.detach(gm)
    assert gm.meta == meta
    assert gm.code == code
    for key, value in gm.state_dict().items():
        moved = key.startswith("norm.") and not key.endswith(("weight", "bias"))  # what a forward in training counts
        assert moved or torch.equal(values[key], value), key


def test_every_public_function_is_called_here() -> None:
    """A function that is added has to be added above."""
    named = {name.partition(",")[0] for name in CALLS} | {
        "plan_shards",
        "prune_shards",
    }  # tests/test_shards*.py: they work on files
    functions = {n for n in stp_fx.__all__ if inspect.isfunction(getattr(stp_fx, n))}
    assert functions <= named, functions - named


# -- threads -----------------------------------------------------------------------------------------------------------


def _together(calls: list[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def run(k: int, call: Callable[[], Any]) -> None:
        barrier.wait()
        try:
            results[k] = call()
        except BaseException as error:  # handed to the test's own thread
            results[k] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in results:
        if isinstance(each, BaseException):
            raise each
    return results


def _same_graph(first: fx.GraphModule, second: fx.GraphModule) -> None:
    assert first.code == second.code
    assert stp_fx.plan_of(first) == stp_fx.plan_of(second)
    theirs = second.state_dict()
    for name, value in first.state_dict().items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("shared", [True, False], ids=["one graph", "own graphs"])
def test_threads_give_what_one_gives(shared: bool, setting: Setting) -> None:
    requests: list[dict[str, Any]] = [
        {"criterion": "variance", "ratio": 0.5, "calibration": setting.batches, "compensation": "least_squares"},
        {"criterion": "taylor", "ratio": 0.25, "calibration": setting.batches},
        {"criterion": "magnitude", "ratio": 0.5, "scope": "global", "target": "macs"},
        {"criterion": "reconstruction", "ratio": 0.4, "calibration": setting.batches, "recalibrate": True},
    ]
    alone = [stp_fx.prune_graph(setting.gm, **request) for request in requests]
    before = snapshot(*_held(setting))

    def call(request: dict[str, Any]) -> fx.GraphModule:
        gm = setting.gm if shared else stp_fx.trace(setting.model, setting.x)
        return stp_fx.prune_graph(gm, **request)

    for _ in range(3):
        together = _together([lambda request=request: call(request) for request in requests])
        for first, second in zip(alone, together, strict=True):
            _same_graph(first, second)
    assert_untouched(before)


def test_many_prunes_leave_no_memory_behind() -> None:
    import gc
    import weakref

    gm = stp_fx.trace(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)), torch.randn(2, 32))
    batches = [torch.randn(4, 32)]
    found = []
    for _ in range(20):
        pruned = stp_fx.prune_graph(gm, "variance", 0.5, calibration=batches, compensation="mean")
        stp_fx.compare(gm, pruned)
        found.append(weakref.ref(pruned))
        del pruned
    gc.collect()
    assert sum(each() is not None for each in found) == 0
