"""Blocks as units: which residual branches are found, why some must stay, and what their removal leaves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import stp_fx
from stp_fx.analysis.plan import PrunePlan
from stp_fx.errors import InputError, PlanError
from stp_fx.passes import MaskBlocks, Pipeline, RemoveBlocks, UnmaskChannels
from stp_fx.testing.block_laws import run_without_branches
from stp_fx.testing.measure import assert_same, run


class Residual(nn.Module):
    """A pair of convolutions with norms, as in ResNet; a projection where the shape changes."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Conv2d(channels, out, 1, stride) if stride > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.down is None else self.down(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1 = nn.Sequential(Residual(4, 4), Residual(4, 4))
        self.layer2 = nn.Sequential(Residual(4, 6, 2), Residual(6, 6))
        self.fc = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


class Lambda(nn.Module):
    """A network of two layers whose forward is a function of it."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], Any], width: int = 4) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)
        self.own = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.own(self, x)


def made(make: Callable[..., nn.Module], *args: Any) -> nn.Module:
    torch.manual_seed(0)
    return make(*args).double().eval()


def traced(forward: Callable[[Any, torch.Tensor], Any]) -> tuple[nn.Module, fx.GraphModule, torch.Tensor]:
    module, x = made(Lambda, forward), torch.randn(2, 4, dtype=torch.double)
    return module, stp_fx.trace(module, x), x


def without(gm: fx.GraphModule, *names: str) -> fx.GraphModule:
    return RemoveBlocks(names)(gm).graph_module


def reasons(gm: fx.GraphModule) -> dict[str, str]:
    return {block.name: block.reason for block in stp_fx.blocks_of(gm)}


# -- what is found ---------------------------------------------------------------------------------------------------------


def test_blocks_have_paths_costs_and_reasons() -> None:
    gm = stp_fx.trace(made(ResNet), torch.randn(2, 3, 8, 8, dtype=torch.double))
    blocks = {block.name: block for block in stp_fx.blocks_of(gm)}
    assert list(blocks) == ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]
    assert [name for name, block in blocks.items() if not block.removable] == ["layer2.0"]
    assert "layer2_0_down" in blocks["layer2.0"].reason
    assert "[2, 4, 8, 8]" in blocks["layer2.0"].explain()
    assert blocks["layer1.1"].params == 2 * (4 * 4 * 9 + 8)
    assert blocks["layer1.1"].macs == 2 * 2 * 4 * 4 * 9 * 64  # two convolutions, a batch of two
    assert set(blocks["layer1.1"].parameters) == {
        f"layer1.1.{name}" for name in ("conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight", "bn2.bias")
    }
    assert "304 parameters" in blocks["layer1.1"].explain()


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda m, x: (x + (y := m.one(x)), y), "read by 'output'"),
        (lambda m, x: (y := x[:, :1]) + m.one(y.expand(-1, 4)), "[2, 1]"),
        (lambda m, x: (y := x.float()) + m.one(y.double()), "torch.float32"),
        (lambda m, x: (y := m.two(x)) + m.one(F.relu_(y)), "in place"),
        (lambda m, x: m.two(x + m.one(x) if m.training else x - 2 * m.one(x)), "alone"),
    ],
)
def test_a_branch_that_must_stay_says_why(forward: Any, words: str) -> None:
    _, gm, _ = traced(forward)
    name, reason = next(iter(reasons(gm).items()))
    assert words in reason
    with pytest.raises(InputError, match="cannot be removed"):
        without(gm, name)
    with pytest.raises(PlanError, match="cannot be removed"):
        stp_fx.apply_plan(gm, PrunePlan({}, {}, (name,)))


def test_sums_that_are_no_residual_branches_are_none() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.place, self.scale = nn.Embedding(5, 4), nn.Embedding(8, 4), nn.Parameter(torch.ones(4))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.token(tokens)
            x = x + self.place(torch.arange(x.shape[1]))  # reads the size of x alone
            return x + 0.04 * x**3 + self.scale  # nothing with a parameter reads x

    assert reasons(stp_fx.trace(Net(), torch.zeros(2, 3, dtype=torch.long))) == {}


def test_names_may_be_paths_patterns_and_must_match() -> None:
    gm = stp_fx.trace(made(ResNet), torch.randn(2, 3, 8, 8, dtype=torch.double))
    plan_of = stp_fx.plan_of
    assert plan_of(without(gm, "layer1")).blocks == ("layer1.0", "layer1.1")
    assert plan_of(without(gm, "layer*.1")).blocks == ("layer1.1", "layer2.1")
    assert plan_of(without(gm, "layer2")).blocks == ("layer2.1",)
    with pytest.raises(InputError, match=r"no block 'layer1.2'.*layer1.1"):
        without(gm, "layer1.2")
    with pytest.raises(InputError, match="has been removed"):
        without(without(gm, "layer1.1"), "layer1.1")
    for wrong in ("layer1.1", 3, [3], [""]):
        with pytest.raises(InputError, match="names"):
            RemoveBlocks(wrong)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="does not have"):
        stp_fx.apply_plan(gm, PrunePlan({}, {}, ("nothing",)))


# -- what is left ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("layer1.0",), ("layer1.0", "layer1.1"), ("layer2.1", "layer1.1")])
def test_removal_computes_what_the_module_does_without_the_branch(names: tuple[str, ...]) -> None:
    module, x = made(ResNet), torch.randn(2, 3, 8, 8, dtype=torch.double)
    gm = stp_fx.trace(module, x)
    removed = without(gm, *names)
    expected = run_without_branches(module, [f"{name}.bn2" for name in names], (x,))
    assert_same(run(removed, (x,)), expected, "removed", tolerance=0.0)
    assert not any(key.startswith(names) for key in removed.state_dict())
    left = {name for name, _ in removed.named_modules() if name.startswith(names)}
    assert left <= {each + end for each in names for end in ("", ".relu")}
    assert stp_fx.compare(gm, removed).blocks == tuple(sorted(names))
    assert f"Without the blocks {', '.join(sorted(names))}" in str(stp_fx.compare(gm, removed))


def test_a_sum_that_is_written_to_leaves_the_operand_as_it_is() -> None:
    _, gm, x = traced(lambda m, x: F.relu_(x + m.one(x)) + x)
    block = stp_fx.blocks_of(gm)[0]
    removed, given = without(gm, block.name), x.clone()
    assert_same(removed(given), F.relu(x) + x, "removed", tolerance=0.0)
    assert torch.equal(given, x)
    twice = without(stp_fx.trace(made(ResNet), torch.randn(2, 3, 8, 8, dtype=torch.double)), "layer1.1").train()
    twice(torch.randn(2, 3, 8, 8, dtype=torch.double)).sum().backward()  # the ReLU behind it writes in place
    assert twice.get_parameter("stem.weight").grad is not None


def test_branches_side_by_side_go_alone_or_together() -> None:
    module, gm, x = traced(lambda m, x: m.one(x) + m.two(x) + x)
    assert reasons(gm) == {"one": "", "two": "", "one-two": ""}
    assert_same(run(without(gm, "one"), (x,)), run_without_branches(module, ["one"], (x,)), "one", tolerance=0.0)
    assert_same(run(without(gm, "two"), (x,)), run_without_branches(module, ["two"], (x,)), "two", tolerance=0.0)
    assert torch.equal(run(without(gm, "one", "two"), (x,)), x)
    assert torch.equal(run(MaskBlocks(("one", "two"))(gm).graph_module, (x,)), x)


def test_shared_parameters_stay() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = x + m.one(x)
        return m.two(x + m.one(x))

    _, gm, _ = traced(forward)
    first, second = stp_fx.blocks_of(gm)
    assert (first.name, second.name) == ("one", "one#2")
    assert first.shared == ("one.weight", "one.bias")
    assert first.params == 0
    assert "one.weight" in first.explain()
    removed = without(gm, "one")
    assert [block.name for block in stp_fx.blocks_of(removed)] == ["one#2"]
    assert stp_fx.blocks_of(removed)[0].params == 20
    assert "one.weight" in dict(removed.named_parameters())
    assert "one.weight" not in dict(without(removed, "one#2").named_parameters())


def test_both_modes_of_a_graph_lose_the_branch() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.head = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.relu(self.up(x))
            if self.training:
                y = y * 1.5 + 0.1
            return self.head(x + self.down(y))

    module, x = made(Net), torch.randn(2, 4, dtype=torch.double)
    gm = stp_fx.trace(module, x)
    [block] = stp_fx.blocks_of(gm)
    removed, masked = without(gm, block.name), MaskBlocks((block.name,))(gm).graph_module
    for training in (False, True):
        module.train(training)
        removed.train(training)
        masked.train(training)
        assert_same(run(removed, (x,)), run_without_branches(module, ["down"], (x,)), f"training={training}", tolerance=0.0)
        assert_same(run(masked, (x,)), run(removed, (x,)), f"masked, training={training}", tolerance=0.0)
    assert not any("stp_fx" in str(node.target) for node in removed.graph.nodes)


def test_no_gradient_reaches_a_masked_block() -> None:
    gm = stp_fx.trace(made(ResNet), torch.randn(2, 3, 8, 8, dtype=torch.double))
    masked = MaskBlocks(("layer1.1",))(gm).graph_module
    masked(torch.randn(2, 3, 8, 8, dtype=torch.double)).sum().backward()
    assert float(masked.get_parameter("layer1.1.conv1.weight").grad.abs().sum()) == 0.0  # type: ignore[union-attr]
    assert float(masked.get_parameter("layer1.0.conv1.weight").grad.abs().sum()) > 0.0  # type: ignore[union-attr]
    both = MaskBlocks(("layer2.1",))(masked).graph_module
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    assert_same(run(both, (x,)), run(without(gm, "layer1.1", "layer2.1"), (x,)), "both masks")
    half = without(both, "layer1.1")
    assert stp_fx.cost(half) == stp_fx.cost(both)
    assert_same(run(UnmaskChannels()(half).graph_module, (x,)), run(without(gm, "layer1.1"), (x,)), "unmasked")


# -- files, plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("blocks", "channels"), ("channels", "blocks")])
def test_files_and_copies_keep_what_was_removed(order: Iterable[str], tmp_path: Any) -> None:
    module, x = made(ResNet), torch.randn(2, 3, 8, 8, dtype=torch.double)
    gm = pruned = stp_fx.trace(module, x)
    for step in order:
        pruned = without(pruned, "layer1.1") if step == "blocks" else stp_fx.prune_graph(pruned, ratio=0.5)
    stp_fx.save(pruned, tmp_path / "small.safetensors")
    loaded = stp_fx.load(tmp_path / "small.safetensors", made(ResNet))
    plan = stp_fx.plan_of(pruned)
    masked = stp_fx.apply_plan(gm, plan, mask=True)
    stp_fx.save(masked, tmp_path / "masked.safetensors")
    others = [loaded, copy.deepcopy(pruned), stp_fx.apply_plan(gm, PrunePlan.from_json(plan.to_json())), masked]
    for other in (*others, stp_fx.load(tmp_path / "masked.safetensors", gm)):
        assert_same(run(other, (x,)), run(pruned, (x,)), "again")
    assert all(stp_fx.plan_of(other) == plan for other in others[:-1])
    assert stp_fx.cost(masked) == stp_fx.cost(pruned) or stp_fx.cost(masked).macs == stp_fx.cost(pruned).macs
    assert_same(run(stp_fx.write_back(pruned, module), (x,)), run(pruned, (x,)), "written back")


def test_plans_with_blocks_are_plain_data() -> None:
    plan = PrunePlan({("a", 0): np.array([0])}, {("a", 0): 2}, ("b.2", "b.10"))
    assert plan.blocks == ("b.10", "b.2")
    assert PrunePlan.from_json(plan.to_json()) == plan
    assert plan != plan.without_blocks()
    assert plan.digest() != plan.without_blocks().digest()
    assert not PrunePlan({}, {}, ("b",)).is_empty
    assert plan.then(PrunePlan({}, {}, ("c",))).blocks == ("b.10", "b.2", "c")
    assert plan.after(PrunePlan({}, {}, ("b.2",))).blocks == ("b.10",)
    assert "2 blocks removed" in repr(plan)
    assert "block b.10" in plan.summary()
    for wrong in ("b", (3,), ("b", "b"), ("",)):
        with pytest.raises(PlanError, match="blocks"):
            PrunePlan({}, {}, wrong)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="blocks"):
        PrunePlan.from_json('{"stp_fx_plan":1,"blocks":[1],"cuts":[]}')


def test_passes_print_as_they_are_written() -> None:
    pipeline = Pipeline(RemoveBlocks(["a", "b.*"]), MaskBlocks(("c",)))  # type: ignore[arg-type]
    assert str(Pipeline.parse(str(pipeline))) == str(pipeline)
    with pytest.raises(stp_fx.errors.PassError, match="needs a plan"):
        RemoveBlocks()(stp_fx.trace(made(ResNet), torch.randn(2, 3, 8, 8, dtype=torch.double)))


# -- networks of others ----------------------------------------------------------------------------------------------------


def test_vision_transformer_blocks() -> None:
    models = pytest.importorskip("torchvision").models
    module = made(lambda: models.VisionTransformer(8, 4, 2, 2, 8, 12, num_classes=3))
    nn.init.normal_(module.heads.head.weight)  # type: ignore[union-attr,arg-type]
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    gm = stp_fx.trace(module, x)
    layer = "encoder.layers.encoder_layer_"
    names = [f"{layer}{k}.{part}" for k in (0, 1) for part in ("self_attention", "mlp")]
    assert reasons(gm) == dict.fromkeys(names, "")
    expected = run_without_branches(module, [f"{layer}0.dropout", f"{layer}1.mlp"], (x,))
    assert_same(run(without(gm, names[0], names[3]), (x,)), expected, "removed")
    assert stp_fx.plan_of(without(gm, f"{layer}1")).blocks == tuple(sorted(names[2:]))


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_language_model_blocks(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 16} if kind == "GPT2" else {
        "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 12
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(vocab_size=11, bos_token_id=1, eos_token_id=2, **sizes)
    name = "GPT2LMHeadModel" if kind == "GPT2" else "LlamaForCausalLM"
    module, tokens = made(lambda: getattr(transformers, name)(config)), torch.randint(0, 11, (2, 5))
    gm = stp_fx.trace(module, tokens, outputs="logits", validate=False)
    stem, attention = ("transformer.h", "attn") if kind == "GPT2" else ("model.layers", "self_attn")
    assert reasons(gm) == {f"{stem}.{k}.{part}": "" for k in (0, 1) for part in (attention, "mlp")}
    removed = without(gm, f"{stem}.0.{attention}", f"{stem}.1.mlp")
    hooked = [module.get_submodule(f"{stem}.0.{attention}").register_forward_hook(lambda *a: (torch.zeros_like(a[-1][0]), None))]
    hooked.append(module.get_submodule(f"{stem}.1.mlp").register_forward_hook(lambda *a: torch.zeros_like(a[-1])))
    expected = run(module, (tokens,))["logits"]
    assert_same(run(removed, (tokens,))["logits"], expected, "removed")
    for each in hooked:
        each.remove()
    layer = without(gm, f"{stem}.0")
    assert [block.name for block in stp_fx.blocks_of(layer)] == [f"{stem}.1.{attention}", f"{stem}.1.mlp"]
    assert not any(key.startswith(f"{stem}.0") for key in layer.state_dict())


def test_weights_that_are_computed_are_those_of_the_block() -> None:
    layer = made(lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0)).train()
    x = torch.randn(2, 3, 4, dtype=torch.double)  # its two modes read the same weights in another order
    gm = stp_fx.trace(layer, x)
    assert list(reasons(gm)) == ["self_attn", "linear1-linear2"]
    assert_same(run(without(gm, "self_attn"), (x,)), run_without_branches(layer, ["dropout1"], (x,)), "removed", tolerance=1e-12)


# -- writes inside a branch ------------------------------------------------------------------------------------------------


class Filling(nn.Module):
    """``x + two(filled(one(x)))``, where what is filled is fresh, the stream's, or a buffer that is read later."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.one, self.two, self.kind = nn.Linear(4, 4), nn.Linear(4, 4), kind
        self.register_buffer("table", torch.zeros(2, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        y = self.one(x)
        if self.kind == "view":
            target = torch.empty_like(y)
            target[:, :2].copy_(y[:, :2])
            target[:, 2:].copy_(y[:, 2:].tanh())
            return x + self.two(target)
        target = torch.empty_like(y) if self.kind == "fresh" else x if self.kind == "stream" else self.table
        target[:, :2] = y[:, 2:]
        target[:, 2:] = y[:, :2].tanh()
        total = x + self.two(target if self.kind == "fresh" else y)
        return total + self.table if self.kind == "table" else total


@pytest.mark.parametrize("kind", ["fresh", "view"])
def test_a_branch_may_fill_what_it_has_made(kind: str) -> None:
    module, x = made(Filling, kind), torch.randn(2, 4, dtype=torch.double)
    gm = stp_fx.trace(module, x)
    [name] = reasons(gm)
    assert reasons(gm)[name] == ""
    removed, masked = without(gm, name), MaskBlocks((name,))(gm).graph_module
    assert torch.equal(removed(x), x * 2)
    assert torch.equal(masked(x), x * 2)
    assert not list(removed.parameters())


@pytest.mark.parametrize("kind", ["stream", "table"])
def test_a_branch_that_fills_what_others_read_stays(kind: str) -> None:
    module, x = made(Filling, kind), torch.randn(2, 4, dtype=torch.double)
    gm = stp_fx.trace(module, x)
    assert all(reasons(gm).values())


class Aligned(nn.Module):
    """Asks where its weight lies, as code does that chooses between kernels; the trace holds an assertion about the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.weight = nn.LayerNorm(8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.t()
        if weight.data_ptr() % 4 != 0:
            weight = weight.clone()
        return x + self.norm(x) @ weight


def test_an_assertion_about_a_weight_goes_with_the_weight() -> None:
    module, x = nn.Sequential(Aligned(), Aligned()).double(), torch.randn(3, 8, dtype=torch.double)
    gm = stp_fx.trace(module, x)
    assert any("_assert" in str(node.target) or "_assert" in node.name for node in gm.graph.nodes)
    removed = RemoveBlocks(["0"])(gm).graph_module
    assert sorted(name for name, _ in removed.named_parameters()) == ["1.norm.bias", "1.norm.weight", "1.weight"]
    torch.testing.assert_close(removed(x), module[1](x), rtol=0, atol=1e-12)
