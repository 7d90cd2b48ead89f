"""Accuracy right after one-shot pruning, without labels.

    python benchmarks/retention.py [--networks resnet,mobilenet,vit] [--targets 0.3,0.5,0.7] [--criteria reconstruction]
        [--scopes isomorphic,optimal] [--repairs "least squares,sequential"] [--out benchmarks/results/retention]

Networks trained on Fashion-MNIST (``_fashion.py``), pruned to 70, 50 and 30 % of their MACs by several criteria, each with
every repair, on the same calibration images. Methods are compared on 10,000 *training* images that are not among these; the
best one of each kind of repair is then tried on the 10,000 test images. torch-pruning 1.6.1 prunes the same checkpoints to the
same MACs or just above, by magnitude and by Taylor scores, as it comes, with its BatchNorms recalibrated by a plain loop, and
with our sequential repair of what it has chosen. Repairs by training (``benchmarks/repair.py`` has their seconds) read the same
images, without labels.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import RESULTS, machine, markdown_machine, markdown_table, wide_console, write
from _fashion import Fashion, load
from _opponent import has_batchnorm, plan_of_slices, prune_once, ratio_for, recalibrated
from rich.table import Table
from torch import Tensor, fx, nn

import stp_fx
from stp_fx.passes import (
    Artifacts,
    CollectGradients,
    CollectStatistics,
    CompensateLeastSquares,
    CompensateMean,
    Distill,
    GraphPass,
    MeasureDamage,
    Pipeline,
    RecalibrateBatchNorm,
    ReconstructBlockwise,
    ReconstructSequentially,
    RemoveChannels,
    RotateResidual,
    ScoreUnits,
    SelectUnits,
)

ROTATED = ("vit",)
"""Networks with a residual stream that can be rotated: by ``basis="rotate"`` as well."""
CALIBRATION = 2048
HELD_OUT = 10_000
Batches = list[tuple[Tensor, Tensor]]
Accuracy = dict[str, float]
"""On held-out training images and, of what is best on these, on test images: "chosen on" and "test"."""


@dataclasses.dataclass(frozen=True)
class Repair:
    """``make`` gives the pass for the original graph; ``after`` names the repair that it follows; ``recalibrate``: BatchNorm."""

    make: Callable[[fx.GraphModule], GraphPass] | None = None
    recalibrate: bool = False
    after: str = ""


def repairs_of(batches: Batches, small: Batches) -> dict[str, Repair]:
    """By name. Those that train read ``small`` batches."""
    return {
        "none": Repair(),
        "none + BN": Repair(recalibrate=True),
        "mean": Repair(lambda _: CompensateMean()),
        "mean + BN": Repair(lambda _: CompensateMean(), True),
        "least squares": Repair(lambda _: CompensateLeastSquares()),
        "least squares + BN": Repair(lambda _: CompensateLeastSquares(), True),
        "sequential": Repair(lambda _: ReconstructSequentially(batches)),
        "blockwise": Repair(lambda _: ReconstructBlockwise(small)),
        "distillation": Repair(lambda _: Distill(small)),
        "blockwise then distillation": Repair(lambda gm: Distill(small, steps=300, start=None, original=gm), after="blockwise"),
    }


class Tried:
    """Accuracies of networks on held-out images, and the best network of each kind, which :meth:`finish` tests."""

    def __init__(self, data: Fashion) -> None:
        self._data, self._best = data, dict[str, tuple[str, nn.Module]]()
        self.found: dict[str, Accuracy] = {}

    def add(self, kind: str, name: str, model: nn.Module) -> None:
        accuracy = self._data.accuracy(model, self._data.held_out(HELD_OUT, CALIBRATION))
        self.found[name] = {"chosen on": accuracy}
        if kind not in self._best or accuracy > self.found[self._best[kind][0]]["chosen on"]:
            self._best[kind] = name, model

    def finish(self) -> dict[str, Accuracy]:
        for name, model in self._best.values():
            self.found[name]["test"] = self._data.accuracy(model)
        return self.found


class Basis:
    """A network in one basis. Its measurements, and the scores and damages of its groups, serve every target."""

    def __init__(self, name: str, gm: fx.GraphModule, data: Fashion, options: argparse.Namespace) -> None:
        self._name, self._gm, self._options = name, gm, options
        self._batches, self._small = data.calibration(CALIBRATION), data.calibration(CALIBRATION, 64)
        collect: list[GraphPass] = [CollectStatistics(self._batches, covariance=True, maps=True, patches=1200)]
        if "taylor" in options.criteria:
            collect.append(CollectGradients(self._batches))
        measured = Pipeline(*collect)(gm).artifacts
        self._scored = {each: ScoreUnits(each)(gm, measured).artifacts for each in options.criteria.split(",")}
        self._damages: dict[str, Artifacts] = {}

    def _selected(self, criterion: str, scope: str, target: float) -> Artifacts:
        scored = self._scored[criterion]
        if scope != "optimal":
            return SelectUnits(target, target="macs", scope=scope)(self._gm, scored).artifacts
        if criterion not in self._damages:
            self._damages[criterion] = MeasureDamage(self._batches)(self._gm, scored).artifacts
        return SelectUnits(target, target="macs", allocation="optimal")(self._gm, self._damages[criterion]).artifacts

    def try_all(self, target: float, tried: Tried) -> None:
        for criterion in self._scored:
            for scope in self._options.scopes.split(","):
                selected = self._selected(criterion, scope, target)
                for name, pruned in self._repaired(selected):
                    tried.add(f"{self._name}{name}", f"{self._name}{criterion}, {scope}, {name}", pruned)

    def _repaired(self, selected: Artifacts) -> Iterator[tuple[str, fx.GraphModule]]:
        """The smaller networks, by the name of the repair."""
        wanted, done = self._options.repairs.split(","), dict[str, fx.GraphModule]()
        for name, repair in repairs_of(self._batches, self._small).items():
            if name.removesuffix(" + BN") not in wanted or (repair.recalibrate and not has_batchnorm(self._gm)):
                continue
            before = done[repair.after] if repair.after else self._gm
            carried = selected.carried_to(before) if repair.after else selected
            done[name] = before if repair.make is None else repair.make(self._gm)(before, carried).graph_module
            pruned = RemoveChannels(selected.plan)(done[name]).graph_module
            if repair.recalibrate:
                pruned = RecalibrateBatchNorm(self._batches)(pruned).graph_module
            yield name, pruned


def bases_of(name: str, model: nn.Module, data: Fashion, options: argparse.Namespace) -> list[Basis]:
    gm = stp_fx.trace(model, data.test_x[:1])
    found = [Basis("", gm, data, options)]
    if name in ROTATED:
        rotated = RotateResidual(data.calibration(CALIBRATION))(gm).graph_module
        found.append(Basis("rotated, ", rotated, data, options))
    return found


def ours(bases: list[Basis], data: Fashion, target: float) -> dict[str, Accuracy]:
    """Accuracy by "criterion, scope, repair"."""
    tried = Tried(data)
    for basis in bases:
        basis.try_all(target, tried)
    return tried.finish()


def peer(model: nn.Module, data: Fashion, target: float) -> dict[str, Accuracy]:
    """The same for torch-pruning, whose ratio is raised until its MACs are at most those asked for."""
    import torch_pruning as tp

    batches, example = data.calibration(CALIBRATION), data.test_x[:1]
    gradients, gm = _gradients(model, batches), stp_fx.trace(model, example)
    scores = {"magnitude": tp.importance.GroupMagnitudeImportance(p=2), "taylor": tp.importance.GroupTaylorImportance()}
    tried = Tried(data)
    for criterion, importance in scores.items():
        for scope in ("local", "global"):
            options = {"importance": importance, "global_pruning": scope == "global"}
            prune = functools.partial(prune_once, gradients=gradients, **options)
            ratio = ratio_for(model, example, target, lambda copied, ratio, prune=prune: prune(copied, example, ratio))
            if ratio is None:
                continue
            pruned = copy.deepcopy(model)
            prune(pruned, example, ratio)
            tried.add("as it comes", f"{criterion}, {scope}", pruned)
            if has_batchnorm(pruned):
                tried.add("+ BN", f"{criterion}, {scope}, + BN", recalibrated(pruned, batches))
            plan = plan_of_slices(gm, model, pruned)
            if plan is not None:
                repaired = Pipeline(ReconstructSequentially(batches, plan=plan), RemoveChannels(plan))(gm).graph_module
                tried.add("+ ours", f"{criterion}, {scope}, + our sequential repair", repaired)
    return tried.finish()


def _gradients(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The data of its Taylor scores: the mean gradient of the loss over the calibration images."""
    model = copy.deepcopy(model)
    for x, y in batches:
        (F.cross_entropy(model(x), y) / len(batches)).backward()
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}


def best(found: dict[str, Accuracy], without: str = "?") -> tuple[str, float]:
    """The method that is best on held-out training images, and its accuracy on the test images."""
    methods = {name: each for name, each in found.items() if without not in name}
    name = max(methods, key=lambda each: methods[each]["chosen on"])
    return name, methods[name]["test"]


def _cell(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "-"
    return f"{accuracy['chosen on']:.2%}" + (f" / **{accuracy['test']:.2%}**" if "test" in accuracy else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="resnet,mobilenet,vit")
    parser.add_argument("--targets", default="0.3,0.5,0.7", help="fractions of the MACs to remove")
    parser.add_argument("--criteria", default="reconstruction", help="also: magnitude, variance, taylor")
    parser.add_argument("--scopes", default="isomorphic,optimal", help='of selection, or "optimal" allocation')
    parser.add_argument(
        "--repairs", default="least squares,sequential,blockwise,blockwise then distillation", help="see repairs_of"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "retention")
    parser.add_argument("--resume", action="store_true", help="keep the cells that the result file has")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, console = Fashion(), wide_console()
    kept = arguments.out.with_suffix(".json")
    results: dict[str, Any] = json.loads(kept.read_text())["results"] if arguments.resume and kept.exists() else {}
    for name in arguments.networks.split(","):
        model = load(name)
        whole, bases = data.accuracy(model), None
        for target in map(float, arguments.targets.split(",")):
            if f"{name} {target:g}" in results:
                continue
            bases = bases or bases_of(name, model, data, arguments)
            mine, theirs = ours(bases, data, target), peer(model, data, target)
            results[f"{name} {target:g}"] = {"unpruned": whole, "ours": mine, "peer": theirs}
            (how, top), (their_how, their_top) = best(mine), best(theirs)
            report(arguments.out, results)
            console.print(
                f"{name} {target:.0%}: {whole:.2%} unpruned; ours {top:.2%} ({how}), kept {top / whole:.1%}; "
                f"torch-pruning {their_top:.2%} ({their_how})"
            )
    console.print(report(arguments.out, results))


def report(out: Path, results: dict[str, Any]) -> Table:
    """Written after every cell; gives the summary as a table."""
    summary = []
    for cell, found in results.items():
        (how, top), (their_how, their_top) = best(found["ours"]), best(found["peer"], without="our sequential")
        repaired = {name: each for name, each in found["peer"].items() if "our sequential" in name}
        row = [cell, f"{found['unpruned']:.2%}", f"{top:.2%}", f"{top / found['unpruned']:.1%}", how]
        summary.append([*row, f"{their_top:.2%}", their_how, f"{best(repaired)[1]:.2%}" if repaired else "-"])
    header = (
        "network, MACs removed",
        "unpruned",
        "ours",
        "kept",
        "how",
        "torch-pruning",
        "how",
        "and with our sequential repair",
    )
    table = Table(*header, title="best right after pruning")
    for row in summary:
        table.add_row(*row)
    cells = list(results)
    columns = {cell: {**{f"stp_fx: {k}": v for k, v in results[cell]["ours"].items()},
                      **{f"torch-pruning: {k}": v for k, v in results[cell]["peer"].items()}} for cell in cells}  # fmt: skip
    methods = list(dict.fromkeys(method for column in columns.values() for method in column))
    grid = [[m, *(_cell(columns[c].get(m)) for c in cells)] for m in methods]
    text = f"""# Retention: accuracy right after one-shot pruning

{markdown_machine(machine())}

Fashion-MNIST, 10,000 test images, no labels; {CALIBRATION} training images for calibration, on which the repairs "blockwise" and
"distillation" train towards the original network, {HELD_OUT} others on which the best
method of a cell is chosen. Columns: network, and the fraction of its MACs that is removed. BN: with BatchNorm recalibrated.

{markdown_table(header, summary)}

## Every method

On held-out training images; of the best of each kind also / **on test images**.

{markdown_table(("method", *cells), grid)}
"""
    write(out, text, {"machine": machine(), "results": results})
    return table


if __name__ == "__main__":
    main()
