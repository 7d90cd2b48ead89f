"""Back to the original class: the same outputs as the graph's, or a refusal that names the constants in the way."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

import stp_fx
from stp_fx.errors import InputError, WriteBackError

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Fused projections; how many heads, an attribute; their size, another one."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size, self.scale = heads, size, size**-0.5
        self.qkv, self.out = nn.Linear(width, 3 * heads * size), nn.Linear(heads * size, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(n, t, self.heads * self.size))


@dataclasses.dataclass
class Settings:
    width: int = 16
    heads: int = 4
    depth: int = 4


class Transformer(nn.Module):
    """Numbers of equal value that mean different things (4 heads, 4 layers, patches of 4), and a config read in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.settings, self.patch = Settings(), 4
        self.embed = nn.Linear(3 * 16, 16)
        self.blocks = nn.ModuleList(Attention(16, 4, 8) for _ in range(2))
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, p = x.shape[0], self.patch
        x = x.reshape(n, 3, x.shape[2] // p, p, x.shape[3] // p, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x.view(n, -1, self.settings.width))
        return self.head(x.mean(1))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped, self.depthwise = (
            nn.Conv2d(3, 32, 3),
            nn.Conv2d(32, 32, 3, groups=4),
            nn.Conv2d(32, 32, 3, groups=32),
        )
        self.norm, self.up = nn.GroupNorm(4, 32), nn.ConvTranspose2d(32, 16, 2, 2)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.up(self.norm(self.depthwise(F.relu(self.grouped(self.stem(x))))))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Linear(64, 24), nn.LSTM(24, 12, 2, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(self.embed(x.mean(1)))[0])


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too; a buffer beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 16), nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.randn(16))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(ids) + self.shift)
        return self.head(x + self.down(F.gelu(self.up(x))))


def resnet() -> nn.Module:
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=7)


def resnext() -> nn.Module:
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], 7, groups=4, width_per_group=16)


def vgg() -> nn.Module:
    features = torchvision.models.vgg.make_layers([16, "M", 32, "M", 32, 32, "M"], batch_norm=True)
    model = torchvision.models.VGG(features, num_classes=7)
    model.classifier = nn.Sequential(nn.Linear(32 * 49, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 7))
    return model


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(64, 16, 2, 4, 32, 64, num_classes=5)


def swin() -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [4, 4], [4, 4], num_classes=5)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, dict[str, Any]]] = {
    "resnet": (resnet, IMAGES, {}),
    "resnext": (resnext, IMAGES, {}),
    "vgg": (vgg, IMAGES, {}),
    "vit heads": (vit, IMAGES, {"products": "outer"}),
    "swin heads": (swin, IMAGES, {"products": "outer"}),
    "transformer heads": (Transformer, IMAGES, {"products": "outer"}),
    "transformer head sizes": (Transformer, IMAGES, {"products": "inner"}),
    "transformer global": (Transformer, IMAGES, {"products": "both", "scope": "global"}),
    "grouped": (Grouped, IMAGES, {}),
    "groups": (Grouped, IMAGES, {"products": "outer"}),
    "recurrent": (Recurrent, IMAGES, {}),
    "tied": (Tied, torch.randint(0, 11, (2, 6)), {}),
}


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def number(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def agree(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def statement(module: nn.Module) -> list[str]:
    """What the modules say of themselves, their sizes included."""
    return [f"{name} {child.extra_repr()} {child.training}" for name, child in model_parts(module)]


def model_parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(module.named_modules())


@pytest.mark.parametrize(
    ("name", "frontend"),
    [
        *((name, "fx") for name in NETWORKS),
        ("tied", "export"),
        *(pytest.param(name, "export", marks=pytest.mark.slow) for name in ("resnext", "groups", "transformer heads")),
    ],
)
def test_a_smaller_module_of_the_same_class(name: str, frontend: str) -> None:
    make, x, options = NETWORKS[name]
    model = built(make)
    state, said = {k: v.clone() for k, v in model.state_dict().items()}, statement(model)
    pruned = stp_fx.prune_graph(stp_fx.trace(model, x, frontend=frontend), ratio=0.5, **options)
    random = torch.random.get_rng_state()
    result = stp_fx.write_back(pruned, model)
    assert type(result) is type(model)
    assert not any(isinstance(part, fx.GraphModule) for part in result.modules())
    assert [type(part) for part in result.modules()] == [type(part) for part in model.modules()]
    assert number(result) == number(pruned) < number(model)
    other = torch.cat([x, x.flip(0)])[:3]
    with torch.no_grad():
        agree(result(x), pruned(x))
        agree(result(other), pruned(other))
    # the original is as it was, and nothing is shared with it or with the graph
    assert statement(model) == said
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.zero_()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert sum(p.abs().sum() for p in pruned.parameters()) > 0
    # it trains, and what it says of itself is what its tensors are
    result.train()(x).sum().backward()
    for _, part in model_parts(result):
        if isinstance(part, nn.Linear):
            assert (part.out_features, part.in_features) == part.weight.shape
        if isinstance(part, nn.Conv2d):
            assert (part.out_channels, part.in_channels) == (part.weight.shape[0], part.weight.shape[1] * part.groups)
        if isinstance(part, nn.BatchNorm2d):
            assert part.num_features == len(part.running_mean)


def test_numbers_of_equal_value_are_told_apart() -> None:
    model = built(Transformer)
    result = stp_fx.write_back(stp_fx.prune_graph(model, example_inputs=IMAGES, products="outer"), model)
    assert [(b.heads, b.size, b.scale) for b in result.blocks] == [(2, 8, 8**-0.5)] * 2
    assert (result.patch, result.settings) == (4, Settings(8, 4, 4))
    result = stp_fx.write_back(stp_fx.prune_graph(model, example_inputs=IMAGES, products="inner"), model)
    assert [(b.heads, b.size, b.scale) for b in result.blocks] == [(4, 4, 8**-0.5)] * 2
    assert (model.blocks[0].heads, model.settings) == (4, Settings())


def test_trained_values_modes_ties_and_freezing_are_kept() -> None:
    model = built(Tied).train()
    model.up.eval()
    model.norm.bias.requires_grad_(False)
    pruned = stp_fx.prune_graph(model, example_inputs=torch.randint(0, 11, (2, 6)))
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.add_(1.0)
    result = stp_fx.write_back(pruned, model)
    assert result.head.weight is result.embed.weight
    assert torch.equal(result.up.bias, pruned.get_parameter("up.bias"))
    assert (result.training, result.up.training, result.down.training) == (True, False, True)
    assert [p.requires_grad for p in result.norm.parameters()] == [True, False]
    assert torch.equal(result.shift, pruned.get_buffer("shift"))


def test_hooks_and_added_biases() -> None:
    model = built(lambda: nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False)))
    seen: list[int] = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    batches = [torch.randn(32, 8) for _ in range(2)]
    graph = stp_fx.trace(model, batches[0])
    pruned = stp_fx.prune_graph(graph, "variance", calibration=batches, compensation="mean")
    result = stp_fx.write_back(pruned, model)
    assert model[2].bias is None
    assert torch.equal(result[2].bias, pruned.get_parameter("2.bias"))
    before = len(seen)
    agree(result(batches[0]), pruned(batches[0]))
    assert len(seen) > before


def test_arguments_as_the_example_gave_them() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, first: torch.Tensor, *more: torch.Tensor, mode: str = "sum", **rest: Any) -> dict[str, torch.Tensor]:
            y = self.a(first) + self.b(more[0]) * (2 if mode == "twice" else 1) + rest.get("bias", 0)
            return {"y": self.c(F.relu(y)), "n": more[1]}

    model = built(Several)
    example = (torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 2))
    pruned = stp_fx.prune_graph(stp_fx.trace(model, example, kwargs={"mode": "twice"}))
    assert number(stp_fx.write_back(pruned, model)) < number(model)
    result = stp_fx.write_back(pruned, model, example, kwargs={"mode": "twice"})
    agree(result(*example, mode="twice")["y"], pruned(*example)["y"])
    with pytest.raises(InputError, match=r"the graph holds for mode='twice'"):
        stp_fx.write_back(pruned, model, example, kwargs={"mode": "sum"})
    again = pickle.loads(pickle.dumps(pruned))
    assert number(stp_fx.write_back(again, model)) == number(result)


class Literal(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class DefaultScale(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Halves(nn.Module):
    """Takes equal halves, whatever is left of each."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.left, self.right = nn.Linear(16, 32), nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.both(x).relu().chunk(2, -1)
        return self.left(a) + self.right(b)


def test_refusals_name_the_constants() -> None:
    x = torch.randn(2, 5, 16)
    model = built(lambda: Literal(16, 4, 8))
    with pytest.raises(
        WriteBackError, match=r"test_write_back.py:\d+: `q, k, v = self.qkv\(x\).view\(n, t, 3, 4, 8\)"
    ) as refusal:
        stp_fx.write_back(stp_fx.prune_graph(model, example_inputs=x, products="outer"), model)
    code = "q, k, v = self.qkv(x).view(n, t, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)"
    assert refusal.value.constants == (f"the number 4 in `{code}` (2 is needed)",)
    assert pickle.loads(pickle.dumps(refusal.value)).constants == refusal.value.constants
    with pytest.raises(WriteBackError, match=r"the number 8 in .* \(4 is needed\)"):
        stp_fx.write_back(stp_fx.prune_graph(model, example_inputs=x, products="inner"), model)

    model = built(lambda: DefaultScale(16, 4, 8))
    with pytest.raises(WriteBackError, match=r"0.3536 = 8 \*\* -0.5, which the graph keeps"):
        stp_fx.write_back(stp_fx.prune_graph(model, example_inputs=x, products="inner"), model)
    assert stp_fx.write_back(stp_fx.prune_graph(model, example_inputs=x, products="outer"), model).heads == 2

    model = built(Halves)
    with torch.no_grad():
        model.right.weight.mul_(0.1)
    pruned = stp_fx.prune_graph(model, example_inputs=x, ratio=0.25, scope="global")
    assert pruned.get_parameter("left.weight").shape != pruned.get_parameter("right.weight").shape
    with pytest.raises(WriteBackError, match=r"the pieces that 'left' reads one of: split\(\[\d+, \d+\]"):
        stp_fx.write_back(pruned, model)

    model = built(vit)
    with pytest.raises(WriteBackError, match=r"in 'encoder.layers.encoder_layer_0'.*the scale 0.3536 = 8 \*\* -0.5"):
        stp_fx.write_back(stp_fx.prune_graph(model, example_inputs=IMAGES, products="inner"), model)


def test_a_wrong_graph_is_never_accepted() -> None:
    model = built(Transformer)
    pruned = stp_fx.prune_graph(model, example_inputs=IMAGES, products="outer")
    softmax = next(n for n in pruned.graph.nodes if n.target in ("softmax", F.softmax))
    with pruned.graph.inserting_after(softmax):
        wrong = pruned.graph.call_function(torch.mul, (softmax, 1.01))
    softmax.replace_all_uses_with(wrong, delete_user_cb=lambda user: user is not wrong)
    pruned.recompile()
    with pytest.raises(WriteBackError, match="output differs"):
        stp_fx.write_back(pruned, model)


def test_bad_arguments() -> None:
    model: Any = built(Halves)
    graph = stp_fx.trace(model, torch.randn(2, 16))
    pruned = stp_fx.prune_graph(graph)
    masked = stp_fx.apply_plan(graph, stp_fx.plan_of(pruned), mask=True)
    for arguments, message in [
        ((model, model), "`pruned` is a Halves"),
        ((pruned, pruned), "`model` is a GraphModule"),
        ((pruned, 3), "`model` is a int"),
        ((pruned, nn.Linear(2, 2)), "no tensor in common"),
        ((masked, model), "`pruned` is masked"),
        ((pruned, built(lambda: nn.Sequential())), "no tensor in common|cannot express"),
    ]:
        with pytest.raises((InputError, WriteBackError), match=message):
            stp_fx.write_back(*arguments)
    larger = Halves()
    larger.both = nn.Linear(16, 64)
    with pytest.raises(InputError, match=r"'both\.\w+' is \[32.*here it is \[64"):
        stp_fx.write_back(pruned, larger)
    same = stp_fx.write_back(graph, model)
    assert torch.equal(same(torch.ones(1, 16)), model(torch.ones(1, 16)))
