"""Products of queries and keys that lose head dimensions: what these gave to the scores is folded into the queries.

With ``k_P`` (lost) regressed on ``k_K`` (kept), ``q k^T = q_K k_K^T + q_P k_P^T`` is nearest to ``(q B) k_K^T`` for
``B = (K^T K_K) (K_K^T K_K)^-1``, from the keys' second moments. So the queries' layer is refitted towards ``q B``. Where
queries are rotated by their positions, or normalised, on their way to the product, they are left as they are.

Source: CORP, arXiv 2602.05243.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Set

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx

from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.survivors import Survivors
from stp_fx.rewrite.residuals import needed, origin
from stp_fx.rewrite.side_by_side import Network

__all__ = ["KeyMoments", "ScorePath", "score_paths"]

_PRODUCTS = frozenset({operator.matmul, torch.matmul, torch.bmm, F.scaled_dot_product_attention, "matmul", "bmm"})
_RIDGE = 1e-6


@dataclasses.dataclass(frozen=True)
class ScorePath:
    """From a layer to the ``query`` that it gives; ``nodes`` have to be run in between. The product with ``key`` sums over the
    query's dimension ``query_dim`` and the key's ``key_dim``, of which the flagged positions are ``lost``."""

    query: str
    key: str
    query_dim: int
    key_dim: int
    lost: np.ndarray
    nodes: tuple[str, ...]


def score_paths(network: Network, graph: ChannelGraph, survivors: Survivors, layers: Set[str]) -> dict[str, list[ScorePath]]:
    """The products of ``network``, by the layer that gives their queries."""
    found: dict[str, list[ScorePath]] = {}
    for node in network.nodes:
        if node.target not in _PRODUCTS or node in network.left_out or len(node.args) < 2:
            continue
        query, key = node.args[:2]
        if not isinstance(query, fx.Node) or not isinstance(key, fx.Node) or query is key:
            continue
        lost = {source: (dim, flags) for source, dim, flags in survivors.removed_inputs(node.name, (query.name, key.name))}
        if lost.keys() != {query.name, key.name} or not np.array_equal(lost[query.name][1], lost[key.name][1]):
            continue
        layer = origin(query, layers)
        nodes = None if layer is None else needed(network, query, network.at[layer])
        if layer is None or nodes is None or layers & set(nodes):
            continue
        (query_dim, flags), (key_dim, _) = lost[query.name], lost[key.name]
        found.setdefault(layer, []).append(ScorePath(query.name, key.name, query_dim, key_dim, flags, nodes))
    return found


class KeyMoments:
    """Second moments of keys [batch, ..., positions, head dimension], apart for each head."""

    def __init__(self, path: ScorePath) -> None:
        self._path, self._kept = path, torch.from_numpy(np.flatnonzero(~path.lost))
        self._sum: torch.Tensor | None = None

    def add(self, key: torch.Tensor) -> None:
        """Keys of one batch, all head dimensions."""
        key = key.movedim(self._path.key_dim, -1)
        if key.dim() < 4:
            return
        square = torch.einsum("b...md,b...me->...de", key, key).double()
        self._sum = square if self._sum is None else self._sum + square

    def folded(self, query: torch.Tensor) -> torch.Tensor | None:
        """What queries with all head dimensions become on the kept ones; None where heads are not apart."""
        if self._sum is None:
            return None
        kept = self._kept.to(query.device)
        among = self._sum.index_select(-1, kept).index_select(-2, kept)
        ridge = _RIDGE * among.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
        among = among + ridge[..., None, None] * torch.eye(len(kept), dtype=among.dtype, device=among.device)
        basis = torch.linalg.solve(among, self._sum.index_select(-2, kept)).mT
        query = query.movedim(self._path.query_dim, -1)
        if query.dim() < 4 or query.shape[1:-2] != basis.shape[:-2]:
            return None
        return (query @ basis.to(query)).movedim(-1, self._path.query_dim)
