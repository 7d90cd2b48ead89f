"""What a forward writes (buffers, parameters, lists that it was given) and reads past its attributes, the graph does too."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stp_fx
from stp_fx.errors import InputError, TraceError


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.stats = nn.Module()
        self.stats.register_buffer("mean", torch.randn(8))
        self.register_buffer("last", torch.zeros(5, 8))
        self.teacher = nn.Linear(4, 8)


class Assigns(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        if self.training:
            self.stats.mean = torch.lerp(self.stats.mean, y.detach().mean(0), 0.2)
        return self.b(y - self.stats.mean)


class AssignsAndReturnsTheOld(Two):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.stats.mean
        self.stats.mean = before * 0.5 + self.a(x).detach().mean(0)
        return self.b(self.a(x) + self.stats.mean), before


class Exchanges(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("other", torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.stats.mean, self.other = self.other, self.stats.mean
        return self.b(self.a(x) * self.stats.mean + 2 * self.other)


class AssignsAnotherShape(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.a(x).detach()[:2]
        return self.b(self.a(x))


class Averages(Two):
    @torch.no_grad()
    def update(self) -> None:
        for one, other in zip(self.a.parameters(), self.teacher.parameters(), strict=True):
            other.data = other.data * 0.9 + one.data * 0.1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.update()
        return self.b(self.a(x)) + self.b(self.teacher(x))


class Clamps(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            for parameter in self.b.parameters():
                parameter.data.clamp_(-0.2, 0.2)
        return self.b(self.a(x))


class AssignsData(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.b.weight.data = F.normalize(self.b.weight.data * 2, dim=1)
        return self.b(self.a(x))


class CopiesInto(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.b.weight.copy_(F.normalize(self.b.weight, dim=1))
        return self.b(self.a(x))


class Penalty(Two):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.b(self.a(x)), sum((p.abs().sum() for p in self.parameters()), torch.zeros(()))


class ReadsDicts(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        named = dict(self.named_parameters())
        y = F.linear(x, named["a.weight"], named["a.bias"]) * self.state_dict()["stats.mean"]
        return F.linear(y, 2 * self.b._parameters["weight"], named["b.bias"])


class Appends(Two):
    def forward(self, x: list[torch.Tensor]) -> torch.Tensor:
        x.append(self.b(self.a(x[0])))
        return x[-1]


class Fills(Two):
    def forward(self, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x["y"] = self.b(self.a(x["x"]))
        return x


KINDS: dict[type[Two], Callable[[], Any]] = {
    **dict.fromkeys(
        (Assigns, AssignsAndReturnsTheOld, Exchanges, Averages, Clamps, AssignsData, CopiesInto, Penalty, ReadsDicts),
        lambda: torch.randn(5, 4),
    ),
    Appends: lambda: [torch.randn(5, 4)],
    Fills: lambda: {"x": torch.randn(5, 4)},
}


def leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in leaves(item)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_graph_writes_what_its_model_writes(kind: type[Two], training: bool) -> None:
    torch.manual_seed(0)
    model = kind().train(training)
    example, reference, state = KINDS[kind](), copy.deepcopy(model), copy.deepcopy(model.state_dict())
    gm = stp_fx.trace(model, (copy.deepcopy(example),), frontend="fx")
    assert all(torch.equal(now, state[name]) for name, now in model.state_dict().items())
    for graph in (gm, pickle.loads(pickle.dumps(gm)), copy.deepcopy(gm)):
        graph.load_state_dict(state, strict=False)  # a graph has what it reaches
        theirs = copy.deepcopy(reference)
        for mode in (training, training, not training, training):
            graph.train(mode), theirs.train(mode)
            one, other = copy.deepcopy(example), copy.deepcopy(example)
            torch.testing.assert_close(leaves(graph(one)), leaves(theirs(other)))
            torch.testing.assert_close(leaves(one), leaves(other))
        now = graph.state_dict()
        assert all(torch.allclose(now[name], t) for name, t in theirs.state_dict().items() if name in now)
        sum(leaf.sum() for leaf in leaves(graph(copy.deepcopy(example))) if leaf.requires_grad).backward()


def test_a_buffer_of_another_shape_is_noted(caplog: pytest.LogCaptureFixture) -> None:
    stp_fx.trace(AssignsAnotherShape(), torch.randn(5, 4), frontend="fx")
    assert "the forward assigns to last, which the graph does not keep" in caplog.text


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_numbers_from_call_to_call_are_noted(frontend: str, caplog: pytest.LogCaptureFixture) -> None:
    class Counts(Two):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.b(self.a(x)) * self.calls

    stp_fx.trace(Counts(), torch.randn(5, 4), frontend=frontend)
    assert caplog.text.count("the forward assigns to calls") == 1


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_hooks_on_gradients_are_noted(frontend: str, caplog: pytest.LogCaptureFixture) -> None:
    class Hooked(Two):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            if y.requires_grad:
                y.register_hook(lambda gradient: gradient * 0.1)
            return self.b(y)

    model = Hooked()
    model.b.weight.register_hook(lambda gradient: gradient * 0.5)
    gm = stp_fx.trace(model, torch.randn(5, 4), frontend=frontend)
    assert "gradient" in caplog.text
    caplog.clear()
    stp_fx.prune_graph(gm)
    assert "hooks on the gradient of 'b.weight' stay on the original" in caplog.text


@pytest.mark.parametrize("kind", [Appends, Fills])
def test_an_export_that_leaves_its_arguments_alone_is_refused(kind: type[Two]) -> None:
    with pytest.raises(TraceError, match="changes a list or dict among its arguments"):
        stp_fx.trace(kind(), (KINDS[kind](),), frontend="export")


DRAWS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "numpy generator": (numpy.random.default_rng(0), lambda held: held.random()),
    "numpy state": (numpy.random.RandomState(0), lambda held: held.rand()),
    "random": (random.Random(0), lambda held: held.random()),
    "torch": (torch.Generator(), lambda held: torch.rand((), generator=held)),
    "unseeded": (None, lambda held: numpy.random.default_rng().random()),
}


@pytest.mark.parametrize(("frontend", "kind"), [*(("fx", k) for k in DRAWS), ("export", "numpy generator"), ("export", "random")])
def test_draws_from_held_generators_are_noted_and_taken_back(frontend: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    class Draws(Two):
        def __init__(self) -> None:
            super().__init__()
            self.held = copy.deepcopy(DRAWS[kind][0]) if kind != "torch" else torch.Generator()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x)) * DRAWS[kind][1](self.held)

    model = Draws()
    stp_fx.trace(model, torch.randn(5, 4), frontend=frontend)
    assert "draws random numbers in Python" in caplog.text
    fresh = Draws().held
    assert kind == "unseeded" or DRAWS[kind][1](model.held) == DRAWS[kind][1](fresh)


# -- arguments without a tensor --------------------------------------------------------------------------------------------


class Mixed(Two):
    def forward(self, x: Any, mask: Any, y: Any = None, times: int = 1, *, mode: str = "mul") -> torch.Tensor:
        z = self.a(x) if y is None else self.a(x) + self.a(y)
        z = z if mask is None else z * mask
        return self.b(z * times if mode == "mul" else z + times)


EXAMPLES = [
    (lambda: (torch.randn(5, 4), None), {}),
    (lambda: (torch.randn(5, 4), None, torch.randn(5, 4)), {}),
    (lambda: (torch.randn(5, 4), None, torch.randn(5, 4), 3), {"mode": "add"}),
    (lambda: (torch.randn(5, 4), torch.randn(5, 1), None, 2), {}),
    (lambda: (torch.randn(5, 4), None), {"times": 2, "mode": "add"}),
]


@pytest.mark.parametrize("frontend", ["fx", "export"])
@pytest.mark.parametrize(("make", "kwargs"), EXAMPLES)
def test_a_graph_is_called_as_its_model_is(make: Callable[[], Any], kwargs: dict[str, Any], frontend: str) -> None:
    model, example = Mixed().eval(), make()
    gm = stp_fx.trace(model, example, kwargs=kwargs, frontend=frontend)
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    tensors = [value for value in example if isinstance(value, torch.Tensor)]
    for graph in (gm, pickle.loads(pickle.dumps(gm)), copy.deepcopy(gm)):
        torch.testing.assert_close(graph(*example, **kwargs), model(*example, **kwargs))
    assert pruned(*example).shape == (5, 3)
    assert stp_fx.prune_graph(gm, "variance", 0.5, calibration=[example, tuple(tensors)])(*example).shape == (5, 3)
    result = stp_fx.write_back(pruned, model)
    torch.testing.assert_close(result(*example, **kwargs), pruned(*example))


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_another_constant_is_refused(frontend: str) -> None:
    gm = stp_fx.trace(Mixed(), (torch.randn(5, 4), None, torch.randn(5, 4), 3), frontend=frontend)
    with pytest.raises(AssertionError, match=r"holds for times=3, as in its example"):
        gm(torch.randn(5, 4), None, torch.randn(5, 4), 2)
    with pytest.raises(AssertionError, match=r"holds for mask=None"):
        gm(torch.randn(5, 4), torch.randn(8), torch.randn(5, 4), 3)


@pytest.mark.parametrize("name", ["graph", "meta", "code"])
@pytest.mark.parametrize("value", [nn.Linear(4, 4), nn.Parameter(torch.randn(4))], ids=["module", "parameter"])
def test_names_that_a_graph_needs_are_refused(name: str, value: Any) -> None:
    class Named(Two):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    model = Named()
    setattr(model, name, value)
    with pytest.raises(InputError, match=f"holds '{name}'.*rename it, '{name}_'"):
        stp_fx.trace(model, torch.randn(5, 4))
