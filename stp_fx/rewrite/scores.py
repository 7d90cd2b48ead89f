"""Products of queries and keys that lose head dimensions: the target is the original's scores, not its kept queries and keys.

``Q K^T`` is nearest to ``(Q A) (K B)^T``, with as many columns as head dimensions are kept, where in turns
``A = K^T K B (B^T K^T K B)^-1`` and the same for B: alternating least squares from the kept dimensions, on second moments alone,
ends at the truncated singular value decomposition. So the layers of queries and keys are refitted towards ``Q A`` and ``K B``;
what lost dimensions gave is folded into those kept. Scores under a softmax do not change with the mean of the keys. (Values need
nothing of the kind: the projection after them is refitted on what is left.)

Where a query is rotated by its position, or normalised, on its way to the product, it is left as it is.

Source: CORP, arXiv 2602.05243 (half of the first turn).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence, Set

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx

from stp_fx.analysis.survivors import Survivors
from stp_fx.rewrite.residuals import needed, origin
from stp_fx.rewrite.side_by_side import Network

__all__ = ["Fold", "Folding", "find_folds"]

_ATTENTION = F.scaled_dot_product_attention
_PRODUCTS = frozenset({operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm", _ATTENTION})
_SOFTMAX = frozenset({F.softmax, torch.softmax, "softmax"})
_RIDGE = 1e-6
_TURNS = 8

Value = Callable[[str, int], torch.Tensor]
"""The value of a node in the original network, of which only dimension ``int`` is whole."""


@dataclasses.dataclass(frozen=True, eq=False)
class Fold:
    """From a layer to a ``value``, a query or a key, of whose dimension ``dim`` the flagged positions are ``lost``; ``nodes``
    have to be run in between. ``product``: queries and keys that meet, and their dimensions that are summed over; ``softmax``:
    whether their scores go into one."""

    is_key: bool
    value: str
    dim: int
    lost: np.ndarray
    nodes: tuple[str, ...]
    product: tuple[tuple[str, int], tuple[str, int]]
    softmax: bool


def find_folds(network: Network, survivors: Survivors, layers: Set[str]) -> dict[str, list[Fold]]:
    """Queries and keys that lose head dimensions and come from a layer, by layer."""
    found: dict[str, list[Fold]] = {}
    for node in network.nodes:
        if node.target in _PRODUCTS and node not in network.left_out:
            operands = [a for a in node.args[:2] if isinstance(a, fx.Node)]
            for layer, fold in _scores(network, survivors, layers, node, operands):
                found.setdefault(layer, []).append(fold)
    return found


def _scores(
    network: Network, survivors: Survivors, layers: Set[str], node: fx.Node, operands: Sequence[fx.Node]
) -> list[tuple[str, Fold]]:
    """Of a product of queries and keys, both sides."""
    if len(operands) < 2 or operands[0] is operands[1]:
        return []
    sides = operands[:2]
    lost = {source: (dim, flags) for source, dim, flags in survivors.removed_inputs(node.name, [side.name for side in sides])}
    ways = [_way(network, side, layers) for side in sides]
    if len(lost) < 2 or not np.array_equal(lost[sides[0].name][1], lost[sides[1].name][1]):
        return []
    (query, key) = ((side.name, lost[side.name][0]) for side in sides)
    softmax = node.target is _ATTENTION or _meets_softmax(node)
    return [
        (way[0], Fold(is_key, side.name, *lost[side.name], way[1], (query, key), softmax))
        for is_key, side, way in zip((False, True), sides, ways, strict=True)
        if all(ways) and way is not None
    ]


def _way(network: Network, value: fx.Node, layers: Set[str]) -> tuple[str, tuple[str, ...]] | None:
    """The layer that gives a value, and the nodes in between."""
    layer = origin(value, layers)
    nodes = None if layer is None else needed(network, value, network.at[layer])
    return None if layer is None or nodes is None or layers & set(nodes) else (layer, nodes)


def _meets_softmax(node: fx.Node) -> bool:
    """Whether scores go into a softmax, scaled or masked on the way."""
    for _ in range(6):
        users = list(node.users)
        if len(users) != 1:
            return False
        node = users[0]
        name = getattr(node.target, "__name__", str(node.target)).lower()
        if node.target in _SOFTMAX or name.endswith("softmax"):
            return True
    return False


class Folding:
    """What a fold makes of its value, from the moments of all batches; heads apart."""

    def __init__(self, fold: Fold) -> None:
        self._fold = fold
        self._moments: list[torch.Tensor | None] = [None, None]
        self._known = True

    def add(self, value_of: Value) -> None:
        """Queries and keys of one batch: [batch, heads, ..., positions, head dimension] once that dimension is last."""
        values = [value_of(name, dim).movedim(dim, -1) for name, dim in self._fold.product]
        if any(v.dim() < 4 or v.shape[1:-2] != values[0].shape[1:-2] for v in values):
            self._known = False  # heads lie in the batch, or have different numbers
            return
        for k, value in enumerate(values):
            if k == 1 and self._fold.softmax:
                value = value - value.mean(-2, keepdim=True)
            square = torch.einsum("b...md,b...me->...de", value, value).double()
            before = self._moments[k]
            self._moments[k] = square if before is None else before + square

    def goal(self, value_of: Value) -> torch.Tensor | None:
        """What the kept positions of the fold's value should be for one batch; None where it cannot be said."""
        if not self._known or None in self._moments:
            return None
        value = value_of(self._fold.value, self._fold.dim).movedim(self._fold.dim, -1)
        basis = self._basis.to(value)
        return (value @ basis).movedim(-1, self._fold.dim) if value.shape[1:-2] == basis.shape[:-2] else None

    @functools.cached_property
    def _basis(self) -> torch.Tensor:
        """[heads, ..., head dimension, kept]."""
        queries, keys = self._moments
        assert queries is not None
        assert keys is not None
        kept = torch.from_numpy(np.flatnonzero(~self._fold.lost)).to(keys.device)
        of_keys = torch.eye(keys.shape[-1], dtype=keys.dtype, device=keys.device)[:, kept]
        of_queries = _best(keys, of_keys)
        for _ in range(_TURNS):
            of_keys = _best(queries, of_queries)
            of_queries = _best(keys, of_keys)
        return of_keys if self._fold.is_key else of_queries


def _best(moments: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """What one side is multiplied with, best, if the other, with these moments, is multiplied with ``basis``."""
    mixed = moments @ basis
    among = basis.mT @ mixed
    ridge = _RIDGE * among.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
    among = among + ridge[..., None, None] * torch.eye(among.shape[-1], dtype=among.dtype, device=among.device)
    return torch.linalg.solve(among, mixed.mT).mT
