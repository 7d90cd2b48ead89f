"""Capture: the graph computes what the module computes, stays free where the module is, and leaves the module alone."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
import torchvision
from torch import nn

import stp_fx
from stp_fx.errors import InputError, TraceError, VerificationError
from stp_fx.ir import provenance_of, verify


def _assert_same(model: nn.Module, *shape: int, other: tuple[int, ...] = ()) -> torch.fx.GraphModule:
    """Bit for bit in eval, on the example's shape and on others; returns the graph."""
    model.eval()
    gm = stp_fx.trace(model, torch.randn(*shape))
    for each in (shape, (shape[0] + 2, *shape[1:]), *((other,) if other else ())):
        x = torch.randn(*each)
        assert torch.equal(gm(x), model(x))
    verify(gm)
    return gm


class Shapes(nn.Module):
    """Control flow over shapes, unpacked sizes, sizes in views, assertions, loops."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.line = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dim() == 4
        b, c, h, w = x.shape
        if c != 3 or not isinstance(x, torch.Tensor):
            raise ValueError("three channels")
        x = self.conv(x)
        for _ in range(len(x.shape) - 2):
            x = x.relu()
        x = x.flatten(2).transpose(1, 2)
        x = x.view(b, h * w, x.size(-1))
        x = x + torch.zeros(b, h * w, 6, device=x.device, dtype=x.dtype)
        return self.line(x).reshape(b, -1, int(c) + 1).mean(1)


class Slices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 1)
        self.weight = nn.Parameter(torch.randn(10, 8))
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).clone()
        y[:, :4] = y[:, 4:] + self.shift[:4].view(1, -1, 1, 1)
        return F.linear(y.mean((2, 3)), self.weight[:5])


def test_shapes_resolve_and_stay_free() -> None:
    gm = _assert_same(Shapes(), 2, 3, 5, 6, other=(3, 3, 7, 4))
    assert {n.op for n in gm.graph.nodes} == {"placeholder", "call_module", "call_method", "call_function", "output"}


def test_slices_are_written_and_weights_are_nodes() -> None:
    gm = _assert_same(Slices(), 2, 4, 3, 3)
    targets = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    assert targets == {"weight", "shift"}
    assert set(gm.state_dict()) == {"conv.weight", "conv.bias", "weight", "shift"}


def test_a_pickled_graph_is_read_back_with_its_slices() -> None:
    gm = stp_fx.trace(Slices().eval(), torch.randn(2, 4, 3, 3))
    buffer = io.BytesIO()
    torch.save(gm, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    x = torch.randn(3, 4, 3, 3)
    assert torch.equal(again(x), gm(x))
    assert torch.equal(copy.deepcopy(gm)(x), gm(x))


def test_limits_of_a_dtype_follow_the_dtype() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.line(x)
            return x.masked_fill(x < 0, torch.finfo(x.dtype).min).softmax(-1)

    gm = _assert_same(Masked(), 2, 4)
    x = torch.randn(2, 4, dtype=torch.float64)
    assert torch.equal(gm.double()(x), Masked.forward(gm, x))
    lowest = next(n for n in gm.graph.nodes if n.target is torch.finfo)
    assert [user.args[1] for user in lowest.users] == ["min"]


def test_a_number_made_of_the_batch_is_made_of_the_input_again() -> None:
    class Baked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(int(x.shape[0]) * 2, -1).sum(1)

    gm = _assert_same(Baked(), 2, 6)
    assert gm(torch.randn(7, 6)).shape == (14,)
    assert provenance_of(gm).inputs[0].shape == (2, 6)
    assert provenance_of(gm).notes == ()


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2 if x.shape[0] == 1 else x * 3
        return x[:, :, ::2] if x.shape[-1] > 4 else x + int(x.shape[1])


def test_a_branch_over_sizes_holds_or_says_so() -> None:
    model = Branching()
    for example in ((1, 3, 8), (2, 3, 8), (2, 3, 4)):
        gm = stp_fx.trace(model, torch.randn(*example))
        for shape in ((1, 3, 8), (2, 3, 8), (5, 3, 6), (2, 3, 4), (2, 5, 4)):
            x = torch.randn(*shape)
            same = (shape[0] == 1) == (example[0] == 1) and (shape[2] > 4) == (example[2] > 4)
            if same and (shape[2] > 4 or shape[1] == example[1]):
                assert torch.equal(gm(x), model(x))
            else:
                with pytest.raises(AssertionError, match=r"another shape.*test_trace\.py"):
                    gm(x)


def test_a_batch_that_the_model_fixes_is_noted() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bias", torch.randn(2, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.bias

    gm = stp_fx.trace(Fixed(), torch.randn(2, 6))
    assert "batch size" in provenance_of(gm).notes[0]


class Functional(nn.Module):
    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.line, self.always = nn.Linear(6, 6), always

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.line(x), 0.5, True if self.always else self.training)


@pytest.mark.parametrize("training", [True, False])
def test_functional_dropout_follows_the_mode(training: bool) -> None:
    model = Functional().train(training)
    gm = stp_fx.trace(model, torch.randn(2, 6))
    assert gm.training is training
    x = torch.randn(4, 6)
    assert torch.equal(gm.eval()(x), model.eval()(x))
    gm.train(), model.train()
    torch.manual_seed(1)
    ours = gm(x)
    torch.manual_seed(1)
    assert torch.equal(ours, model(x))
    assert (ours == 0).any()


def test_dropout_that_is_always_on_stays_on() -> None:
    for training in (True, False):
        gm = stp_fx.trace(Functional(always=True).train(training), torch.randn(2, 6)).eval()
        torch.manual_seed(0)
        assert (gm(torch.randn(64, 6)) == 0).any()


def test_stochastic_depth_and_flags_are_kept() -> None:
    model = torchvision.models.convnext_tiny(stochastic_depth_prob=0.5).train()
    model.features[1].eval()
    gm = stp_fx.trace(model, torch.randn(2, 3, 32, 32))
    kinds = {type(m).__name__ for m in gm.modules()}
    assert "StochasticDepth" in kinds
    flags = {name: m.training for name, m in model.named_modules()}
    assert all(m.training == flags[name] for name, m in gm.named_modules() if name in flags)


def test_the_module_is_untouched() -> None:
    model = Slices().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes, modes = set(model.__dict__), [m.training for m in model.modules()]
    stp_fx.trace(model, torch.randn(2, 4, 3, 3))
    assert set(model.__dict__) == attributes
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_parameters_are_shared_and_tied_ones_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    gm = stp_fx.trace(model, torch.randn(2, 4))
    assert gm.get_parameter("0.weight") is gm.get_parameter("2.weight") is model[0].weight


def test_parameters_out_of_reach_are_named() -> None:
    model = torchvision.models.resnet18()
    model.spare = nn.Linear(3, 4)
    gm = stp_fx.trace(model.eval(), torch.randn(1, 3, 64, 64))
    assert any("spare.weight" in note for note in provenance_of(gm).notes)


def test_what_only_training_reaches_is_in_the_graph() -> None:
    model = torchvision.models.googlenet(init_weights=False, aux_logits=True).eval()
    gm = stp_fx.trace(model, torch.randn(1, 3, 64, 64))
    assert not provenance_of(gm).notes
    assert gm.state_dict().keys() == model.state_dict().keys()


def test_keyword_inputs_and_flags() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None, *, double: bool = False) -> torch.Tensor:
            y = self.line(x) * 2 if double else self.line(x)
            return y if scale is None else y * scale

    model, x, scale = Named(), torch.randn(2, 4), torch.randn(3)
    assert torch.equal(stp_fx.trace(model, x)(x), model(x))
    gm = stp_fx.trace(model, x, kwargs={"scale": scale, "double": True})
    assert torch.equal(gm(x, scale=scale), model(x, scale, double=True))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "regnet_y_400mf", "squeezenet1_1"])
def test_torchvision_networks_bit_for_bit(name: str) -> None:
    _assert_same(torchvision.models.get_model(name, weights=None), 1, 3, 64, 64, other=(2, 3, 96, 64))


def test_swin_is_traced_through_what_torchvision_hides() -> None:
    model = torchvision.models.SwinTransformer([4, 4], 12, [2, 2], [3, 3], [4, 4], num_classes=5)
    gm = _assert_same(model, 1, 3, 64, 64, other=(2, 3, 72, 64))
    assert any(n.target is F.linear for n in gm.graph.nodes)
    assert not any("shifted_window" in str(n.target) for n in gm.graph.nodes)


class _MHA(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options
        self.mha = nn.MultiheadAttention(12, 3, **{k: v for k, v in options.items() if k not in ("need_weights", "cross")})
        self.cross = options.get("cross")

    def forward(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        k = k if self.cross else q
        out, weights = self.mha(q, k, k, attn_mask=mask, need_weights=bool(self.options.get("need_weights")))
        return out if weights is None else out.sum() * weights


@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"batch_first": False},
        {"batch_first": True, "bias": False},
        {"batch_first": True, "need_weights": True},
        {"batch_first": True, "cross": True},
        {"batch_first": False, "cross": True, "kdim": 8, "vdim": 8},
        {"batch_first": True, "dropout": 0.3},
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_multihead_attention_is_lowered(options: dict, masked: bool) -> None:
    torch.manual_seed(0)
    model = _MHA(**options).eval().double()
    kdim = options.get("kdim", 12)
    shape = (lambda b, s, c: (b, s, c)) if options.get("batch_first") else (lambda b, s, c: (s, b, c))
    q, k = torch.randn(shape(2, 5, 12)).double(), torch.randn(shape(2, 5, kdim)).double()
    mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1) if masked else None
    gm = stp_fx.trace(model, (q, k) if mask is None else (q, k, mask))
    assert not any(isinstance(m, nn.MultiheadAttention) for m in gm.modules())
    names = set(dict(model.named_parameters()))
    assert set(dict(gm.named_parameters())) == names
    q, k = torch.randn(shape(3, 5, 12)).double(), torch.randn(shape(3, 5, kdim)).double()
    arguments = (q, k) if mask is None else (q, k, mask)
    torch.testing.assert_close(gm(*arguments), model(*arguments), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_layers_are_lowered(norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.1, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval().double()
    x = torch.randn(2, 5, 12).double()
    gm = stp_fx.trace(encoder, x)
    torch.testing.assert_close(gm(x), encoder(x), rtol=1e-12, atol=1e-12)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    gm = stp_fx.trace(encoder, x, kwargs={"src_key_padding_mask": padding})
    theirs = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(gm(x, src_key_padding_mask=padding)[1], theirs[1], rtol=1e-12, atol=1e-12)
    decoder = (
        nn.TransformerDecoder(nn.TransformerDecoderLayer(12, 3, 20, batch_first=True, norm_first=norm_first), 2).eval().double()
    )
    gm = stp_fx.trace(decoder, (x, x))
    torch.testing.assert_close(gm(x, x), decoder(x, x), rtol=1e-12, atol=1e-12)


def test_rare_attention_stays_whole() -> None:
    model = nn.MultiheadAttention(12, 3, add_bias_kv=True, batch_first=True).eval()
    x = torch.randn(2, 5, 12)
    gm = stp_fx.trace(_Wrapped(model), x)
    assert any(isinstance(m, nn.MultiheadAttention) for m in gm.modules())
    assert "hides" in stp_fx.analyze(gm).explain("mha.in_proj_weight:0")


class _Wrapped(nn.Module):
    def __init__(self, mha: nn.Module) -> None:
        super().__init__()
        self.mha = mha

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mha(x, x, x)[0]


class _Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_branches_on_data_say_where() -> None:
    with pytest.raises(TraceError, match=r"depends on the data.*test_trace\.py"):
        stp_fx.trace(_Branch(), torch.randn(2, 3))


def test_bad_arguments() -> None:
    net = nn.Linear(4, 3)
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        stp_fx.trace(lambda x: x, torch.randn(2, 4))
    with pytest.raises(InputError, match="example_inputs is missing"):
        stp_fx.trace(net, None)
    with pytest.raises(InputError, match="do not fit"):
        stp_fx.trace(net, (torch.randn(2, 4), torch.randn(2)))
    with pytest.raises(InputError, match="no tensor"):
        stp_fx.trace(net, 3)
    with pytest.raises(InputError, match="unknown front end"):
        stp_fx.trace(net, torch.randn(2, 4), frontend="jit")
    with pytest.raises(InputError, match="lazy"):
        stp_fx.trace(nn.LazyLinear(3), torch.randn(2, 4))
    with pytest.raises(InputError, match=r"Linear itself fails.*\(2, 5\)"):
        stp_fx.trace(net, torch.randn(2, 5))
    with pytest.raises(InputError, match=r"stp_fx\.trace"):
        stp_fx.analyze(torch.fx.symbolic_trace(net))


def test_verify_names_the_node_that_does_not_run() -> None:
    gm = stp_fx.trace(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), torch.randn(2, 4))
    gm.set_submodule("1", nn.Linear(5, 3))
    with pytest.raises(VerificationError, match="_1"):
        verify(gm)


class Named(dict[str, torch.Tensor]):
    """Stands for the outputs of Hugging Face, which register themselves with pytree in the same way."""


pytree.register_pytree_node(Named, lambda v: (list(v.values()), list(v)), lambda values, keys: Named(zip(keys, values)))


class Classes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("positions", torch.arange(32.0).view(1, 32))

    def forward(self, x: torch.Tensor) -> Named:
        y = self.a(x) * self.positions[:, : x.shape[1]].unsqueeze(-1)
        return Named(logits=self.b(y.relu()), positions=self.positions[:, : x.shape[1]])


def test_outputs_keep_their_class_and_graphs_pickle() -> None:
    model = Classes()
    x = torch.randn(2, 5, 4)
    gm = stp_fx.trace(model, x)
    assert list(dict(model.named_modules())) == ["", "a", "b"]
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    for graph in (gm, pruned, pickle.loads(pickle.dumps(pruned)), copy.deepcopy(pruned)):
        for length in (5, 9):
            found = graph(torch.ones(3, length, 4))
            assert type(found) is Named
            assert list(found) == ["logits", "positions"]
            assert found["logits"].shape == (3, length, 3)
            assert found["positions"].shape == (1, length)
    assert torch.equal(gm(x)["logits"], model(x)["logits"])


class Caching(nn.Module):
    """Keeps what it computed for the next call, as some relative positions are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("kept", torch.zeros(1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept.shape[0] != x.shape[1]:
            self.kept = torch.arange(x.shape[1], dtype=x.dtype, device=x.device).unsqueeze(-1).cos()
        self.last = x
        return self.b((self.a(x) * self.kept).relu())


def test_what_a_forward_leaves_on_its_module_is_taken_back() -> None:
    model, x = Caching(), torch.randn(2, 5, 4)
    kept = model.kept
    for frontend in ("auto", "fx"):
        gm = stp_fx.trace(model, x, frontend=frontend)
        assert model.kept is kept
        assert not hasattr(model, "last")
        assert any("assigns to kept" in note for note in provenance_of(gm).notes)
    assert torch.equal(gm(x), model(x))
    assert model.kept.shape == (5, 1)


def test_a_forward_put_on_the_instance_is_what_is_traced() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.randn(2, 4)
    plain = model.forward
    model.forward = lambda input, scale=2.0: plain(input) * scale  # type: ignore[method-assign]
    gm = stp_fx.trace(model, x)
    assert torch.equal(gm(x), model(x))
    assert torch.equal(stp_fx.trace(model, x, kwargs={"scale": 3.0})(x), model(x, scale=3.0))


class Autocasting(nn.Module):
    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.a, self.b, self.enabled = nn.Linear(4, 8), nn.Linear(8, 3), enabled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            y = self.a(x)
        return self.b(y.float())


def test_autocast_inside_a_forward_is_refused() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(TraceError, match=r"fx: the forward enables autocast itself.*export: the forward enables autocast"):
        stp_fx.trace(Autocasting(True), x)
    for frontend in ("fx", "export"):
        model = Autocasting(False)
        with torch.autocast("cpu", torch.bfloat16):  # the call's own is not the forward's
            gm = stp_fx.trace(model, x, frontend=frontend)
        assert torch.equal(gm(x), model(x))


def test_a_name_that_no_code_can_hold_is_named() -> None:
    heads = nn.ModuleDict({"class": nn.Conv2d(3, 4, 1), "box": nn.Conv2d(4, 4, 1)})

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = heads

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.heads["box"](self.heads["class"](x))

    with pytest.raises(TraceError, match=r"'heads.class' holds a word of Python's own.*rename it"):
        stp_fx.trace(Heads(), torch.randn(1, 3, 4, 4))


@pytest.mark.parametrize("frontend", ["auto", "fx", "export"])
def test_modules_that_nest_too_deeply(frontend: str) -> None:
    model: nn.Module = nn.Conv2d(3, 3, 1)
    for _ in range(1000):
        model = nn.Sequential(model)
    with pytest.raises(TraceError, match="deeper than Python follows"):
        stp_fx.trace(model, torch.randn(1, 3, 4, 4), frontend=frontend)
