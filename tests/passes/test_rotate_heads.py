"""Another basis inside every head keeps the function, and the last positions are those that matter least."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from prenorm import PreNorm
from torch import nn

import stp_fx
from stp_fx.errors import InputError, NothingToRotateError
from stp_fx.passes import RotateHeads

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


class Attention(nn.Module):
    """Attention of 4 heads of 6 positions, with ``shared`` heads of keys and values; ``rotary`` positions, or none."""

    def __init__(self, shared: int = 4, *, bias: bool = True, rotary: bool = False, plain: bool = False) -> None:
        super().__init__()
        self.shared, self.rotary, self.plain = shared, rotary, plain
        self.q, self.k, self.v = nn.Linear(10, 24, bias), nn.Linear(10, 6 * shared, bias), nn.Linear(10, 6 * shared, bias)
        self.out = nn.Linear(24, 10, bias)
        angles = torch.outer(torch.arange(5.0), torch.rand(3) + 0.5)
        self.register_buffer("cos", torch.cat([angles.cos()] * 2, 1))
        self.register_buffer("sin", torch.cat([angles.sin()] * 2, 1))

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 4, 6).transpose(1, 2)
        k, v = (p(x).view(b, t, self.shared, 6).transpose(1, 2) for p in (self.k, self.v))
        if self.rotary:
            q, k = self.turned(q), self.turned(k)
        k, v = (y.repeat_interleave(4 // self.shared, 1) for y in (k, v))
        y = (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v if self.plain else F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, t, 24))


OPTIONS = {
    "heads of their own": {}, "grouped queries": {"shared": 2}, "one head of keys": {"shared": 1}, "no bias": {"bias": False},
    "written out": {"plain": True}, "rotary": {"rotary": True}, "rotary, grouped": {"rotary": True, "shared": 2},
}  # fmt: skip


def made(name: str) -> tuple[Attention, torch.fx.GraphModule, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Attention(**OPTIONS[name]).double().eval(), torch.randn(3, 5, 10, dtype=torch.float64)
    return model, stp_fx.trace(model, x), x


@pytest.mark.parametrize("name", OPTIONS)
def test_the_function_is_kept(name: str) -> None:
    model, gm, x = made(name)
    rotated = RotateHeads()(gm).graph_module
    torch.testing.assert_close(rotated(x), model(x), **CLOSE)
    moved = {key for key, value in rotated.state_dict().items() if not torch.equal(value, gm.state_dict()[key])}
    weights = {"v.weight", "out.weight"} if "rotary" in name else {"q.weight", "k.weight", "v.weight", "out.weight"}
    assert {key for key in moved if key.endswith("weight")} == weights


@pytest.mark.parametrize("name", ["heads of their own", "grouped queries", "written out"])
def test_the_first_positions_are_the_best_approximation_of_a_head(name: str) -> None:
    """Eckart and Young: what the last positions of head 0 add to its map are the smallest singular values."""
    _, gm, _ = made(name)
    rotated = RotateHeads()(gm).graph_module

    def product(graph: torch.fx.GraphModule, positions: slice) -> torch.Tensor:
        served = range(24 // len(graph.get_parameter("v.weight")))
        out = torch.cat([graph.get_parameter("out.weight")[:, 6 * h : 6 * h + 6] for h in served])
        into = torch.cat([graph.get_parameter("v.weight"), graph.get_parameter("v.bias")[:, None]], 1)[:6]
        return out[:, positions] @ into[positions]

    whole = product(gm, slice(0, 6))
    torch.testing.assert_close(product(rotated, slice(0, 6)), whole, **CLOSE)
    singular = torch.linalg.svdvals(whole)
    for kept in range(1, 6):
        lost = torch.linalg.matrix_norm(product(rotated, slice(kept, 6)))
        torch.testing.assert_close(lost, singular[kept:].square().sum().sqrt(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["heads of their own", "no bias", "written out"])
def test_with_data_the_first_positions_lose_least_of_what_the_heads_give(name: str) -> None:
    """Eckart and Young again: of what head 0 adds to the output on these inputs, any other rank-r matrix loses more."""
    model, gm, _ = made(name)
    x = torch.randn(64, 5, 10, dtype=torch.float64) * torch.linspace(0.1, 2, 10, dtype=torch.float64)
    rotated = RotateHeads([x[:32], x[32:]])(gm).graph_module
    torch.testing.assert_close(rotated(x), model(x), **CLOSE)
    read: list[torch.Tensor] = []
    for graph in (gm, rotated):
        graph.get_submodule("out").register_forward_pre_hook(lambda _, args: read.append(args[0].detach()))
        graph(x)
    given = [
        part[..., :6].reshape(-1, 6) @ graph.get_parameter("out.weight")[:, :6].T for part, graph in zip(read, (gm, rotated))
    ]
    torch.testing.assert_close(given[0], given[1], **CLOSE)
    singular = torch.linalg.svdvals(given[0])
    for kept in range(1, 6):
        left = read[1][..., :kept].reshape(-1, kept) @ rotated.get_parameter("out.weight")[:, :kept].T
        lost = torch.linalg.matrix_norm(given[0] - left)
        torch.testing.assert_close(lost, singular[kept:].square().sum().sqrt(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["heads of their own", "written out"])
def test_with_data_the_first_positions_of_queries_and_keys_lose_least_of_the_scores(name: str) -> None:
    """For queries and keys drawn independently from what the data shows: the expected square of what is lost is the sum of
    the squares of the last singular values."""
    _, gm, _ = made(name)
    x = torch.randn(64, 5, 10, dtype=torch.float64) * torch.linspace(0.1, 2, 10, dtype=torch.float64)
    rotated = RotateHeads([x])(gm).graph_module
    factors = {}
    for label, graph in (("before", gm), ("after", rotated)):
        for each in ("q", "k"):
            y = graph.get_submodule(each)(x)[..., :6].reshape(-1, 6).detach()
            factors[label, each] = y
    scores = factors["before", "q"] @ factors["before", "k"].T
    torch.testing.assert_close(factors["after", "q"] @ factors["after", "k"].T, scores, **CLOSE)
    singular = torch.linalg.svdvals(scores)
    for kept in range(1, 6):
        left = factors["after", "q"][:, :kept] @ factors["after", "k"][:, :kept].T
        lost = torch.linalg.matrix_norm(scores - left)
        torch.testing.assert_close(lost, singular[kept:].square().sum().sqrt(), rtol=1e-7, atol=1e-7)


def test_positions_that_the_data_never_uses_leave_the_function_as_it_is() -> None:
    """Second moments that cannot be inverted: the weights say which matrix to take for queries and keys."""
    model, gm, _ = made("no bias")
    x = torch.randn(4, 5, 1, dtype=torch.float64) * torch.randn(10, dtype=torch.float64)  # all inputs on one line
    rotated = RotateHeads([x])(gm).graph_module
    y = torch.randn(3, 5, 10, dtype=torch.float64)
    torch.testing.assert_close(rotated(y), model(y), **CLOSE)


def test_data_that_does_not_fit_is_refused() -> None:
    _, gm, _ = made("heads of their own")
    for bad, said in (([], "no batch"), ([torch.full((2, 5, 10), torch.nan, dtype=torch.float64)], "not finite")):
        with pytest.raises(InputError, match=said):
            RotateHeads(bad)(gm)


def test_a_branch_that_another_batch_would_take_is_an_error_of_ours() -> None:
    class Branching(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if x.shape[1] == 5 else x[:, :5])

    x = torch.randn(3, 5, 10)
    gm = stp_fx.trace(Branching().eval(), x)
    with pytest.raises(
        InputError, match=r"finding the basis of heads fails at calibration batch 1 with .*traced for another shape"
    ):
        RotateHeads([x, torch.randn(3, 7, 10)])(gm)


def test_cutting_head_positions_costs_less() -> None:
    _, gm, x = made("heads of their own")
    rotated = RotateHeads()(gm).graph_module

    def error(graph: torch.fx.GraphModule, positions: list[int]) -> float:
        plan = stp_fx.analyze(graph).plan_for({"v": [6 * head + p for head in range(4) for p in positions]})
        with torch.no_grad():
            return float((stp_fx.apply_plan(graph, plan, validate=False)(x) - gm(x)).square().mean())

    assert error(rotated, [4, 5]) < 0.5 * min(error(gm, [a, b]) for a in range(6) for b in range(a))


@pytest.mark.parametrize("seed", range(0, 24, 2))
def test_random_networks_with_fused_projections(seed: int) -> None:
    model = PreNorm(seed)
    rotated = RotateHeads()(stp_fx.trace(model, model.example(), validate=False)).graph_module
    x = model.example(3, 1)
    torch.testing.assert_close(rotated(x), model(x), **CLOSE)


def test_networks_without_attention_say_so() -> None:
    with pytest.raises(NothingToRotateError, match="no attention between stored projections"):
        RotateHeads()(stp_fx.trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4)))


CHAINS = {
    "linear layers": (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5)), (3, 6)),
    "a view in between": (nn.Sequential(nn.Linear(6, 5), nn.Dropout(), nn.Flatten(0, 1), nn.Linear(5, 5, bias=False)), (3, 2, 6)),
    "convolutions": (nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.AvgPool2d(2), nn.Conv2d(6, 7, 1)), (2, 3, 12, 12)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_of_linear_layers_are_cut_where_it_costs_least(name: str) -> None:
    torch.manual_seed(0)
    model, shape = CHAINS[name]
    model, x = model.double().eval(), torch.randn(*shape, dtype=torch.float64)
    rotated = RotateHeads()(stp_fx.trace(model, x)).graph_module
    torch.testing.assert_close(rotated(x), model(x), **CLOSE)
    (first, last) = rotated.get_parameter("0.weight"), [p for k, p in rotated.named_parameters() if k.endswith("weight")][-1]
    columns = last.detach().flatten(1).square().sum(0)
    torch.testing.assert_close(columns, torch.ones_like(columns), **CLOSE)
    energy = torch.cat([first.flatten(1), rotated.get_parameter("0.bias")[:, None]], 1).detach().square().sum(1)
    assert bool((energy[:-1] >= energy[1:] - 1e-12).all())
    assert first.shape == model.get_parameter("0.weight").shape


def test_an_activation_in_between_is_no_chain() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4))
    with pytest.raises(NothingToRotateError, match="no head can be turned"):
        RotateHeads()(stp_fx.trace(model, torch.randn(3, 6)))
