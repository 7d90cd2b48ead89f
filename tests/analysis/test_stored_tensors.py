"""What the analysis makes of tensors that a model holds: weights worked out of others, centres of distances, sparse matrices."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stp_fx
from stp_fx.errors import FileError, InputError
from stp_fx.ir import provenance_of


class Standardised(nn.Conv2d):
    """Its weights are worked out anew at each call; what is worked out lives no longer than that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0)
        return F.conv2d(x, flat.reshape_as(self.weight), self.bias)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up = Standardised(8, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return x + y * torch.sigmoid(self.up(F.relu(self.down(y.mean((2, 3), keepdim=True)))))


def test_the_analysis_gives_the_same_each_time() -> None:
    """Of timm's NFNet, 5 to 13 groups were exact, by where Python put its tensors."""
    network = nn.Sequential(*(Gated() for _ in range(12))).eval()
    for _ in range(3):
        graph = stp_fx.analyze(stp_fx.trace(network, torch.randn(2, 8, 5, 5), validate=False))
        assert [group.exact for group in graph.groups if "down" in group.name] == [True] * 12


class Radial(nn.Module):
    """Distances to centres: a channel that is masked to zero still has a distance, one that is removed has none."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.a, self.b, self.p = nn.Linear(6, 8), nn.Linear(10, 4), p
        self.centres = nn.Parameter(torch.randn(10, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.exp(-torch.cdist(self.a(x), self.centres, self.p)))


class Apart(nn.Module):
    """Distances between activations, both of which are masked."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.a, self.b, self.p = nn.Linear(6, 8), nn.Linear(3, 4), p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.exp(-torch.cdist(self.a(x), self.a(x[:, :3] if x.dim() == 3 else x), self.p)))


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_distances(p: float, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    for model, x, exact in ((Radial(p), torch.randn(5, 6), False), (Apart(p), torch.randn(2, 5, 6), True)):
        gm = stp_fx.trace(model, x)
        assert {group.name: group.exact for group in stp_fx.analyze(gm).groups}["a.weight:0"] == exact
        pruned = stp_fx.prune_graph(gm, ratio=0.5)
        assert "masked = removed" in provenance_of(pruned).validation.ran
        kept = stp_fx.plan_of(pruned).kept["a.weight", 0]
        assert len(kept) == 4
        shorter = copy.deepcopy(model)
        shorter.a.weight, shorter.a.bias = (nn.Parameter(t[np.asarray(kept)]) for t in (model.a.weight, model.a.bias))
        if isinstance(shorter, Radial):
            kept = stp_fx.plan_of(pruned).kept["centres", 1]
            shorter.centres = nn.Parameter(model.centres[:, np.asarray(kept)])
            kept = stp_fx.plan_of(pruned).kept["centres", 0]
            shorter.centres = nn.Parameter(shorter.centres[np.asarray(kept)])
            shorter.b.weight = nn.Parameter(model.b.weight[:, np.asarray(kept)])
        torch.testing.assert_close(pruned(x), shorter(x))
    assert "planning again" not in caplog.text


class Neighbours(nn.Module):
    """A layer over a graph, whose adjacency is a sparse buffer."""

    def __init__(self, adjacency: torch.Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
        self.register_buffer("adjacency", adjacency)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.adjacency @ self.a(x)))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo])
def test_sparse_buffers(layout: torch.layout, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = torch.eye(5) + torch.diag(torch.ones(4), 1)
    model = Neighbours(dense.to_sparse(layout=layout)).eval()
    x = torch.randn(5, 6)
    gm = stp_fx.trace(model, x)
    assert {"eval", "train"} <= set(provenance_of(gm).validation.ran)
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    assert "masked = removed" in provenance_of(pruned).validation.ran
    assert pruned.adjacency.layout == layout
    assert pruned.get_parameter("a.weight").shape == (4, 6)
    assert pruned.adjacency is not model.adjacency
    expected = stp_fx.apply_plan(stp_fx.trace(Neighbours(dense).eval(), x), stp_fx.plan_of(pruned))
    expected.load_state_dict({k: v for k, v in pruned.state_dict().items() if k != "adjacency"}, strict=False)
    torch.testing.assert_close(pruned(x), expected(x))
    with pytest.raises(FileError, match=r"'adjacency' is a Tensor of .*sparse.*only dense tensors"):
        stp_fx.save(pruned, tmp_path / "pruned.stp")


class Sparse(nn.Module):
    """The sparse matrix as an input, a parameter, or made in the forward."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(6, 8), nn.Linear(8, 4), kind
        if kind == "parameter":
            self.matrix = nn.Parameter(torch.eye(5).to_sparse_coo())

    def forward(self, x: torch.Tensor, given: torch.Tensor | None = None) -> torch.Tensor:
        if self.kind == "parameter":
            given = self.matrix
        elif self.kind == "made":
            given = torch.sparse_coo_tensor(torch.tensor([[0, 1], [1, 0]]), torch.ones(2), (5, 5))
        return self.b(torch.relu(torch.sparse.mm(given, self.a(x))))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("kind", ["input", "csr input", "parameter", "made"])
def test_products_with_sparse_matrices(kind: str) -> None:
    torch.manual_seed(0)
    matrix = torch.eye(5).roll(1, 0)
    given = {"input": (matrix.to_sparse_coo(),), "csr input": (matrix.to_sparse_csr(),)}.get(kind, ())
    inputs = (torch.randn(5, 6), *given)
    pruned = stp_fx.prune_graph(Sparse(kind).eval(), ratio=0.5, example_inputs=inputs)
    assert "masked = removed" in provenance_of(pruned).validation.ran
    assert pruned.get_parameter("a.weight").shape == (4, 6)
    assert pruned(*inputs).shape == (5, 4)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*quantize_per_tensor")
def test_quantised_and_nested_tensors_are_refused() -> None:
    model = Neighbours(torch.eye(5))
    nested = torch.nested.nested_tensor([torch.randn(3, 6), torch.randn(4, 6)])
    with pytest.raises(InputError, match=r"nested or quantised tensor.*give dense tensors"):
        stp_fx.trace(model, nested)
    model.register_buffer("adjacency", torch.quantize_per_tensor(torch.eye(5), 0.1, 0, torch.qint8))
    with pytest.raises(InputError, match=r"'adjacency' is quantised.*prune before quantising"):
        stp_fx.trace(model, torch.randn(5, 6))


def test_numbers_that_differ_at_each_call_are_noted(caplog: pytest.LogCaptureFixture) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x) + torch.as_tensor(np.random.default_rng().normal(size=8), dtype=x.dtype))

    with caplog.at_level(logging.WARNING):
        stp_fx.trace(Noisy().eval(), torch.randn(5, 6))
    assert "the model gives other numbers each time" in caplog.text
