"""Pruning-aware training against one-shot pruning, torch-pruning and training from scratch, at equal training budget.

    python benchmarks/pat.py digits             # the full grid on scikit-learn's digits: 3 networks, 2 targets, 5 seeds
    python benchmarks/pat.py fashion            # the cells that matter on Fashion-MNIST, from benchmarks/checkpoints
    python benchmarks/pat.py fashion-long       # its ResNet at half of the MACs, three times as many epochs
    python benchmarks/pat.py digits --report    # only the tables anew

Every method starts from the same trained network and trains it for the same number of epochs with the same optimizer and
learning rates; "from scratch" trains the pruned architecture from random weights for as long as both trainings together.
Every run is a line of benchmarks/results/pat-GRID.jsonl (seed, accuracy after every epoch, MACs, seconds); runs that are
there are not run again, so a benchmark that was stopped goes on. ``--shard 0/2`` takes every second run.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from _common import RESULTS, machine, markdown_machine, markdown_table, wide_console, write
from _fashion import NETWORKS, Digits, Fashion, Images, MobileNet, Recipe, ResNet, ViT, fit, load
from _opponent import has_batchnorm, prune_once, pruner_of, ratio_for, recalibrated, step
from torch import Tensor, fx, nn

import stp_fx
from stp_fx import regularizers

TARGETS = (0.5, 0.75)  # fractions of the MACs that go
UNPRUNED = "unpruned, trained as long"
OPPONENTS = ("torch-pruning magnitude", "torch-pruning group norm")


@dataclasses.dataclass(frozen=True)
class Method:
    """One of ours. ``steps`` at epochs ``start``, ``start + rate``, ...; all with least squares and BN recalibrated."""

    criterion: str
    steps: int = 1
    start: int = 0
    rate: int = 1
    schedule: str = "geometric"
    regularizer: Callable[[], Any] | None = None
    distillation: float = 0.0
    """Share of the loss that is the distance to what the unpruned network says (temperature 2)."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """The runs: networks by name, and how each is trained after it was pruned (``epochs``, peak ``lr``)."""

    data: Callable[[], Images]
    networks: dict[str, Recipe]
    trained: Callable[[str, int, Images], nn.Module]
    epochs: int
    batch: int
    lr: dict[str, float]
    seeds: tuple[int, ...]
    calibration: int
    methods: dict[str, Method]
    opponents: tuple[str, ...] = OPPONENTS
    targets: tuple[float, ...] = TARGETS
    from_scratch: bool = True

    @property
    def all_methods(self) -> tuple[str, ...]:
        return (UNPRUNED, *self.methods, *self.opponents, *(["from scratch"] if self.from_scratch else []))


def _trained_on_digits(name: str, seed: int, data: Images) -> nn.Module:
    kept = Path("out/pat") / f"digits-{name}-{seed}.pt"
    torch.manual_seed(seed)
    model = DIGITS.networks[name].build()
    if kept.exists():
        model.load_state_dict(torch.load(kept, weights_only=True))
        return model
    fit(model, data, DIGITS.networks[name], seed, DIGITS.batch)
    kept.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), kept)
    return model


def _methods(criteria: tuple[str, ...], steps: int, rate: int, sparse: int) -> dict[str, Method]:
    """``sparse``: epochs of sparse training before the first step, for the group lasso. Variance entropy sharpens what the
    variance criterion reads, and group lasso what the magnitude criterion reads."""
    found = {}
    for name in criteria:
        found |= {
            f"one-shot, {name}": Method(name),
            f"PAT linear, {name}": Method(name, steps, 0, rate, "linear"),
            f"PAT geometric, {name}": Method(name, steps, 0, rate),
        }
    entropy = functools.partial(regularizers.VarianceEntropy, ENTROPY)
    lasso = functools.partial(regularizers.GroupLasso, LASSO)
    return found | {
        "PAT + variance entropy, variance": Method("variance", steps, 0, rate, regularizer=entropy),
        "PAT + group lasso, magnitude": Method("magnitude", steps, sparse, rate, regularizer=lasso),
    }


ENTROPY, LASSO = 1e-2, 1e-3  # of two values each, on a seed that is not in the grid
DIGITS = Grid(
    data=Digits,
    networks={
        "resnet": Recipe(functools.partial(ResNet, (12, 24, 48)), 20, 4e-3, 1e-2),
        "mobilenet": Recipe(functools.partial(MobileNet, (1, 2, 1, 1, 1, 1, 1)), 20, 4e-3, 1e-2),
        "vit": Recipe(functools.partial(ViT, 48, 3, 4, 2, 8), 70, 2e-3, 5e-2),
    },
    trained=_trained_on_digits,
    epochs=12,
    batch=32,
    lr={"resnet": 2e-3, "mobilenet": 2e-3, "vit": 1e-3},
    seeds=(0, 1, 2, 3, 4),
    calibration=512,
    methods=_methods(("magnitude", "variance", "reconstruction"), steps=5, rate=1, sparse=3),
)
FASHION = Grid(
    data=Fashion,
    networks={name: NETWORKS[name] for name in ("resnet", "vit")},
    trained=lambda name, seed, data: load(name),
    epochs=4,
    batch=64,
    lr={"resnet": 2e-3, "vit": 1e-3},
    seeds=(0,),
    calibration=2048,
    methods={
        "PAT geometric, reconstruction": Method("reconstruction", 3),
        "one-shot, reconstruction": Method("reconstruction"),
    },
    opponents=OPPONENTS[:1],
)
FASHION_LONG = dataclasses.replace(
    FASHION,
    networks={"resnet": NETWORKS["resnet"]},
    epochs=12,
    targets=(0.5,),
    from_scratch=False,
    methods={
        "PAT geometric, reconstruction": Method("reconstruction", 5),
        "PAT geometric + distillation, reconstruction": Method("reconstruction", 5, distillation=0.5),
        "one-shot, reconstruction": Method("reconstruction"),
        "one-shot + distillation, reconstruction": Method("reconstruction", distillation=0.5),
    },
)
GRIDS = {"digits": DIGITS, "fashion": FASHION, "fashion-long": FASHION_LONG}


class Contestant(Protocol):
    """The calls of the one training loop to a method; ``model`` may be another object after ``begin``."""

    model: nn.Module

    def begin(self, epoch: int) -> None: ...
    def optimizer(self) -> torch.optim.Optimizer: ...
    def penalty(self) -> Tensor | float: ...
    def after_backward(self) -> None: ...


class Plain:
    """No pruning in the loop."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model, self._decay = model, recipe.decay
        self._optimizer = self._new()

    def _new(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=self._decay)

    def begin(self, epoch: int) -> None:
        """Nothing is due."""

    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def penalty(self) -> Tensor | float:
        return 0.0

    def after_backward(self) -> None:
        """No regularizer."""


class Ours(Plain):
    """The manager in the loop."""

    def __init__(self, model: nn.Module, recipe: Recipe, data: Images, target: float, method: Method, batches: Any) -> None:
        super().__init__(stp_fx.trace(model, data.train_x[:1]), recipe)
        self.pat = stp_fx.PATPassManager(
            self.model, criterion=method.criterion, ratio=target, target="macs", scope="isomorphic", steps=method.steps,
            start_epoch=method.start, epoch_rate=method.rate, schedule=method.schedule, train_loader=batches,
            regularizer=None if method.regularizer is None else method.regularizer(), compensation="least_squares",
            recalibrate=has_batchnorm(model) or None, optimizer=self._optimizer,
        )  # fmt: skip

    def begin(self, epoch: int) -> None:
        self.pat.prune(epoch)

    def penalty(self) -> Tensor | float:
        return self.pat.loss()

    def after_backward(self) -> None:
        self.pat.regularize()


class Opponent(Plain):
    """torch-pruning in its own iterative loop; BatchNorm recalibrated after every step, a new optimizer as it must be."""

    def __init__(self, model: nn.Module, recipe: Recipe, data: Images, target: float, steps: int, rate: int, group: bool,
                 batches: Any) -> None:  # fmt: skip
        super().__init__(model, recipe)
        example = data.train_x[:1]
        ratio = ratio_for(model, example, target, lambda copied, ratio: prune_once(copied, example, ratio, whole_heads=False))
        if ratio is None:
            raise RuntimeError("torch-pruning reaches the target at no ratio")
        kind = "GroupNormPruner" if group else "BasePruner"
        self.pruner = pruner_of(model, example, ratio, kind=kind, iterative_steps=steps, whole_heads=False)
        self._epochs, self._group, self._batches = [k * rate for k in range(steps)], group, batches

    def begin(self, epoch: int) -> None:
        if epoch in self._epochs:
            step(self.pruner, self.model)
            if has_batchnorm(self.model):
                self.model.load_state_dict(recalibrated(self.model, self._batches).state_dict())
            self._optimizer = self._new()
        self._sparse = self._group and epoch < self._epochs[-1]
        if self._sparse:
            self.pruner.update_regularizer()

    def after_backward(self) -> None:
        if self._sparse:
            self.pruner.regularize(self.model)


def contestant(grid: Grid, name: str, method: str, target: float, seed: int, data: Images) -> tuple[Contestant, float]:
    """The network that is trained, and for how many epochs."""
    recipe, batches = grid.networks[name], data.calibration(grid.calibration, seed=seed)
    model = grid.trained(name, seed, data)
    if method == UNPRUNED:
        return Plain(model, recipe), grid.epochs
    if method == "from scratch":
        gm = stp_fx.trace(model, data.train_x[:1])
        small = stp_fx.prune_graph(gm, "magnitude", target, target="macs")
        torch.manual_seed(seed)
        fresh = stp_fx.trace(grid.networks[name].build(), data.train_x[:1])
        return Plain(stp_fx.apply_plan(fresh, stp_fx.plan_of(small)), recipe), recipe.epochs + grid.epochs
    if method in OPPONENTS:
        # its longest schedule that ours have too
        rate = max(m.rate for m in grid.methods.values())
        steps = max(m.steps for m in grid.methods.values())
        return Opponent(model, recipe, data, target, steps, rate, method == OPPONENTS[1], batches), grid.epochs
    return Ours(model, recipe, data, target, grid.methods[method], batches), grid.epochs


def run(grid: Grid, name: str, method: str, target: float, seed: int, data: Images) -> dict[str, Any]:
    """One line of the results."""
    start, recipe = time.perf_counter(), grid.networks[name]
    one, epochs = contestant(grid, name, method, target, seed, data)
    generator = torch.Generator().manual_seed(1000 + seed)
    peak = recipe.lr if method == "from scratch" else grid.lr[name]
    steps, done, curve = math.ceil(len(data.train_x) / grid.batch), 0, []
    share = grid.methods[method].distillation if method in grid.methods else 0.0
    teacher = grid.trained(name, seed, data).eval() if share else None
    torch.manual_seed(1000 + seed)
    for epoch in range(int(epochs)):
        one.begin(epoch)
        one.model.train()
        for x, y in data.batches(grid.batch, generator):
            done += 1
            rate = _one_cycle(done / (steps * epochs)) * peak
            for group in one.optimizer().param_groups:
                group["lr"] = rate
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
                said = one.model(x)
                loss = F.cross_entropy(said, y, label_smoothing=0.05)
                if teacher is not None:
                    with torch.no_grad():
                        wanted = teacher(x)
                    loss = (1 - share) * loss + share * _distance(said, wanted)
            one.optimizer().zero_grad()
            (loss + one.penalty()).backward()
            one.after_backward()
            one.optimizer().step()
        curve.append(data.accuracy(one.model))
    final = one.model if isinstance(one.model, fx.GraphModule) else stp_fx.trace(one.model, data.train_x[:1])
    cost = stp_fx.cost(final)
    return {
        "network": name, "method": method, "target": target, "seed": seed, "accuracy": curve[-1], "curve": curve,
        "macs": cost.macs, "params": cost.params, "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def _distance(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """Hinton et al. 2015: cross-entropy of softened outputs, less the teacher's own entropy."""
    soft = [F.log_softmax(each.float() / temperature, dim=1) for each in (student, teacher)]
    return temperature**2 * F.kl_div(*soft, reduction="batchmean", log_target=True)


def _one_cycle(t: float) -> float:
    """Up over the first tenth, down along a cosine."""
    return t / 0.1 if t < 0.1 else 0.5 * (1 + math.cos(math.pi * (t - 0.1) / 0.9))


def cells(grid: Grid) -> Iterator[tuple[str, str, float, int]]:
    """All runs, those that most depends on first: network, method, target, seed. A network that is not pruned has target 0."""
    for seed in grid.seeds:
        for method in grid.all_methods:
            for name in grid.networks:
                for target in (0.0,) if method == UNPRUNED else grid.targets:
                    yield name, method, target, seed


def report(name: str, lines: list[dict[str, Any]]) -> str:
    """Mean and spread (sample standard deviation) over seeds, a column a network and target."""
    grid = GRIDS[name]
    columns = [(network, target) for network in grid.networks for target in grid.targets]
    rows = []
    for method in grid.all_methods:
        row = [method]
        for network, target in columns:
            wanted = 0.0 if method == UNPRUNED else target
            found = [100 * x["accuracy"] for x in lines if (x["network"], x["method"], x["target"]) == (network, method, wanted)]
            spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
            row.append(f"{statistics.mean(found):.2f}{spread}" if found else "-")
        rows.append(row)
    left = []
    for method in (*grid.methods, *grid.opponents):
        cells_of = [[x["macs"] for x in lines if (x["network"], x["method"], x["target"]) == (n, method, t)] for n, t in columns]
        whole = [next((x["macs"] for x in lines if (x["network"], x["method"]) == (n, UNPRUNED)), 0) for n, _ in columns]
        parts = [f"{100 * statistics.mean(m) / w:.1f}" if m and w else "-" for m, w in zip(cells_of, whole, strict=True)]
        left.append([method, *parts])
    seeds = {cell: len({x["seed"] for x in lines if (x["network"], x["target"]) == cell}) for cell in columns}
    hours = sum(x["seconds"] for x in lines) / 3600
    scratch = ", ".join(f"{recipe.epochs + grid.epochs:g}" for recipe in grid.networks.values())
    header = ("accuracy, %", *(f"{network} -{target:.0%} MACs" for network, target in columns))
    text = f"""# Pruning-aware training: {name}

{markdown_machine(machine())}

{len(lines)} runs, {hours:.1f} hours of one core; seeds a column: {", ".join(str(n) for n in seeds.values())}. Each from the same
trained networks, then {grid.epochs} epochs{f"; from scratch: {scratch} epochs" if grid.from_scratch else ""}.
Ours: least-squares compensation, BatchNorm recalibrated, isomorphic scope. Runs: `pat-{name}.jsonl`.

{markdown_table(header, rows)}

MACs left, as a mean over seeds. torch-pruning gets its smallest ratio that reaches the target; its layers shrink together, so
that on small networks it may overshoot.

{markdown_table(("MACs left, %", *header[1:]), left)}
"""
    write(RESULTS / f"pat-{name}", text, {"machine": machine(), "header": header, "rows": rows})
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", choices=GRIDS)
    parser.add_argument("--report", action="store_true", help="no runs, only the tables")
    parser.add_argument("--shard", default="0/1", help="K/N: every Nth run, from the Kth")
    parser.add_argument("--only", default="", help="runs whose `network method target seed` contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    grid, kept, console = GRIDS[arguments.grid], RESULTS / f"pat-{arguments.grid}.jsonl", wide_console()
    first, of = map(int, arguments.shard.split("/"))

    def known() -> list[dict[str, Any]]:
        return [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []

    data = None if arguments.report else grid.data()
    chosen = [cell for cell in cells(grid) if arguments.only in " ".join(map(str, cell))]
    for cell in [] if data is None else chosen[first::of]:
        if any((x["network"], x["method"], x["target"], x["seed"]) == cell for x in known()):
            continue
        name, method, target, seed = cell
        line = run(grid, name, method, target, seed, copy.copy(data))
        with kept.open("a") as file:
            file.write(json.dumps(line) + "\n")
        console.print(f"{name}, {method}, {target:.0%}, seed {seed}: {line['accuracy']:.2%} in {line['seconds']} s")
    console.print(report(arguments.grid, known()))


if __name__ == "__main__":
    main()
