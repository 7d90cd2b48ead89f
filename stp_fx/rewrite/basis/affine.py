"""A norm's scale and shift, moved into the contractions that read it; a layer scale, moved into the contraction before it.

``W (g x + s) + b = (W diag(g)) x + (W s + b)``. Between the norm and its consumers may stand what treats all channels
alike and keeps a constant: a mean over tokens, a view, the choice of a token. Each node is run to find out. Padding keeps none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from stp_fx.analysis.carriers import Carrier, carriers_of_value
from stp_fx.analysis.consumers import Consumer, find_consumers
from stp_fx.analysis.norm_calls import NormCall
from stp_fx.errors import NothingToRotateError
from stp_fx.rewrite.basis.probe import Probe, on_blocks, same
from stp_fx.rewrite.basis.streams import Stream, Touched
from stp_fx.rewrite.basis.ties import readers_of, untied
from stp_fx.rewrite.bias import add_to_bias

__all__ = ["fold_norms"]


def fold_norms(gm: fx.GraphModule, stream: Stream, probe: Probe) -> list[tuple[str, list[str]]] | None:
    """Folds the affine parts of all norms of ``stream`` into their consumers, in place; None if there is nothing to fold.

    Gives the tied parameters of which some calls got their own copy, with the nodes of these calls.

    Raises:
        NothingToRotateError: a consumer that cannot take one; ``gm`` may be half-done, so give a copy.
    """
    touched = Touched(probe, stream.units)
    groups: dict[tuple[str | None, str | None], list[NormCall]] = {}
    for norm in stream.norms:
        if norm.computed or norm.hooked:
            what = "has hooks, which see its channels" if norm.hooked else "has a scale that the graph computes"
            raise touched.refused(norm.node, f"{what}, so the scale cannot be moved into its consumers")
        if not (_is_constant(gm, norm.weight, 1.0) and _is_constant(gm, norm.bias, 0.0)):
            groups.setdefault((norm.weight, norm.bias), []).append(norm)
    consumers = {consumer.node: consumer for consumer in find_consumers(gm)}
    separated: list[tuple[str, list[str]]] = []
    for norms in groups.values():
        fold = _Fold(gm, touched, norms, consumers)
        fold.run()
        separated += fold.untied
    return separated if groups else None


class _Fold:
    """The norms that share one affine part, and the consumers of all of them."""

    def __init__(self, gm: fx.GraphModule, touched: Touched, norms: Sequence[NormCall], known: dict[str, Consumer]) -> None:
        self.gm, self.touched, self.norms, self.known = gm, touched, norms, known
        tensors, first = touched.probe.tensors, norms[0]
        size = touched.probe.values[first.value].shape[-1]
        device = next(iter(tensors.values())).device
        self.scale = (
            torch.ones(size, dtype=torch.float64, device=device) if first.weight is None else tensors[first.weight].detach()
        )
        self.shift = torch.zeros_like(self.scale) if first.bias is None else tensors[first.bias].detach()
        value = touched.graph.value(first.value.name)
        (self.own,) = carriers_of_value(touched.graph, first.value.name, value, touched.units)
        if self.own.positions.size != size:
            raise touched.refused(first.node, "normalises over other channels as well")
        self.untied: list[tuple[str, list[str]]] = []
        self.carrying: set[fx.Node] = {norm.node for norm in norms}

    def run(self) -> None:
        """Follows the norms' values, changes what reads them, and resets the affine part."""
        consumers: list[tuple[fx.Node, str, torch.Tensor]] = []
        for node in self.touched.nodes():
            reads = [n for n in node.all_input_nodes if n in self.carrying]
            if not reads:
                continue
            weights = self._weights(node)
            if weights:
                consumers.append((node, weights, self._shift_of(node, weights)))
            elif self.touched.has(node) and self._passes(node):
                self.carrying.add(node)
            elif not self._reads_sizes(node):
                raise self.touched.refused(
                    node, f"stands between the norm '{self.norms[0].node.name}' and a contraction that could take its scale"
                )
        self._write(consumers)

    def _weights(self, node: fx.Node) -> str | None:
        """The weight whose input axis a node reads with the stream."""
        own = [
            *self.touched.stored(node),
            *(n for i in node.all_input_nodes if i.op == "get_attr" for n in self.touched.stored(i)),
        ]
        inputs = {(a.tensor, a.dim) for a in self.touched.graph.axes if a.role == "weight"}
        found = [name for name in own if any((name, carrier.dim) in inputs for carrier in self.touched.axes[name])]
        return found[0] if len(found) == 1 else None

    def _along(self, vector: torch.Tensor, carrier: Carrier) -> torch.Tensor | None:
        """The affine vector by position of a carrier [blocks, channels]; None if its blocks are others than the norm's."""
        own = vector[torch.from_numpy(self.own.positions).to(vector.device)]
        blocks = carrier.positions.shape[0]
        return own.expand(blocks, -1) if own.shape[0] in (1, blocks) else None

    def _affine(self, tensor: torch.Tensor, carriers: tuple[Carrier, ...], shift: bool = True) -> torch.Tensor:
        for carrier in carriers:
            scale, add = self._along(self.scale, carrier), self._along(self.shift, carrier)
            if scale is None or add is None:
                raise NothingToRotateError(f"norm '{self.norms[0].node.name}' is read in other pieces than it normalises")
            moved = add if shift else torch.zeros_like(add)
            tensor = on_blocks(tensor, (carrier,), lambda x, scale=scale, moved=moved: x * scale.to(x) + moved.to(x))
        return tensor

    def _values(self, node: fx.Node, drawn: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        return {n: self.touched.changed(n, v, self._affine) if n in self.carrying else v for n, v in drawn.items()}

    def _passes(self, node: fx.Node) -> bool:
        """Whether a node gives the scaled and shifted value for scaled and shifted operands."""
        drawn = {n: self.touched.drawn(n) for n in node.all_input_nodes}
        if any(self.touched.has(n) and n not in self.carrying for n in drawn):
            return False
        run = self.touched.probe.run
        return same(self.touched.changed(node, run(node, drawn, {}), self._affine), run(node, self._values(node, drawn), {}))

    def _reads_sizes(self, node: fx.Node) -> bool:
        """Whether a node reads no number of the norms' values, but their sizes or dtype."""
        drawn = {n: self.touched.drawn(n) for n in node.all_input_nodes}
        run = self.touched.probe.run
        return same(run(node, drawn, {}), run(node, self._values(node, drawn), {}))

    def _shift_of(self, node: fx.Node, weight: str) -> torch.Tensor:
        """The part of each output of a consumer [out] that comes from the shift; it is the same at all positions."""
        touched = self.touched
        drawn = {n: touched.drawn(n) for n in node.all_input_nodes}
        zeros = {n: torch.zeros_like(v) if n in self.carrying else v for n, v in drawn.items()}
        before, after = self._both(node, weight, zeros)
        difference = before - after
        before, after = self._both(node, weight, drawn)
        if not same(before, after + difference):
            raise touched.refused(node, f"does not take the scale of the norm '{self.norms[0].node.name}' into its weight")
        consumer = self.known.get(node.name)
        if consumer is None:
            raise touched.refused(node, "reads a norm in a way that no bias can be added to")
        rows = difference.movedim(consumer.channel, -1).reshape(-1, difference.shape[consumer.channel])
        if not same(rows, rows[:1].expand_as(rows)):
            raise touched.refused(node, "pads what it reads, so the norm's shift is no constant to it")
        return rows[0]

    def _both(self, node: fx.Node, weight: str, values: dict[fx.Node, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs of a consumer for scaled and shifted values, and for plain ones with a scaled weight."""
        scaled, run = self._scaled_weight(weight), self.touched.probe.run
        plain = {n: scaled if _reads(self.touched, n, weight) else v for n, v in values.items()}
        return run(node, self._values(node, values), {}), run(node, plain, {weight: scaled})

    def _scaled_weight(self, weight: str) -> torch.Tensor:
        tensor = self.touched.probe.tensors[weight].detach()
        inputs = {(a.tensor, a.dim) for a in self.touched.graph.axes if a.role == "weight" and a.side in ("in", "both")}
        carriers = tuple(c for c in self.touched.axes[weight] if (weight, c.dim) in inputs)
        return self._affine(tensor, carriers, shift=False)

    def _write(self, consumers: list[tuple[fx.Node, str, torch.Tensor]]) -> None:
        nodes = {node for node, _, _ in consumers}
        by_weight: dict[str, list[tuple[fx.Node, torch.Tensor]]] = {}
        for node, weight, shift in consumers:
            by_weight.setdefault(weight, []).append((node, shift))
        for weight, uses in by_weight.items():
            others = [n for n in readers_of(self.gm, weight) if n not in nodes]
            name = weight
            if others:
                name = untied(self.gm, weight, [node for node, _ in uses])
                self.untied.append((weight, sorted(node.name for node, _ in uses)))
            parameter = self.gm.get_parameter(name)
            with torch.no_grad():
                parameter.copy_(self._scaled_weight(weight).to(parameter))
            self._add_shift([node for node, _ in uses], uses[0][1])
        for name, value in ((self.norms[0].weight, 1.0), (self.norms[0].bias, 0.0)):
            if name is not None:
                with torch.no_grad():
                    self.gm.get_parameter(name).fill_(value)

    def _add_shift(self, nodes: list[fx.Node], shift: torch.Tensor) -> None:
        if bool((shift == 0).all()):
            return
        with torch.no_grad():
            add_to_bias(self.gm, [self.known[node.name] for node in nodes], shift)
        self.gm.recompile()


def _reads(touched: Touched, node: fx.Node, weight: str) -> bool:
    return node.op == "get_attr" and touched.graph.first_name(str(node.target)) == weight


def _is_constant(gm: fx.GraphModule, name: str | None, value: float) -> bool:
    return name is None or bool((gm.get_parameter(name).detach() == value).all())
