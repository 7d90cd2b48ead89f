"""Code as people write it, which the fx front end takes: einops, checked annotations, numbers of buffers, compiled parts."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import einops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from beartype import beartype
from einops import pack, rearrange, reduce, repeat, unpack
from einops.layers.torch import EinMix, Rearrange, Reduce
from jaxtyping import Float, jaxtyped
from torch import Tensor, nn

import stp_fx
from stp_fx.errors import TraceError
from stp_fx.ir import provenance_of

X = torch.randn(2, 3, 8, 8)
OTHER = torch.randn(5, 3, 12, 10)
Body = Callable[["Convs", Tensor], Tensor]


class Convs(nn.Module):
    """Two convolutions, and what ``body`` does between them."""

    def __init__(self, body: Body, **parts: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), body
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.body(self, self.a(x)))


def held_together(net: Convs, y: Tensor) -> Tensor:
    """Sizes as numbers of a call that remembers its results by them."""
    return rearrange(rearrange(y, "b c h w -> b (h w) c"), "b (h w) c -> b c h w", h=y.shape[2])


def packed(net: Convs, y: Tensor) -> Tensor:
    together, shapes = pack([y], "b c *")
    return unpack(together, shapes, "b c *")[0]


def imported_within(net: Convs, y: Tensor) -> Tensor:
    from einops import rearrange as rearranged

    return rearranged(y, "b c h w -> b h w c").permute(0, 3, 1, 2)


def attention(net: Convs, y: Tensor) -> Tensor:
    q, k, v = (einops.rearrange(t, "b (n c) h w -> b n (h w) c", n=2) for t in (y, y.relu(), y.sigmoid()))
    weights = einops.einsum(q, k, "b n i c, b n j c -> b n i j").softmax(-1)
    values = einops.einsum(weights, v, "b n i j, b n j c -> b n i c")
    return rearrange(values, "b n (h w) c -> b (n c) h w", w=y.shape[3])


EINOPS: dict[str, Body] = {
    "rearrange": held_together,
    "reduce": lambda net, y: reduce(y, "b c (h 2) (w 2) -> b c h w", "mean"),
    "repeat": lambda net, y: repeat(y, "b c h w -> b c (h 2) (w 2)"),
    "pack": packed,
    "attention": attention,
    "imported in the forward": imported_within,
    "parse_shape": lambda net, y: rearrange(y.flatten(2), "b c (h w) -> b c h w", **einops.parse_shape(y, "_ _ h w")),
}


def checked(model: nn.Module, x: Tensor = X, other: Tensor | None = OTHER) -> torch.fx.GraphModule:
    """Pruned by half: captured by fx, checked in full, and right for another batch and another size."""
    model.eval()
    gm = stp_fx.trace(model, x, frontend="fx")
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    validation = provenance_of(pruned).validation
    assert {"eval", "train", "masked = removed"} <= set(validation.ran), validation
    if other is not None:
        torch.testing.assert_close(gm(other), model(other))
        assert pruned(other).shape == model(other).shape
    return pruned


@pytest.mark.parametrize("name", EINOPS)
def test_einops_functions(name: str) -> None:
    pruned = checked(Convs(EINOPS[name]))
    assert pruned.get_parameter("a.weight").shape[0] == 4


@pytest.mark.parametrize(
    ("layer", "last"),
    [
        (Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2), nn.Linear(32, 5)),
        (Reduce("b c h w -> b c", "max"), nn.Linear(8, 5)),
        (EinMix("b c h w -> b h w o", weight_shape="c o", bias_shape="o", c=8, o=6), nn.Linear(6, 5)),
    ],
)
def test_einops_layers(layer: nn.Module, last: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), copy.deepcopy(layer), copy.deepcopy(last))
    assert checked(model).get_parameter("0.weight").shape[0] == 4


class Typed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)


class Beartyped(Typed):
    @beartype
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Jaxtyped(Typed):
    @jaxtyped(typechecker=beartype)
    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o h w"]:  # noqa: F722
        return self.b(self.a(x))


@pytest.mark.parametrize("kind", [Beartyped, Jaxtyped])
def test_checked_annotations(kind: type[nn.Module]) -> None:
    checked(kind())


class Numbers(Typed):
    """Numbers of buffers, and of what follows from them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(2))
        self.register_buffer("scale", torch.tensor([0.5, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) * self.scale[0].item()
        for _ in range(int(self.steps)):
            y = F.relu(y)
        if (self.scale * 2).max() > 3:
            y = y + float(self.scale.sum())
        for value in self.scale.numpy():
            y = y * float(value)
        return self.b(y) * self.scale.tolist()[1] + float(np.asarray(self.scale).sum())


def test_numbers_of_buffers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        checked(Numbers())
    assert "reads numbers of 'scale', which the graph keeps as they are now" in caplog.text
    assert "reads numbers of 'steps'" in caplog.text


class Counting(Typed):
    """A buffer that the forward itself writes has no number to keep."""

    def __init__(self, write: Callable[[Counting], None]) -> None:
        super().__init__()
        self.write = write
        self.register_buffer("count", torch.tensor(0))
        self.limit = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        self.write(self)
        return self.b(self.a(x)) * 2 if self.count > 1 else self.b(self.a(x))


def add(net: Counting) -> None:
    net.count += 1


def add_to_view(net: Counting) -> None:
    net.count.view(1).add_(1)


def assign(net: Counting) -> None:
    net.count = net.count + 1


@pytest.mark.parametrize("write", [add, add_to_view, assign])
def test_numbers_of_what_is_written_are_refused(write: Callable[[Counting], None]) -> None:
    with pytest.raises(TraceError, match="a graph has no branches on data"):
        stp_fx.trace(Counting(write).eval(), X, frontend="fx")


class Learnt(Typed):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.gain.item())


def test_numbers_of_parameters_are_refused() -> None:
    with pytest.raises(TraceError, match=r"item\(\) of a tensor whose value depends on the data"):
        stp_fx.trace(Learnt().eval(), X, frontend="fx")


ELSEWHERE = [nn.Sequential(nn.ReLU(), nn.Upsample(scale_factor=2)), nn.Conv2d(8, 8, 1)]


@pytest.mark.parametrize(
    "body",
    [
        lambda net, y: nn.ReLU()(y),
        lambda net, y: nn.Softmax(dim=1)(y),
        lambda net, y: ELSEWHERE[0](y),
        lambda net, y: y * nn.MSELoss()(y, y.detach()),
    ],
    ids=["activation", "softmax", "held elsewhere", "loss"],
)
def test_modules_outside_of_the_tree(body: Body) -> None:
    assert checked(Convs(body)).get_parameter("a.weight").shape[0] == 4


def test_weights_outside_of_the_tree_are_refused() -> None:
    with pytest.raises(TraceError, match="calls a Conv2d that is no submodule of the model, and holds 'weight'"):
        stp_fx.trace(Convs(lambda net, y: ELSEWHERE[1](y)).eval(), X, frontend="fx")


@functools.lru_cache(maxsize=8)
def remembered_grid(height: int, width: int) -> Tensor:
    return torch.arange(height * width).float().reshape(height, width)


class Cached(Typed):
    """A table that is made once and kept, on the module and by a decorator."""

    grid: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.grid is None or self.grid.shape[-2:] != y.shape[-2:]:
            self.grid = torch.arange(y.shape[-1]).float().expand(y.shape[-2], -1)
        return self.b(y + self.grid + remembered_grid(y.shape[2], y.shape[3]))


def test_cached_tables() -> None:
    remembered_grid.cache_clear()
    model = Cached().eval()
    gm = stp_fx.trace(model, X, frontend="fx")
    assert model.grid is None
    assert remembered_grid.cache_info().currsize <= 2, "the checks call it, the trace does not"
    torch.testing.assert_close(gm(OTHER), model(OTHER))


@torch.compile
def compiled(x: Tensor) -> Tensor:
    return F.relu(x) * 2


def scripted(x: Tensor, factor: float) -> Tensor:
    return x * factor + torch.relu(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripted_functions() -> None:
    function = torch.jit.script(scripted)
    checked(Convs(lambda net, y: function(y, 2.0)))


def test_compiled_functions() -> None:
    setting = torch._dynamo.config.error_on_nested_fx_trace
    for _ in range(2):
        stp_fx.trace(Convs(lambda net, y: compiled(y)).eval(), X, frontend="fx", validate=False)
        assert torch._dynamo.config.error_on_nested_fx_trace is setting
    gm = stp_fx.trace(Convs(lambda net, y: compiled(y)).eval(), X, frontend="fx", validate=False)
    assert torch.relu in {n.target for n in gm.graph.nodes} or F.relu in {n.target for n in gm.graph.nodes}


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_submodules(how: str) -> None:
    inner = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
    if how == "wrapped":
        inner = torch.compile(inner)  # type: ignore[assignment]
    else:
        inner.compile()
    model = Convs(lambda net, y: net.get_submodule("inner")(y), inner=inner).eval()
    gm = stp_fx.trace(model, X, frontend="fx", validate=False)
    assert set(gm.state_dict()) == set(model.state_dict())
    plain = copy.deepcopy(gm)
    expected = model.b(F.relu(F.conv2d(model.a(X), *inner.parameters())))
    torch.testing.assert_close(plain(X), expected)
    pruned = stp_fx.prune_graph(gm, ratio=0.5, validate=False)
    assert pruned(X).shape == expected.shape


def test_a_compiled_model_is_captured_as_it_was_before(caplog: pytest.LogCaptureFixture) -> None:
    model = Convs(lambda net, y: F.relu(y)).eval()
    with caplog.at_level(logging.WARNING):
        gm = stp_fx.trace(torch.compile(model), X)
    assert set(gm.state_dict()) == set(model.state_dict())
    assert "torch.compile" in caplog.text
    torch.testing.assert_close(gm(X), model(X))
