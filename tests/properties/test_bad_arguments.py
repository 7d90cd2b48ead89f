"""Wrong arguments of every public call: an error of stp_fx's own, or a result; never another exception.

One argument at a time is replaced by values of the wrong type, size or state. ``TypeError`` is for Python's own complaint about
arguments that are missing or unknown. After each call the graph is as it was.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

import stp_fx
from stp_fx import criteria, passes, regularizers, schedules
from stp_fx.errors import FileError, PlanError, StpFxError
from stp_fx.ir.unchanged import Unchanged
from stp_fx.selection.selection import Selection

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = [(X, torch.tensor([0, 1, 2, 3]))]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip


GM = stp_fx.trace(network(), X)
PRUNED = stp_fx.prune_graph(GM)
PLAN = stp_fx.plan_of(PRUNED)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some wrong values are names of files that can be written."""
    monkeypatch.chdir(tmp_path)


class Hostile:
    """Fails at whatever it is asked for."""

    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError("no iteration")

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no call")

    def __float__(self) -> float:
        raise RuntimeError("no number")

    def __fspath__(self) -> str:
        raise RuntimeError("no path")


def itself() -> list[Any]:
    result: list[Any] = []
    result.append(result)
    return result


def deep(depth: int = 5000) -> list[Any]:
    result: list[Any] = []
    for _ in range(depth):
        result = [result]
    return result


VALUES: dict[str, Callable[[Path], Any]] = {
    "none": lambda _: None,
    "true": lambda _: True,
    "zero": lambda _: 0,
    "five": lambda _: 5,
    "negative": lambda _: -1,
    "half": lambda _: 0.5,
    "huge": lambda _: 10**30,
    "minus huge": lambda _: -(10**30),
    "large float": lambda _: 1e300,
    "nan": lambda _: math.nan,
    "infinity": lambda _: math.inf,
    "complex": lambda _: 1j,
    "numpy": lambda _: np.float64("nan"),
    "empty text": lambda _: "",
    "text": lambda _: "1",
    "nul": lambda _: "a\0b",
    "surrogate": lambda _: "a\ud800",
    "glob": lambda _: "[",
    "long text": lambda _: "x" * 5000,
    "bytes": lambda _: b"\xff\x00",
    "empty list": lambda _: [],
    "list of none": lambda _: [None],
    "list of texts": lambda _: ["a", "b"],
    "list of numbers": lambda _: [3, -1],
    "tuple": lambda _: (),
    "dict": lambda _: {},
    "dict of objects": lambda _: {"0": object()},
    "dict of numbers": lambda _: {0: 0},
    "dict of nan": lambda _: {"0.weight": math.nan},
    "set": lambda _: {5},
    "class": lambda _: nn.Linear,
    "module": lambda _: nn.Linear(2, 2),
    "lazy module": lambda _: nn.LazyLinear(2),
    "graph": lambda _: GM,
    "bare graph": lambda _: fx.symbolic_trace(nn.Linear(2, 2)),
    "plan": lambda _: PLAN,
    "selection": lambda _: Selection(),
    "tensor": lambda _: torch.tensor(1.0),
    "empty tensor": lambda _: torch.empty(0),
    "integers": lambda _: torch.tensor([[1, 2]]),
    "batch": lambda _: X,
    "array": lambda _: np.array([1.5, math.nan]),
    "array of objects": lambda _: np.array([None, {}], dtype=object),
    "function": lambda _: lambda *_: "nothing",
    "empty iterator": lambda _: iter(()),
    "generator that fails": lambda _: (1 // 0 for _ in range(1)),
    "object": lambda _: object(),
    "hostile": lambda _: Hostile(),
    "itself": lambda _: itself(),
    "deep": lambda _: deep(),
    "closed file": lambda folder: _closed(folder),
    "directory": lambda folder: folder,
    "no file": lambda folder: folder / "none" / "nowhere",
    "empty file": lambda folder: _file(folder, b""),
    "junk file": lambda folder: _file(folder, b"\x08\0\0\0\0\0\0\0{}      junk"),
    "device": lambda _: "/dev/zero",
}


def _file(folder: Path, content: bytes) -> Path:
    path = folder / "file.dot"
    path.write_bytes(content)
    return path


def _closed(folder: Path) -> Any:
    with open(folder / "closed", "wb") as file:
        return file


@dataclasses.dataclass(frozen=True)
class Call:
    """A public function, arguments with which it works, and those that are replaced (all, if none is named)."""

    function: Callable[..., Any]
    arguments: Callable[[Path], dict[str, Any]]
    without: tuple[str, ...] = ()


SELECTION = {"ratio": 0.5, "scope": "local", "target": "channels", "ratios": {}, "ignore": (), "round_to": 1, "max_ratio": 1.0}
SELECTION |= {"products": "auto"}
EXAMPLE = {"example_inputs": X, "kwargs": None, "frontend": "fx", "validate": False}


def _saved(folder: Path) -> Path:
    stp_fx.save(PRUNED, folder / "net.stp")
    return folder / "net.stp"


def _shards(folder: Path) -> dict[str, Any]:
    from safetensors.torch import save_file

    path = folder / "whole.safetensors"
    save_file(GM.state_dict(), path)
    return {"gm": GM, "plan": PLAN, "source": path, "target": folder / "cut", "max_shard_bytes": 1000}


def _manager(**changes: Any) -> Any:
    return stp_fx.PATPassManager(copy.deepcopy(GM), **{"ratio": 0.5, "steps": 2, "validate": False, **changes})


def _manager_arguments(_: Path) -> dict[str, Any]:
    return {
        "gm": copy.deepcopy(GM), "criterion": "magnitude", "steps": 2, "start_epoch": 0, "end_epoch": None, "epoch_rate": 1,
        "schedule": "geometric", "mask_until_last": True, "regrow": False, "regularizer": None, "compensation": None,
        "recalibrate": None, "train_loader": None, "optimizer": None, "loss": None, "calibration_batches": None, "followers": (),
        "wrap": None, "example_inputs": None, "validate": False, **SELECTION,
    }  # fmt: skip


def _trained(**arguments: Any) -> Any:
    """A manager that is also used: some arguments are first read at a step."""
    arguments["gm"] = copy.deepcopy(GM) if arguments["gm"] is GM else arguments["gm"]  # it is changed in place
    manager = stp_fx.PATPassManager(**arguments)
    manager.loss(), manager.regularize(), manager.prune(0)
    return manager


def _shipped(folder: Path) -> dict[str, Any]:
    return {"pruned": PRUNED, "model": network(), "example_inputs": X, "kwargs": None, "strict_config": True}


CALLS: dict[str, Call] = {
    "trace": Call(stp_fx.trace, lambda _: {"model": network(), **EXAMPLE}),
    "prune_graph": Call(
        stp_fx.prune_graph,
        lambda _: {
            "gm": GM,
            "criterion": "magnitude",
            "calibration": None,
            "compensation": None,
            "recalibrate": None,
            "loss": None,
            "seed": 0,
            **EXAMPLE,
            "example_inputs": None,
            **SELECTION,
        },
    ),
    "prune_graph with data": Call(
        stp_fx.prune_graph,
        lambda _: {
            "gm": GM,
            "criterion": "taylor",
            "calibration": BATCHES,
            "compensation": "mean",
            "recalibrate": 1,
            "loss": None,
            "validate": False,
        },
        ("gm",),
    ),
    "Selection": Call(Selection, lambda _: dict(SELECTION)),
    "analyze": Call(stp_fx.analyze, lambda _: {"gm": GM}),
    "cost": Call(stp_fx.cost, lambda _: {"gm": GM}),
    "explain": Call(stp_fx.analyze(GM).explain, lambda _: {"name": "0.weight:0", "index": 0}),
    "draw": Call(stp_fx.analyze(GM).draw, lambda folder: {"path": folder / "graph.dot", "view": "dependency", "fold": None}),
    "plan_for": Call(stp_fx.analyze(GM).plan_for, lambda _: {"removed": {"0": [0, 3]}}),
    "survivors": Call(stp_fx.analyze(GM).survivors, lambda _: {"plan": PLAN}),
    "compare": Call(stp_fx.compare, lambda _: {"before": GM, "after": PRUNED, "latency": False}),
    "plan_of": Call(stp_fx.plan_of, lambda _: {"pruned": PRUNED}),
    "report_of": Call(stp_fx.report_of, lambda _: {"pruned": PRUNED}),
    "apply_plan": Call(stp_fx.apply_plan, lambda _: {"gm": GM, "plan": PLAN, "mask": False, "validate": False}),
    "PrunePlan": Call(stp_fx.PrunePlan, lambda _: {"kept": {("a", 0): [0]}, "sizes": {("a", 0): 2}}),
    "PrunePlan entries": Call(
        lambda kept, size, name, dim: stp_fx.PrunePlan({(name, dim): kept}, {(name, dim): size}),
        lambda _: {"kept": [0], "size": 2, "name": "a", "dim": 0},
        ("name", "dim"),  # keys: Python itself refuses what cannot be hashed
    ),
    "from_json": Call(stp_fx.PrunePlan.from_json, lambda _: {"text": PLAN.to_json(), "axes": dict(PLAN.sizes)}),
    "then": Call(PLAN.then, lambda _: {"second": stp_fx.PrunePlan({}, {})}),
    "after": Call(PLAN.after, lambda _: {"first": stp_fx.PrunePlan({}, {})}),
    "save": Call(stp_fx.save, lambda folder: {"pruned": PRUNED, "path": folder / "net.stp"}),
    "load": Call(stp_fx.load, lambda folder: {"path": _saved(folder), "model": network()}),
    "prune_shards": Call(stp_fx.prune_shards, _shards),
    "prune_shards with data": Call(
        stp_fx.prune_shards,
        lambda folder: {**_shards(folder), "compensation": "sequential", "calibration": BATCHES, "memory": None, "device": "cpu"},
        ("compensation", "calibration", "memory", "device"),
    ),
    "plan_shards": Call(
        stp_fx.plan_shards,
        lambda folder: {
            "gm": GM,
            "source": _shards(folder)["source"],
            "criterion": "variance",
            "ratio": 0.5,
            "calibration": BATCHES,
            "seed": 0,
            "device": "cpu",
        },
    ),
    "prune_submodule": Call(
        stp_fx.prune_submodule,
        lambda _: {
            "model": nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))),  # traced at each call
            "name": "0",
            "example_inputs": X,
            "criterion": "magnitude",
            "kwargs": None,
            "calibration": None,
            "validate": False,
            **SELECTION,
        },
    ),
    "write_back": Call(stp_fx.write_back, _shipped),
    "sweep": Call(
        stp_fx.sweep,
        lambda _: {
            "gm": GM,
            "ratios": [0.5],
            "criterion": "magnitude",
            "calibration": None,
            "loss": None,
            "seed": 0,
            **{k: v for k, v in SELECTION.items() if k not in ("ratio", "ratios")},
        },
    ),
    "sensitivity": Call(
        stp_fx.sensitivity,
        lambda _: {"gm": GM, "data": BATCHES, "loss": None, "ratios": (0.5,), "criterion": "magnitude", "ignore": ()},
    ),
    "estimate_keep_ratio": Call(
        stp_fx.estimate_keep_ratio, lambda _: {"gm": GM, "mac_target": 0.5, "ignore": (), "products": "auto"}
    ),
    "PATPassManager": Call(_trained, _manager_arguments, tuple(SELECTION)),  # as for Selection
    "PAT.prune": Call(lambda epoch: _manager().prune(epoch), lambda _: {"epoch": 0}),
    "PAT.connect": Call(lambda optimizer: _manager(optimizer=()).connect(optimizer), lambda _: {"optimizer": ()}),
    "PAT.load_state_dict": Call(lambda state: _manager().load_state_dict(state), lambda _: {"state": _manager().state_dict()}),
    "Distillation": Call(
        lambda **given: stp_fx.Distillation(**given)(given["student"](X), X),
        lambda _: {
            "teacher": GM,
            "student": copy.deepcopy(PRUNED),
            "loss": "kl",
            "temperature": 2.0,
            "class_dim": None,
            "features": ["2"],
            "weight": 1.0,
            "feature_weight": 1.0,
            "output": None,
        },
    ),
    "Distillation call": Call(stp_fx.Distillation(GM), lambda _: {"outputs": torch.zeros(4, 4), "inputs": X, "where": None}),
    "mean_check": Call(passes.mean_check, lambda _: {"before": GM, "after": PRUNED, "calibration": BATCHES}),
    "score": Call(criteria.score, lambda _: {"gm": GM, "criterion": "magnitude", "measured": None, "ignore": (), "seed": 0}),
    "criteria.resolve": Call(criteria.resolve, lambda _: {"criterion": "magnitude"}),
    "regularizers.resolve": Call(regularizers.resolve, lambda _: {"regularizer": "group_lasso"}),
    "schedules.resolve": Call(schedules.resolve, lambda _: {"schedule": "linear"}),
    "schedules.ratios": Call(schedules.resolve("linear").ratios, lambda _: {"ratio": 0.5, "steps": 3}),
    "schedules.plot": Call(schedules.resolve("linear").plot, lambda folder: {"path": folder / "a.png", "ratio": 0.5, "steps": 3}),
    "Then": Call(
        lambda **arguments: schedules.Then(**arguments).ratios(0.5, 4),
        lambda _: {"first": "linear", "second": "cubic", "at": 0.5, "share": 0.5},
    ),
    "Custom": Call(
        lambda function: schedules.Custom(function).ratios(0.5, 4), lambda _: {"function": lambda step, steps, ratio: ratio}
    ),
    "Pipeline": Call(lambda member: passes.Pipeline(member)(GM), lambda _: {"member": passes.ScoreUnits()}),
    "Pipeline.parse": Call(passes.Pipeline.parse, lambda _: {"text": "Pipeline(ScoreUnits('lamp'))"}),
}


def _pass(make: type[Any], *before: Any, **arguments: Any) -> Call:
    def run(**given: Any) -> Any:
        made = passes.Pipeline(*before)(GM)
        return make(**given)(made.graph_module, made.artifacts)

    return Call(run, lambda _: dict(arguments))


def _criterion(make: Callable[..., Any], **arguments: Any) -> Call:
    def run(**given: Any) -> Any:
        return stp_fx.prune_graph(GM, make(**given), calibration=BATCHES, validate=False)

    return Call(run, lambda _: dict(arguments))


def _only_norms(criterion: Any) -> Any:
    """The criterion for groups with a norm; 1 for others."""
    return lambda group, context: criterion(group, context) if group.name.startswith("0.") else torch.ones(group.size)


STATISTICS = passes.CollectStatistics(BATCHES, covariance=True)
SHARED = {"reduction": "mean", "normalizer": "none"}
CALLS |= {
    "CollectStatistics": _pass(passes.CollectStatistics, calibration=BATCHES, covariance=False, maps=False, patches=0),
    "CollectGradients": _pass(passes.CollectGradients, calibration=BATCHES, loss=None, fisher=False, hutchinson=0),
    "ScoreUnits": _pass(passes.ScoreUnits, criterion="magnitude", ignore=(), seed=0),
    "SelectUnits": _pass(passes.SelectUnits, passes.ScoreUnits(), **SELECTION, whole=None, cost=None),
    "MaskChannels": _pass(passes.MaskChannels, plan=PLAN),
    "RemoveChannels": _pass(passes.RemoveChannels, plan=PLAN, validate=False),
    "CompensateMean": _pass(passes.CompensateMean, STATISTICS, plan=PLAN, statistics=None),
    "CompensateLeastSquares": _pass(passes.CompensateLeastSquares, STATISTICS, plan=PLAN, statistics=None, ridge=1e-4),
    "UpdateBatchNormVariance": _pass(passes.UpdateBatchNormVariance, STATISTICS, plan=PLAN, statistics=None, floor=1e-3),
    "RecalibrateBatchNorm": _pass(passes.RecalibrateBatchNorm, calibration=BATCHES, limit=None),
    "Magnitude": _criterion(criteria.Magnitude, p=2.0, **SHARED),
    "lamp": _criterion(criteria.lamp, p=2.0, reduction="mean"),
    "Fpgm": _criterion(criteria.Fpgm, **SHARED),
    "BnScale": _criterion(lambda **given: _only_norms(criteria.BnScale(**given)), **SHARED),
    "Hessian": _criterion(criteria.Hessian, method="fisher", **SHARED),
    "Random": _criterion(criteria.Random, seed=0, **SHARED),
    "Reconstruction": _criterion(criteria.Reconstruction, ridge=1e-4, reduction="sum", normalizer="none"),
    "Taylor": _criterion(criteria.Taylor, form="multivariate", **SHARED),
    "Variance": _criterion(criteria.Variance, **SHARED),
    "CostAware": _criterion(
        criteria.CostAware, base="magnitude", alpha=0.5, beta=1.0, mode="additive", form="costly_first", cost=criteria.Macs(),
        per="unit", reduction=None, normalizer="max",
    ),
    "Latency": _criterion(lambda runs: criteria.CostAware(cost=criteria.Latency(runs)), runs=1),
    "Table": _criterion(lambda costs: criteria.CostAware(cost=criteria.Table(costs)), costs={"0": 1.0, "3": 1.0}),
}  # fmt: skip


def _regularizer(make: Callable[..., Any], **arguments: Any) -> Call:
    def run(**given: Any) -> Any:
        gm = copy.deepcopy(GM)
        optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
        manager = stp_fx.PATPassManager(
            gm, steps=2, validate=False, regularizer=make(**given), start_epoch=1, optimizer=optimizer
        )
        (manager.model(X).sum() + manager.loss()).backward()
        manager.regularize(), optimizer.step()

    return Call(run, lambda _: dict(arguments))


CALLS |= {
    "GMP": _regularizer(regularizers.GMP, final=0.5, steps=3, every=1),
    "GrowingReg": _regularizer(regularizers.GrowingReg, step=1e-4, ratio=0.5, every=1, ceiling=1.0, criterion="magnitude"),
    "BNScaleL1": _regularizer(regularizers.BNScaleL1, strength=1e-4),
    "GroupLasso": _regularizer(regularizers.GroupLasso, strength=1e-4),
    "WeightL21": _regularizer(regularizers.WeightL21, strength=1e-4),
    "VarianceEntropy": _regularizer(regularizers.VarianceEntropy, strength=1e-3),
}


def _arguments(call: Call, folder: Path) -> list[str]:
    return [name for name in call.arguments(folder) if name not in call.without]


@pytest.mark.parametrize("name", CALLS)
def test_only_errors_of_our_own(name: str, tmp_path: Path) -> None:
    call, before = CALLS[name], [(gm, Unchanged(gm)) for gm in (GM, PRUNED)]
    folders = (tmp_path / str(k) for k in itertools.count())
    foreign: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = next(folders)
        folder.mkdir()
        call.function(**call.arguments(folder))
        for argument in _arguments(call, folder):
            for label, value in VALUES.items():
                folder = next(folders)
                folder.mkdir()
                given = {**call.arguments(folder), argument: value(folder)}
                try:
                    call.function(**given)
                except StpFxError:
                    pass
                except BaseException as error:
                    foreign.append(f"{name}({argument}={label}): {type(error).__name__}: {str(error)[:100]}")
                changed = [record.difference() for _, record in before if record.difference() is not None]
                assert not changed, (argument, label, changed)
    assert not foreign, "\n".join(foreign)


NEVER: tuple[Any, ...] = ("x", b"x", math.nan, 0.5, object(), [None], nn.Linear, torch.ones(2), {"a": 1})
"""No flag, number, seed, name of a front end or loss (a class can be called)."""


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        *(("prune_graph", argument) for argument in ("loss", "seed", "frontend", "recalibrate")),
        *(("sweep", argument) for argument in ("loss", "seed")),
        *(("PATPassManager", argument) for argument in ("loss", "calibration_batches", "mask_until_last", "recalibrate")),
        ("PATPassManager", "regrow"),
        ("write_back", "strict_config"), ("score", "seed"), ("ScoreUnits", "seed"), ("apply_plan", "mask"), ("explain", "index"),
    ],
)  # fmt: skip
def test_arguments_that_this_call_does_not_need_are_checked_as_well(name: str, argument: str, tmp_path: Path) -> None:
    call = CALLS[name]
    for value in NEVER:
        if argument == "loss" and callable(value):
            continue
        with pytest.raises(StpFxError):
            call.function(**{**call.arguments(tmp_path), argument: value})


def _mutated(data: bytes, draw: random.Random) -> bytes:
    """Bytes changed, cut out, doubled, or replaced by what means something in JSON."""
    result, parts = (
        bytearray(data),
        (b"[", b"]", b"{", b"-1", b"1e999", b"9" * 30, b'"', b",", b"null", b"\xff", b"\0", b"NaN", b"\\u0000"),
    )
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(result) or 1)
        end = min(at + draw.choice((0, 1, 1, 8, 64)), len(result))
        result[at:end] = draw.choice((draw.choice(parts), bytes(result[at:end]) * 2, b"", draw.randbytes(1)))
    return bytes(result)


def test_plans_that_are_changed() -> None:
    draw, text = random.Random(0), PLAN.to_json().encode()
    refused = 0
    for _ in range(2000):
        try:
            plan = stp_fx.PrunePlan.from_json(_mutated(text, draw))
        except PlanError:
            refused += 1
            continue
        try:
            stp_fx.analyze(GM).survivors(plan)
        except PlanError:
            refused += 1
    assert refused > 1000


def test_shards_that_are_changed(tmp_path: Path) -> None:
    draw, given = random.Random(0), _shards(tmp_path)
    whole, index = tmp_path / "whole.safetensors", tmp_path / "model.safetensors.index.json"
    originals = {
        whole: whole.read_bytes(),
        index: json.dumps({"weight_map": dict.fromkeys(GM.state_dict(), whole.name)}).encode(),
    }
    for number in range(200):
        spoiled = draw.choice((whole, index))
        for path, data in originals.items():
            path.write_bytes(_mutated(data, draw) if path is spoiled else data)
        target = tmp_path / f"cut-{number}"
        try:
            stp_fx.prune_shards(**{**given, "source": tmp_path, "target": target})
        except FileError:
            assert not target.exists()
        leftovers = {path.name for path in tmp_path.iterdir() if not path.name.startswith("cut-")} - {whole.name, index.name}
        assert not leftovers
