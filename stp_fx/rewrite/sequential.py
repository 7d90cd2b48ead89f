"""Layers refitted one after the other, each on what it reads in the network as pruned and repaired so far."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from stp_fx.analysis.build import analyze
from stp_fx.analysis.consumers import Consumer, linear_calls
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.plan import PrunePlan
from stp_fx.analysis.sites import find_sites
from stp_fx.analysis.survivors import Survivors
from stp_fx.errors import InputError
from stp_fx.ir.in_place import may_write
from stp_fx.ir.streamed import Streamed
from stp_fx.measure.calibration import arguments_of, batches, device_of
from stp_fx.progress import Progress, progress_of, stepped
from stp_fx.rewrite.bias import add_to_bias, bias_place
from stp_fx.rewrite.counterparts import KeptPositions, calls_by_parameter, checked_original, take_over
from stp_fx.rewrite.observations import Rows, channel_dim, direct, why_not
from stp_fx.rewrite.regression import Fit, Regression
from stp_fx.rewrite.removal import is_partial, remove
from stp_fx.rewrite.residuals import Change, InPlace, Lacking, Path, ResidualPath, in_place, pulled_back, residual_path
from stp_fx.rewrite.scores import Fold, Folding, find_folds
from stp_fx.rewrite.side_by_side import BatchState, Network, States, memory_limit
from stp_fx.rewrite.slicing import copied
from stp_fx.rewrite.without_blocks import ends_of_runs

__all__ = ["Repaired", "reconstruct", "reconstruct_streamed"]

_SAME = 1e-9
"""Residuals whose square is a smaller part of the output's are rounding: the layer is left as it is."""
_ROUTED = "its input is routed by data: indices or masks before it differ between the original and the pruned network"

Target = tuple[torch.Tensor, "torch.Tensor | None"]
"""Rows of what a layer should give, and for which of its numbers that is known (None: for all)."""


@dataclasses.dataclass(frozen=True)
class Repaired:
    """The repaired graph, the nodes of the layers that were refitted, and why others could not be."""

    graph_module: fx.GraphModule
    layers: tuple[str, ...]
    left_alone: dict[str, str]


def reconstruct(
    gm: fx.GraphModule,
    plan: PrunePlan,
    calibration: Iterable[Any],
    *,
    residuals: bool = True,
    memory: int | None = None,
    original: fx.GraphModule | None = None,
    merge: bool = True,
) -> Repaired:
    """A copy of ``gm`` whose kept weights make up for the inputs that ``plan`` removes, layer after layer; see
    :class:`stp_fx.passes.ReconstructSequentially`.

    Raises:
        PlanError: the plan does not fit.
        InputError: no batch, or one that does not fit; an ``original`` that does not fit.
    """
    target = checked_original(gm, original)
    graph = analyze(gm)
    survivors = graph.survivors(plan, partial=is_partial(gm))
    if plan.is_empty:
        return Repaired(gm, (), {})
    with torch.no_grad():
        run = _Sequence(target, remove(gm, plan), graph, survivors, residuals, ends_of_runs(gm, graph, plan) if merge else {})
        run.over(gm, calibration, memory)
        result = copied(gm)
        take_over(result, run.small, survivors, run.changed)
    return Repaired(result, tuple(run.layers), run.left_alone)


def reconstruct_streamed(
    gm: fx.GraphModule, plan: PrunePlan, calibration: Iterable[Any], streamed: tuple[Streamed, Streamed], memory: int | None
) -> dict[str, str]:
    """:func:`reconstruct` of a network that does not fit into memory; returns why layers were left alone, by node.

    ``gm`` is read for its structure and may be on the meta device. ``streamed``: the same network, and what the removal makes of
    it, which is told to keep every tensor that changes.

    Raises:
        InputError: no batch, one that does not fit, or values that are not finite.
    """
    graph = analyze(gm)
    with torch.no_grad():
        run = _Sequence(
            gm,
            streamed[1].module,
            graph,
            graph.survivors(plan, partial=is_partial(gm)),
            True,
            ends_of_runs(gm, graph, plan),
            streamed,
        )
        run.over(streamed[0].module, calibration, memory)
    return run.left_alone


@dataclasses.dataclass(frozen=True)
class _Stop:
    """Layers that read one value, and are refitted together; one with a ``path`` or with ``folds`` stands alone. ``ends``: by
    value, what it should be in place of itself, since the blocks after it are removed."""

    layers: tuple[Consumer, ...]
    path: ResidualPath | None = None
    folds: tuple[Fold, ...] = ()
    ends: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])

    @property
    def held(self) -> list[str]:
        """The values of the original network that are asked for here."""
        asked = [name for layer in self.layers for name in (layer.node, self.ends.get(layer.node, layer.node))]
        for fold in self.folds:
            asked += [fold.query, fold.key[0]]
        return asked if self.path is None else [*asked, self.path.total]


class _Sequence:
    """``original`` and ``pruned`` network, and what happens between them."""

    def __init__(
        self,
        gm: fx.GraphModule,
        small: fx.GraphModule,
        graph: ChannelGraph,
        survivors: Survivors,
        residuals: bool,
        ends: Mapping[str, str],
        streamed: tuple[Streamed, Streamed] | tuple[None, None] = (None, None),
    ) -> None:
        self.small = small
        self._streamed = streamed
        self._ends = ends
        self._kept = KeptPositions(graph, survivors)
        self._sizes: list[int] = []
        self.layers: list[str] = []
        self.changed: set[str] = set()
        self.left_alone: dict[str, str] = {}
        self._ways: dict[int, bool] = {}
        self._scales: dict[tuple[int, torch.Size], InPlace | None] = {}
        self._readers = calls_by_parameter(small)
        calls = linear_calls(small)
        names = {call.node for call in calls}
        for site in find_sites(gm).all:
            if site.weights and site.reader not in names and not self._kept.is_whole(site.source):
                self.left_alone[site.reader] = "it is neither a linear layer nor a convolution, or it has hooks"
        self.pruned = Network(small, self._kept.is_whole, streamed=streamed[1])
        self._places = {call.node: bias_place(small, call) for call in calls}
        possible = [call for call in calls if self._may_change(call)]
        paths = {c.node: self._path(c.node, names) if residuals else None for c in possible}
        self._folds = find_folds(self.pruned, survivors, names)
        self._stops = self._grouped(possible, paths)
        self.original = Network(gm, self._kept.is_whole, {name for stop in self._stops for name in stop.held}, streamed[0])

    def _may_change(self, call: Consumer) -> bool:
        if self.pruned.by_name[call.node] in self.pruned.left_out:
            return False
        reason = why_not(self.small, call, self._readers)
        if reason is not None:
            self.left_alone[call.node] = reason
        return reason is None

    def _grouped(self, calls: Sequence[Consumer], paths: Mapping[str, ResidualPath | None]) -> list[_Stop]:
        """Linear layers without a path that read one value stand together, at the first one's place."""
        found: dict[object, list[Consumer]] = {}
        for call in calls:
            alone = paths[call.node] is not None or call.windows is not None or call.node in self._folds
            alone = alone or self._is_written(call.site.source)
            key = call.node if alone else (call.site.source, self._places[call.node] is not None)
            found.setdefault(key, []).append(call)
        return [
            _Stop(tuple(layers), paths[layers[0].node], tuple(self._folds.get(layers[0].node, ())), self._ends)
            for layers in found.values()
        ]

    def _path(self, layer: str, layers: Set[str]) -> ResidualPath | None:
        """The way to the sum that a layer feeds; its ``total`` is what that sum is behind blocks that are removed."""
        path = residual_path(self.pruned, layer, layers)
        return None if path is None else dataclasses.replace(path, total=self._ends.get(path.total, path.total))

    def _is_written(self, source: str) -> bool:
        return any(may_write(user, self.pruned.module) for user in self.pruned.by_name[source].users)

    def over(self, gm: fx.GraphModule, calibration: Iterable[Any], memory: int | None) -> None:
        """Refits all layers in order, on all batches; ``gm`` is what takes them, where they are run."""
        states = [self.start(arguments_of(gm, b)) for b in batches(gm, calibration, "sequential repair")]
        with States(states, (self.original, self.pruned), memory_limit(device_of(gm)) if memory is None else memory) as kept:
            self.through(kept, progress_of(calibration))

    def start(self, arguments: tuple[Any, ...]) -> BatchState:
        self._sizes.append(max((leaf.numel() for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)), default=0))
        return BatchState((self.original.start(arguments), self.pruned.start(arguments)))

    def through(self, states: States, progress: Progress) -> None:
        """Refits all layers in order."""
        self._shares = [size / max(sum(self._sizes), 1) for size in self._sizes]
        for stop in stepped("sequential repair of layers", self._stops, progress):
            self._load(stop)
            inputs = stop.layers[0].matrix(stop.layers[0].current(self.small)).shape
            regression = Regression(inputs[2] * inputs[3], self._places[stop.layers[0].node] is not None)
            foldings = self._foldings(states, stop)
            for number, state in enumerate(states):
                if self._is_alike(state, stop):
                    self._observe(state, stop, foldings, regression, number)
                else:
                    regression.unlike += 1
                self.original.drop(state.values[0], stop.held, state.place[0])
            self.original.release(stop.held)
            regression.reduce()
            if regression.unlike:
                self.left_alone.update((layer.node, _ROUTED) for layer in stop.layers)
            elif regression.lacking > max(_SAME, _rounding(stop.layers[0].current(self.small)) ** 2):
                self._refit(stop, regression.fit())
            for each in self._streamed:
                if each is not None:
                    each.release()

    def _load(self, stop: _Stop) -> None:
        """Reads what the layers of a stop read; a streamed network has it until the stop's end."""
        streamed = self._streamed[1]
        if streamed is None:
            return
        for layer in stop.layers:
            streamed.load(self.pruned.by_name[layer.node])
            place = self._places[layer.node]
            if place is not None:
                streamed.load_tensor(place)

    def _change(self, name: str) -> None:
        """Notes that a tensor of the small network has been changed."""
        self.changed.add(name)
        if self._streamed[1] is not None:
            self._streamed[1].keep(name)

    def _is_alike(self, state: BatchState, stop: _Stop) -> bool:
        """Whether a stop's layers read the same things in both networks: of the same tokens, in the same order."""
        state.advance(1, self.pruned, self.pruned.at[stop.layers[0].node])
        state.advance(0, self.original, max(self.original.at[name] for name in stop.held) + 1)
        return state.is_alike(self.original, stop.held)

    def _foldings(self, states: States, stop: _Stop) -> list[Folding]:
        """The desired queries of a stop's layer."""
        foldings = [Folding(fold) for fold in stop.folds]
        for state in states if foldings else ():
            for folding in foldings:
                folding.add(functools.partial(self._original, state))
        return foldings

    def _observe(self, state: BatchState, stop: _Stop, foldings: Sequence[Folding], regression: Regression, number: int) -> None:
        """One batch's observations for the layers of a stop."""
        first, env = stop.layers[0], state.values[1]
        source = env[self.pruned.by_name[first.site.source]]
        matrix = first.matrix(first.current(self.small))
        wanted = math.ceil(self._shares[number] * regression.wanted)
        output = self._whole(state, first.node)
        rows = Rows(self._original(state, first.node, channel_dim(first, output)).shape, first, wanted, number, source.device)
        if not rows.count:
            return
        x = rows.inputs(first, source, len(matrix))
        lacking, size = [], 0.0
        for layer in stop.layers:
            given = self._given(env, layer, rows, x)
            wish, useful = self._target(state, stop, layer, rows)
            if layer is first:
                for fold, folding in zip(stop.folds, foldings, strict=True):
                    wish, useful = self._with_fold(state, fold, folding, layer, rows, (wish, useful))
            lack = wish - given
            lacking.append(lack if useful is None else torch.where(useful, lack, 0.0))
            size += float(torch.linalg.vector_norm(given)) ** 2 / given.numel() / len(stop.layers)
        r = torch.cat([each.reshape(rows.count, len(matrix), -1).movedim(1, 0) for each in lacking], 2)
        if not bool(torch.isfinite(r.sum() + x.sum())):
            raise InputError(f"calibration batch {number}: the input or the output of {first.node!r} is not finite")
        regression.add(x, r, r.shape[0] * r.shape[2] * size)

    def _given(self, env: dict[fx.Node, Any], layer: Consumer, rows: Rows, x: torch.Tensor) -> torch.Tensor:
        """The output of a layer: [n, channels]."""
        node = self.pruned.by_name[layer.node]
        found = direct(self.small, node, layer)
        return rows.of(self.pruned.run(env, node)) if found is None else found(x).movedim(0, 1).flatten(1)

    def _target(self, state: BatchState, stop: _Stop, layer: Consumer, rows: Rows) -> Target:
        """The desired output of a layer: the original layer's, or the one that restores the original sum after it."""
        found = None if stop.path is None else self._for_sum(state, stop.path, layer, rows)
        return (self._rows(state, stop.ends.get(layer.node, layer.node), layer, rows), None) if found is None else found

    def _for_sum(self, state: BatchState, path: ResidualPath, layer: Consumer, rows: Rows) -> Target | None:
        """The output of a layer for which the sum behind ``path`` is that of the original; None where it is unknown."""
        other = state.values[1][self.pruned.by_name[path.other]]
        output = self._whole(state, layer.node)
        way = None if rows.lone else self._in_place(state, path, layer)
        if way is not None and self._whole(state, path.total).shape == output.shape:
            shape = torch.Size([len(output), *way.scale.shape[1:]])
            if isinstance(other, torch.Tensor) and other.shape == shape:
                return way.start(self._rows(state, path.total, layer, rows) - rows.of(other), rows.of, shape)
        total = self._original(state, path.total)

        def in_sum(last: torch.Tensor) -> torch.Tensor | None:
            if not isinstance(other, torch.Tensor) or not other.shape == total.shape == last.shape:
                return None
            return total - (last + other)

        return self._pulled_back(state, layer, self._along(state, layer, path.nodes, path.last), in_sum, path, rows)

    def _in_place(self, state: BatchState, path: ResidualPath, layer: Consumer) -> InPlace | None:
        """How a path that reads nothing else scales what it is given; tried once for each size of an image."""
        key = id(path), self._whole(state, layer.node).shape[1:]
        if path.alone and key not in self._scales:
            self._scales[key] = in_place(self._along(state, layer, path.nodes, path.last), self._original(state, layer.node))
        return self._scales.get(key)

    def _with_fold(self, state: BatchState, fold: Fold, folding: Folding, layer: Consumer, rows: Rows, target: Target) -> Target:
        """``target`` with what the queries among the output should be."""
        goal = folding.goal(functools.partial(self._original, state))
        if goal is None:
            return target

        def in_product(value: torch.Tensor) -> torch.Tensor | None:
            return goal - value if goal.shape == value.shape else None

        found = self._pulled_back(state, layer, self._along(state, layer, fold.nodes, fold.query), in_product, fold, rows)
        if found is None:
            return target
        wish, useful = found
        return torch.where(useful, wish, target[0]), None if target[1] is None else useful | target[1]

    def _pulled_back(
        self, state: BatchState, layer: Consumer, along: Path, lacking: Lacking, way: object, rows: Rows
    ) -> Change | None:
        """:func:`pulled_back` from what the original layer gives, with each way tried once."""
        if self._ways.get(id(way)) is False:
            return None
        start = self._original(state, layer.node)
        found = pulled_back(along, start, lacking, known=id(way) in self._ways)
        self._ways[id(way)] = found is not None
        return None if found is None else (rows.of(start) + rows.of(found[0]), rows.of(found[1]) > 0)

    def _along(self, state: BatchState, layer: Consumer, names: Sequence[str], last: str) -> Callable[[torch.Tensor], Any]:
        """The value ``last`` that the pruned network computes from a layer's output."""
        nodes = [self.pruned.by_name[name] for name in names]

        def along(value: torch.Tensor) -> Any:
            local: dict[fx.Node, Any] = {self.pruned.by_name[layer.node]: value}
            for node in nodes:
                local[node] = self.pruned.run(state.values[1], node, local)
            return local[self.pruned.by_name[last]]

        return along

    def _whole(self, state: BatchState, node: str) -> torch.Tensor:
        """A value of the original network."""
        state.advance(0, self.original, self.original.at[node] + 1)
        return state.values[0][self.original.by_name[node]]

    def _original(self, state: BatchState, node: str, whole: int | None = None) -> torch.Tensor:
        """The part of a value of the original network that the plan keeps; of dimension ``whole``, everything."""
        return self._kept.take(node, self._whole(state, node), whole)

    def _rows(self, state: BatchState, node: str, layer: Consumer, rows: Rows) -> torch.Tensor:
        """Rows of what the plan leaves of a value of the original network, which has the shape of the layer's output."""
        channel = channel_dim(layer, self._whole(state, node))
        found, kept = rows.of(self._original(state, node, channel)), self._kept.of(node).get(channel)
        return found if kept is None else found.index_select(1, kept.to(found.device))

    def _refit(self, stop: _Stop, fit: Fit | None) -> None:
        if fit is None:
            return
        at = 0
        for layer in stop.layers:
            current = layer.current(self.small)
            matrix = layer.matrix(current.detach())
            groups, out = matrix.shape[:2]
            change = fit.change[:, at : at + out]
            new = matrix.double() + change.reshape(groups, out, *matrix.shape[2:]).to(matrix.device)
            assert layer.weight is not None
            self.small.get_parameter(layer.weight).copy_(layer.like(new, current))
            self._change(layer.weight)
            place = self._places[layer.node]
            if place is not None and fit.shift is not None:
                add_to_bias(self.small, [layer], fit.shift[:, at : at + out].reshape(-1))
                self._change(place)
            self.layers.append(layer.node)
            at += out


def _rounding(weight: torch.Tensor) -> float:
    return torch.finfo(weight.dtype).eps if weight.is_floating_point() else 0.0
