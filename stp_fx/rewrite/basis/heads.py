"""The basis inside every attention head: what follows from ``W_o (N^-1)(N W_v)`` and ``(N^-T q)^T (N k)`` being what they were.

Between the value and the output projection stands a weighted mean over tokens, which commutes with any matrix over the positions
of a head; scores are products over these positions. So each head may have the matrix in which the first positions carry the most:
the singular vectors of the product of its projections. Which block of a projection is a head's values, queries or keys is found
by running the part of the graph between the projections: without its values a head gives zero, and a matrix on its keys whose
inverse transposed is on its queries changes nothing. (Rotary positions and norms over a head's positions do not allow that.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import fx

from stp_fx.analysis.carriers import Carrier, carriers_of_value
from stp_fx.analysis.groups import Group
from stp_fx.errors import NothingToRotateError
from stp_fx.rewrite.basis.probe import Probe, same
from stp_fx.rewrite.basis.streams import Touched
from stp_fx.rewrite.basis.ties import readers_of
from stp_fx.rules import TensorDims

__all__ = ["Heads", "find_heads", "rotate_heads"]

Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Block:
    """Block ``index`` of what the projection ``node`` gives: the positions of one head."""

    node: fx.Node
    index: int


class Heads:
    """One attention whose head positions are the units of ``group``; a chain of two linear layers is one with values alone.

    Raises:
        NothingToRotateError: this is no attention, or one whose projections are not stored tensors alone.
    """

    def __init__(self, gm: fx.GraphModule, probe: Probe, group: Group) -> None:
        self.gm, self.probe, self.group = gm, probe, group
        self.touched = Touched(probe, group.units)
        axes = {(axis.tensor, axis.dim): axis for axis in probe.graph.axes}
        sides = {name: {axes[name, c.dim].side for c in carriers} for name, carriers in self.touched.axes.items()}
        roles = {name: {axes[name, c.dim].role for c in carriers} for name, carriers in self.touched.axes.items()}
        outputs = [name for name in sides if roles[name] == {"weight"} and sides[name] == {"in"}]
        self.writers = [name for name in sides if roles[name] == {"weight"} and sides[name] == {"out"}]
        others = [name for name in sides if name not in (*outputs, *self.writers) and roles[name] != {"bias"}]
        if len(outputs) > 1 or not self.writers or others:
            raise NothingToRotateError(f"'{(others or list(sides))[0]}' is no projection into or out of heads")
        self.projections = list(dict.fromkeys(node for name in self.writers for node in self._reader_of(name)))
        self.output = outputs[0] if outputs else None
        self.source, self.carrier = self._end()
        self.given = {n: self._drawn(n) for node in self.projections for n in node.all_input_nodes if n.op != "get_attr"}

    def _end(self) -> tuple[fx.Node, Carrier | None]:
        """The input of the output projection, and where the positions are in it; without one, the scores."""
        if self.output is None:
            nodes = (n for n in self.touched.nodes() if not self.touched.has(n) and n not in self.projections)
            return next(n for n in nodes if isinstance(self.probe.values[n], torch.Tensor)), None
        (reader,) = self._reader_of(self.output)
        source = next(n for n in reader.all_input_nodes if n.op != "get_attr" and self.touched.has(n))
        value = self.probe.graph.value(source.name)
        assert isinstance(value, TensorDims)
        (carrier,) = carriers_of_value(self.probe.graph, source.name, value, self.group.units)
        return source, carrier

    def _reader_of(self, name: str) -> list[fx.Node]:
        nodes = list(readers_of(self.gm, name))
        if len(nodes) != 1:
            raise NothingToRotateError(f"'{name}' is read by {len(nodes)} calls, which would all have to take the same matrices")
        return nodes

    def _drawn(self, node: fx.Node) -> object:
        value = self.probe.values[node]
        return self.probe.drawn(value) / 1e5 if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    # -- the part between the projections --------------------------------------------------------------------------

    def tensors_of(self, node: fx.Node) -> list[str]:
        """The stored tensors of a projection that have the heads' positions: its weight, and its bias."""
        names = self.touched.stored(node)
        return names or [name for n in node.all_input_nodes if n.op == "get_attr" for name in self.touched.stored(n)]

    def heads(self, changed: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The input of the output projection, [..., blocks, positions], with other stored tensors; the scores, without one."""
        known: dict[fx.Node, object] = dict(self.given)
        for node in self.probe.values:
            if node.op == "get_attr":
                name = self.probe.graph.first_name(str(node.target))
                if name in changed:
                    known[node] = changed[name]
            elif node.op not in ("placeholder", "output") and node not in known:
                stored = {name: changed[name] for name in self.probe.stored(node) if name in changed}
                if node in self.projections or stored or any(n in known for n in node.all_input_nodes):
                    known[node] = self.probe.run(node, known, stored)
            if node is self.source:
                break
        value: torch.Tensor = known[self.source]  # type: ignore[assignment]
        if self.carrier is None:
            return value
        index = torch.from_numpy(self.carrier.positions).to(value.device)
        return value.movedim(self.carrier.dim, -1)[..., index]

    def changed(self, tensors: Tensors, block: Block, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Puts ``function`` of the positions of a block, [positions, ...], into ``tensors``."""
        for name in self.tensors_of(block.node):
            carriers = self.touched.axes[name]
            tensor = tensors.get(name, self.probe.tensors[name].detach())
            tensors[name] = _on_block(tensor, carriers[0], block.index, function)

    def blocks(self) -> Iterator[Block]:
        """All blocks of all projections, in the order in which they lie in memory."""
        for node in self.projections:
            for k in range(len(self.touched.axes[self.tensors_of(node)[0]][0].positions)):
                yield Block(node, k)

    @functools.cached_property
    def values(self) -> dict[Block, list[int]]:
        """The blocks that are values, with the heads that they are the values of (several, if queries are grouped)."""
        found: dict[Block, list[int]] = {}
        for block in self.blocks() if self.carrier is not None else ():
            tensors: Tensors = {}
            self.changed(tensors, block, torch.zeros_like)
            silent = (self.heads(tensors) == 0).flatten(0, -3).all(0).all(-1)
            served = silent.nonzero().ravel().tolist()
            if served and self._carries(block, served):
                found[block] = served
        return found

    def _carries(self, block: Block, served: Sequence[int]) -> bool:
        """Whether a matrix on a block is the same matrix on what is made of it: no activation stands in between."""
        draws = torch.Generator().manual_seed(0)
        matrix = torch.randn(self.group.size, self.group.size, generator=draws, dtype=torch.float64)
        tensors: Tensors = {}
        self.changed(tensors, block, lambda x: _left(matrix, x))
        expected = self.heads({}).clone()
        expected[..., served, :] = expected[..., served, :] @ matrix.T.to(expected)
        return same(expected, self.heads(tensors))

    @functools.cached_property
    def pairs(self) -> list[tuple[Block, list[Block]]]:
        """Keys with their queries; empty if no way to pair the other blocks lets a matrix pass."""
        rest = [block for block in self.blocks() if block not in self.values]
        for queries, keys in _ways(rest):
            share = len(queries) // max(len(keys), 1)
            pairs = [(key, queries[k * share : (k + 1) * share]) for k, key in enumerate(keys)]
            if pairs and self._pass(pairs):
                return pairs
        return []

    def _pass(self, pairs: Sequence[tuple[Block, list[Block]]]) -> bool:
        draws = torch.Generator().manual_seed(0)
        tensors: Tensors = {}
        for key, queries in pairs:
            matrix = torch.randn(self.group.size, self.group.size, generator=draws, dtype=torch.float64)
            inverse = torch.linalg.inv(matrix).T
            self.changed(tensors, key, lambda x, m=matrix: _left(m, x))
            for query in queries:
                self.changed(tensors, query, lambda x, m=inverse: _left(m, x))
        return same(self.heads({}), self.heads(tensors))

    def observed(self) -> dict[Block, tuple[str, tuple[Carrier, ...]]]:
        """Where data shows what a block is worth: values where the output projection reads them, others as they are projected."""
        found: dict[Block, tuple[str, tuple[Carrier, ...]]] = {}
        for block, served in self.values.items():
            assert self.carrier is not None
            found[block] = self.source.name, (Carrier(self.carrier.dim, self.carrier.positions[served]),)
        for block in (b for key, queries in self.pairs for b in (key, *queries)):
            value = self.probe.graph.value(block.node.name)
            carriers = self.touched.axes[self.tensors_of(block.node)[0]]
            if isinstance(value, TensorDims):
                for given in carriers_of_value(self.probe.graph, block.node.name, value, self.group.units):
                    if np.array_equal(given.positions, carriers[0].positions):
                        found[block] = block.node.name, (Carrier(given.dim, given.positions[[block.index]]),)
        return found

    def moments(self, block: Block, observed: Mapping[Block, torch.Tensor]) -> torch.Tensor:
        """E[x x^T] of the positions of a block, as ``observed``; for inputs without correlation otherwise."""
        rows = self.matrix(block)
        return observed[block].to(rows) if block in observed else rows @ rows.T

    def matrix(self, block: Block) -> torch.Tensor:
        """Weight and bias of a block, [positions, inputs and one]."""
        parts = []
        for name in self.tensors_of(block.node):
            carrier = self.touched.axes[name][0]
            index = torch.from_numpy(carrier.positions[block.index])
            parts.append(self.probe.tensors[name].detach().movedim(carrier.dim, 0)[index].reshape(len(index), -1))
        return torch.cat(parts, 1)


def find_heads(gm: fx.GraphModule, probe: Probe) -> list[Heads]:
    """Candidates for attentions or chains of two linear layers: groups that projections write and at most one layer reads."""
    found = []
    for group in probe.graph.groups:
        if group.size > 1:
            try:
                found.append(Heads(gm, probe, group))
            except (NothingToRotateError, ValueError, StopIteration):  # between other calls
                continue
    return found


def rotate_heads(heads: Heads, observed: Mapping[Block, torch.Tensor]) -> Tensors:
    """New values of the projections of one attention: values and outputs, queries and keys, as far as they let matrices pass.

    ``observed``: second moments of blocks, [positions, positions], by data; what it lacks is taken from the weights.

    Raises:
        NothingToRotateError: neither does.
    """
    tensors: Tensors = {}
    covered = sorted(i for group in heads.values.values() for i in group)
    if heads.carrier is not None and covered == list(range(len(heads.carrier.positions))):
        for block, served in heads.values.items():
            _rotate_values(heads, tensors, block, served, heads.moments(block, observed))
    for key, queries in heads.pairs:
        _rotate_keys(heads, tensors, key, queries, observed)
    if not tensors:
        raise NothingToRotateError(f"'{heads.group.name}': neither what is read nor products let a matrix pass")
    return tensors


def _rotate_values(heads: Heads, tensors: Tensors, block: Block, served: Sequence[int], moments: torch.Tensor) -> None:
    """``A = W_o = Q R``: values become ``U^T R v`` and the output ``Q U``, with U the eigenvectors of ``R E[v v^T] R^T``."""
    assert heads.output is not None
    carrier = heads.touched.axes[heads.output][0]
    output = tensors.get(heads.output, heads.probe.tensors[heads.output].detach())
    moved = output.movedim(carrier.dim, -1)
    index = torch.from_numpy(carrier.positions[list(served)])
    columns = moved[..., index].flatten(0, -3)  # [out, heads, positions]
    q, r = torch.linalg.qr(columns.transpose(0, 1).flatten(0, 1))
    if r.shape[0] < heads.group.size:
        return
    _, vectors = torch.linalg.eigh(r @ moments.to(r) @ r.T)
    vectors = vectors.flip(1)
    heads.changed(tensors, block, lambda x: _left(vectors.T @ r, x))
    fresh = (q @ vectors).unflatten(0, (len(served), -1)).transpose(0, 1)
    moved = moved.clone()
    moved[..., index] = fresh.reshape(moved[..., index].shape)
    tensors[heads.output] = moved.movedim(-1, carrier.dim).contiguous()


def _rotate_keys(
    heads: Heads, tensors: Tensors, key: Block, queries: Sequence[Block], observed: Mapping[Block, torch.Tensor]
) -> None:
    """With ``E[q q^T] = L L^T`` and ``L^T M = U S V^T``, where ``E[k k^T] = M M^T``: keys become ``S^-1/2 U^T L^T k``."""
    jitter = 1e-12 * torch.eye(heads.group.size, dtype=torch.float64)
    for known in (observed, {}):
        moments = [torch.stack([heads.moments(b, known) for b in blocks]).sum(0) for blocks in (queries, [key])]
        if not any(float(torch.linalg.cond(m)) > 1e10 for m in moments):
            break  # a matrix that can hardly be inverted would cost digits
    else:
        return
    of_queries, of_keys = (torch.linalg.cholesky(m.double() + jitter.to(m.device) * m.trace()) for m in moments)
    u, s, _ = torch.linalg.svd(of_queries.T @ of_keys)
    into_keys = s.rsqrt()[:, None] * (u.T @ of_queries.T)
    into_queries = s.sqrt()[:, None] * (u.T @ torch.linalg.inv(of_queries))
    heads.changed(tensors, key, lambda x: _left(into_keys, x))
    for query in queries:
        heads.changed(tensors, query, lambda x: _left(into_queries, x))


def _left(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.einsum("pq,q...->p...", matrix.to(rows), rows)


def _on_block(
    tensor: torch.Tensor, carrier: Carrier, block: int, function: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    index = torch.from_numpy(carrier.positions[block]).to(tensor.device)
    first = tensor.movedim(carrier.dim, 0)
    return first.clone().index_copy_(0, index, function(first[index])).movedim(0, carrier.dim).contiguous()


def _ways(rest: list[Block]) -> Iterator[tuple[list[Block], list[Block]]]:
    """Ways in which blocks may be queries and keys: of two projections, or of one in turn or one after the other.

    Of grouped queries there are more than keys.
    """
    by_node: dict[fx.Node, list[Block]] = {}
    for block in rest:
        by_node.setdefault(block.node, []).append(block)
    if len(by_node) == 2:
        first, second = by_node.values()
        queries, keys = (first, second) if len(first) >= len(second) else (second, first)
        if keys and len(queries) % len(keys) == 0:
            yield queries, keys
        return
    half = len(rest) // 2
    yield rest[:half], rest[half:]
    yield rest[0::2], rest[1::2]
    for share in (2, 4, 8):  # queries a key
        keys_count = len(rest) // (share + 1)
        if keys_count and keys_count * (share + 1) == len(rest):
            yield rest[:-keys_count], rest[-keys_count:]
