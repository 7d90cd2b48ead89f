"""How detectors are written: anchors made in the forward and kept, steps held by tensors, a second head on detached maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stp_fx
from stp_fx.errors import TraceError
from stp_fx.ir import provenance_of

X = torch.randn(2, 3, 32, 32)


class Taking(nn.Module):
    """``body`` gives tensors of one element to calls that take numbers."""

    def __init__(self, body: Callable[[Taking, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), body
        self.steps = torch.tensor([4.0, 8.0])  # an attribute, as strides are
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.body(self, self.a(x)))


TAKES: dict[str, Callable[[Taking, Tensor], Tensor]] = {
    "new_full": lambda net, y: y * y.new_full((y.shape[2], 1), net.steps[1], dtype=y.dtype),
    "full": lambda net, y: y * torch.full((1, 1, y.shape[2], 1), net.steps[0], dtype=y.dtype),
    "full of a buffer": lambda net, y: y + torch.full((y.shape[3],), net.count, dtype=y.dtype),
    "slice": lambda net, y: y[:, :, : net.count],
    "alpha": lambda net, y: torch.add(y, net.steps.sum(), alpha=net.steps[0]),
    "arange": lambda net, y: y[..., :3] + torch.arange(net.count).type_as(y),
    "named": lambda net, y: F.pad(y, (0, 1), value=net.steps[1]),
}


@pytest.mark.parametrize("name", TAKES)
def test_calls_that_take_a_number_get_that_of_a_tensor(name: str) -> None:
    model = Taking(TAKES[name]).eval()
    gm = stp_fx.trace(model, X, frontend="fx")
    assert provenance_of(gm).frontend == "fx"
    other = torch.randn(3, 3, 40, 24)
    torch.testing.assert_close(gm(other), model(other))
    assert stp_fx.prune_graph(gm)(other).shape == model(other).shape


def test_a_number_of_the_data_is_refused_with_its_place() -> None:
    model = Taking(lambda net, y: y * y.new_full((y.shape[2], 1), y.mean()))
    with pytest.raises(
        TraceError, match=r"new_full.*test_detection_heads\.py:\d+ takes the number of a tensor whose value depends"
    ):
        stp_fx.trace(model, X, frontend="fx")


def conv(width_in: int, width_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False), nn.BatchNorm2d(width_out), nn.SiLU(inplace=True)
    )


class Head(nn.Module):
    """Boxes as expectations over bins, on anchors that evaluation makes once a shape; a second head that trains alone."""

    shape: Any = None
    anchors = strides = torch.empty(0)

    def __init__(self, widths: tuple[int, ...], classes: int = 3, bins: int = 4) -> None:
        super().__init__()
        self.classes, self.bins = classes, bins
        self.many, self.one = (nn.ModuleList(self._branch(w) for w in widths) for _ in range(2))
        self.expectation = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.expectation.weight.data[:] = torch.arange(bins, dtype=torch.float).view(1, bins, 1, 1)
        self.steps = torch.tensor([4.0, 8.0])

    def _branch(self, width: int) -> nn.Sequential:
        return nn.Sequential(conv(width, 12), nn.Conv2d(12, 4 * self.bins + self.classes, 1))

    def _predictions(self, maps: list[Tensor], branches: nn.ModuleList) -> Tensor:
        return torch.cat([branch(m).view(m.shape[0], 4 * self.bins + self.classes, -1) for branch, m in zip(branches, maps)], 2)

    def forward(self, maps: list[Tensor]) -> Any:
        preds = {
            "many": self._predictions(maps, self.many),
            "one": self._predictions([m.detach() for m in maps] if self.training else maps, self.one),
            "maps": maps,
        }
        return preds if self.training else (self._decoded(preds["one"], maps), preds)

    def _decoded(self, found: Tensor, maps: list[Tensor]) -> Tensor:
        shape = maps[0].shape
        if self.shape != shape:
            self.anchors, self.strides = (t.transpose(0, 1) for t in self._anchors(maps))
            self.shape = shape
        boxes, scores = found.split((4 * self.bins, self.classes), 1)
        count = boxes.shape[-1]
        sides = boxes.view(-1, 4, self.bins, count).transpose(2, 1).softmax(1)
        near, far = self.expectation(sides).view(-1, 4, count).chunk(2, 1)
        corners = self.anchors.unsqueeze(0) - near, self.anchors.unsqueeze(0) + far
        result = torch.cat((torch.cat(corners, 1) * self.strides, scores.sigmoid()), 1).transpose(1, 2)
        best = result[..., 4:].amax(-1).topk(min(10, count), 1)[1]
        return result.gather(1, best.unsqueeze(-1).expand(-1, -1, result.shape[-1]))

    def _anchors(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        points, strides = [], []
        for k, each in enumerate(maps):
            height, width = each.shape[2:]
            down, right = (torch.arange(n).type_as(each) + 0.5 for n in (height, width))
            grid = torch.meshgrid(down, right, indexing="ij")
            points.append(torch.stack(grid[::-1], -1).view(-1, 2))
            strides.append(maps[0].new_full((height * width, 1), self.steps[k], dtype=each.dtype))
        return torch.cat(points), torch.cat(strides)


class Detector(nn.Module):
    """A network held as a list of layers that say where their inputs come from."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.split, self.down = conv(3, 16, 4), conv(16, 24), conv(12, 24, 2)
        self.head = Head((12, 24))

    def forward(self, x: Tensor) -> Any:
        left, right = self.split(self.stem(x)).chunk(2, 1)
        return self.head([left + right, self.down(left)])


class Keyed(nn.Module):
    """A table that is kept with the sizes that it was made for."""

    table: Any = None

    def __init__(self, key: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.key, self.made_for = conv(3, 8), key, None

    def forward(self, x: Tensor) -> Tensor:
        key = self.key(x)
        if self.made_for == key:
            return self.a(x) + self.table
        self.table, self.made_for = torch.arange(x.shape[3]).type_as(x).expand(x.shape[2], -1), key
        return self.a(x) + self.table


KEYS: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda x: x.shape,
    "tuple": lambda x: tuple(x.shape),
    "lists": lambda x: [[x.shape[2], x.shape[3]], "levels"],
    "slice": lambda x: x.shape[-2:],
    "number": lambda x: x.size(3),
}


@pytest.mark.parametrize("name", KEYS)
def test_a_graph_takes_the_sizes_for_which_the_model_has_a_table(name: str) -> None:
    model, other = Keyed(KEYS[name]).eval(), torch.randn(2, 3, 24, 40)
    model(other)
    gm = stp_fx.trace(model, X, frontend="fx")
    torch.testing.assert_close(gm(other), model(other))
    torch.testing.assert_close(gm(X), model(X))


def tensors(value: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(value)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("called", [False, True])
def test_a_detector_whose_head_keeps_its_anchors(mode: str, called: bool) -> None:
    torch.manual_seed(0)
    model = Detector().eval()
    if called:
        model(X)  # the anchors of this shape are there now
    kept = model.head.shape
    gm = stp_fx.trace(model.train(mode == "train"), X, frontend="fx")
    assert model.head.shape == kept, "what the model keeps is put back"
    assert not provenance_of(gm).validation.differs  # type: ignore[union-attr]
    pruned = stp_fx.prune_graph(gm, "magnitude", 0.5)
    for size, batch in ((32, 2), (48, 3)):
        x = torch.randn(batch, 3, size, size)
        for training in (False, True):
            found, wanted = tensors(gm.train(training)(x)), tensors(model.train(training)(x))
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other)
            assert [t.shape for t in tensors(pruned.train(training)(x))[:2]] == [t.shape for t in wanted[:2]]
    assert torch.equal(pruned.get_parameter("head.expectation.weight").flatten(), torch.arange(4.0)), "the bins keep their values"


def test_a_pruned_detector_is_one_of_its_class_again() -> None:
    torch.manual_seed(0)
    model = Detector().eval()
    model(X)
    pruned = stp_fx.prune_graph(stp_fx.trace(model, X), "magnitude", 0.5, uniform=True)
    small = stp_fx.write_back(pruned, model)
    assert isinstance(small, Detector)
    assert small.stem[0].out_channels == 8
    for x in (X, torch.randn(3, 3, 48, 48)):  # the first is the shape whose anchors the model had
        torch.testing.assert_close(small.eval()(x)[0], pruned.eval()(x)[0])
