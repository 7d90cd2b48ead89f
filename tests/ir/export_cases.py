"""Small modules that do what a capture may lose: draw, count, write in place, change inputs, have a backward of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["CASES", "Case"]

_version = tuple(map(int, torch.__version__.split(".")[:2]))


def floats(*shape: int) -> Callable[[int], tuple[Any, ...]]:
    """One input [batch, *shape]."""
    return lambda batch: (torch.randn(batch, *shape, dtype=torch.float64),)


def rows(batch: int) -> tuple[Any, ...]:
    """[batch, 8]."""
    return (torch.randn(batch, 8, dtype=torch.float64),)


def tokens(batch: int) -> tuple[Any, ...]:
    """Token numbers [batch, 5]."""
    return (torch.randint(7, (batch, 5)),)


@dataclasses.dataclass(frozen=True)
class Case:
    """``refused``: by front end, what the TraceError says. ``wrong``: the front end that is known to be wrong here."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]] = rows
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    wrong: str = ""

    def __str__(self) -> str:
        return self.name


class Then(nn.Module):
    """A linear layer, a function or module, and another linear layer."""

    def __init__(self, f: Any, width: int = 8, out: int | None = None) -> None:
        super().__init__()
        self.a = nn.Linear(width, width)
        self.b = nn.Linear(width, out or 3)
        if isinstance(f, nn.Module):
            self.f = f
        else:
            self.call = f

    def forward(self, x: Any) -> Any:
        y = self.a(x)
        return self.b(self.f(y) if hasattr(self, "f") else self.call(y))


class Raw(nn.Module):
    """What a function gives for a linear layer's output, its module as the first argument."""

    def __init__(self, f: Any, width: int = 8) -> None:
        super().__init__()
        self.a, self.call = nn.Linear(width, width), f

    def forward(self, x: Any) -> Any:
        return self.call(self, self.a(x))


CASES: list[Case] = []


def add(name: str, build: Callable[[], nn.Module], inputs: Any = rows, **more: Any) -> None:
    CASES.append(Case(name, build, inputs, **more))


def between(name: str, f: Any, inputs: Any = rows, **more: Any) -> None:
    """A function or a module class between two linear layers over the last dimension."""
    add(name, lambda: Then(f() if isinstance(f, type) else f), inputs, **more)


def raw(name: str, f: Any, inputs: Any = rows, **more: Any) -> None:
    """A function of the module and the first layer's output, returned as it is."""
    add(name, lambda: Raw(f), inputs, **more)


# -- modes -------------------------------------------------------------------------------------------------------------

for _kind, _shape in {
    nn.Dropout: (8,), nn.Dropout1d: (3, 8), nn.Dropout2d: (3, 4, 8), nn.Dropout3d: (3, 2, 4, 8), nn.AlphaDropout: (8,),
    nn.FeatureAlphaDropout: (3, 4, 8), nn.RReLU: (8,),
}.items():  # fmt: skip
    between(_kind.__name__, _kind, floats(*_shape))
    add(f"{_kind.__name__} in place", lambda k=_kind: Then(k(inplace=True)), floats(*_shape))

for _name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "rrelu"):
    _shape = {"dropout1d": (3, 8), "dropout2d": (3, 4, 8), "dropout3d": (3, 2, 4, 8)}.get(_name, (8,))
    _function = getattr(F, _name)
    raw(f"F.{_name} follows", lambda m, y, f=_function: f(y, training=m.training), floats(*_shape))
    raw(f"F.{_name} always", lambda m, y, f=_function: f(y, training=True), floats(*_shape))
    raw(f"F.{_name} never", lambda m, y, f=_function: f(y, training=False), floats(*_shape))


def recurrent(kind: type[nn.Module], **options: Any) -> nn.Module:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(8, 6, num_layers=2, batch_first=True, **options)

        def forward(self, x: torch.Tensor) -> Any:
            return self.rnn(x)

    return Recurrent()


for _kind in (nn.LSTM, nn.GRU, nn.RNN):
    add(_kind.__name__, lambda k=_kind: recurrent(k), floats(5, 8))
    add(f"{_kind.__name__} with dropout", lambda k=_kind: recurrent(k, dropout=0.5), floats(5, 8))
    add(f"{_kind.__name__} both ways", lambda k=_kind: recurrent(k, dropout=0.5, bidirectional=True), floats(5, 8))
add("LSTM projected", lambda: recurrent(nn.LSTM, proj_size=4, dropout=0.1), floats(5, 8))

between("InstanceNorm", lambda y: F.instance_norm(y), floats(3, 8))
add("InstanceNorm1d", lambda: nn.Sequential(nn.Conv1d(3, 8, 1), nn.InstanceNorm1d(8, affine=True)), floats(3, 6))
add("InstanceNorm2d with statistics", lambda: nn.Sequential(
    nn.Conv2d(3, 8, 1), nn.InstanceNorm2d(8, affine=True, track_running_stats=True)), floats(3, 4, 5))  # fmt: skip
for _momentum in (0.1, None):
    add(f"BatchNorm1d, momentum {_momentum}", lambda m=_momentum: nn.Sequential(
        nn.Linear(8, 6), nn.BatchNorm1d(6, momentum=m), nn.Linear(6, 2)))  # fmt: skip
add("BatchNorm without statistics", lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6, track_running_stats=False)))


class FunctionalNorm(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv1d(3, 8, 1), norm
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.a(x), self.mean, self.var, self.training)


add("F.batch_norm", lambda: FunctionalNorm(lambda x, m, v, t: F.batch_norm(x, m, v, training=t)), floats(3, 6))
add("F.batch_norm frozen", lambda: FunctionalNorm(lambda x, m, v, t: F.batch_norm(x, m, v, training=False)), floats(3, 6))
add(
    "F.instance_norm",
    lambda: FunctionalNorm(lambda x, m, v, t: F.instance_norm(x, m, v, use_input_stats=t)),
    floats(3, 6),
    wrong="fx",
)


class Mixed(nn.Module):
    """A frozen norm and a frozen dropout in a model that trains, or the other way round."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2)
        self.last = nn.Dropout(0.5)
        self.train(training)
        self.norm.train(not training)
        self.drop.train(not training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.b(self.drop(self.norm(self.a(x)))))


add("frozen within training", lambda: Mixed(True))
add("training within frozen", lambda: Mixed(False))


class Path(nn.Module):
    """Stochastic depth, as many libraries write it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        return x * torch.bernoulli(torch.full((x.shape[0], 1), 0.5, dtype=x.dtype)) / 0.5


between("stochastic depth", Path)


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.norm = nn.Linear(8, 6), nn.Dropout(0.5), nn.BatchNorm1d(6)
        self.drop.register_forward_hook(lambda module, args, output: output * 2)
        self.norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.drop(self.a(x)))


add("hooks on what has a mode", Hooked)

# -- writing in place --------------------------------------------------------------------------------------------------


def _before(major: int, minor: int, says: str) -> dict[str, str]:
    """What ``torch.export`` refuses before some version of torch."""
    return {"export": says} if _version < (major, minor) else {}


def writing(name: str, f: Callable[[torch.Tensor], Any], inputs: Any = rows, **more: Any) -> None:
    """``f`` writes to the first layer's output, which goes on."""

    def call(y: torch.Tensor) -> torch.Tensor:
        f(y)
        return y

    between(name, call, inputs, **more)


def _augmented(y: torch.Tensor) -> None:
    y[:, :4] += 1


def _row(y: torch.Tensor) -> None:
    y[0] = 0.25


def _indexed(y: torch.Tensor) -> None:
    y[:, torch.tensor([1, 3])] = 2.0


def _masked(y: torch.Tensor) -> None:
    y[y > 0.5] = 0.5


def _part(y: torch.Tensor) -> None:
    y[:, 2:5] = y[:, :3] * 2


def _chunks(y: torch.Tensor) -> None:
    with torch.no_grad():
        first, second = y.chunk(2, 1)
        first.mul_(2)
        second.add_(first)


def _unbound(y: torch.Tensor) -> None:
    for k, row in enumerate(y.detach().unbind(1)):
        row.add_(k)


class OnSlice(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        self.activation(y[:, 1:])
        return y


writing("augmented assignment to a slice", _augmented)
writing("assignment to a row", _row)
writing("assignment by index", _indexed)
writing("assignment by mask", _masked)
writing("assignment from a slice", _part)
writing("chunks written", _chunks, refused=_before(2, 9, "SplitBackward0 is a view and is being modified inplace"))
writing("unbound written", _unbound)
writing("masked_fill_ on a view", lambda y: y[:, :3].masked_fill_(y[:, 3:6] > 0, 0.5))
writing("copy_ to a view", lambda y: y[:, 2:4].copy_(y[:, :2].tanh()))
writing("index_put_", lambda y: y.index_put_((torch.tensor([0, 1]), torch.tensor([2, 3])), torch.tensor(1.5).to(y)))
writing("index_put_ accumulated", lambda y: y.index_put_((torch.tensor([0, 0]),), y[:2] * 2, accumulate=True))
writing("addcmul_", lambda y: y.addcmul_(y.detach(), y.detach(), value=0.5))
writing("index_add_", lambda y: y.index_add_(1, torch.tensor([0, 2]), y[:, 4:6].exp()))
writing("index_fill_", lambda y: y.index_fill_(1, torch.tensor([0, 2]), 3.0))
writing("scatter_", lambda y: y.scatter_(1, torch.zeros_like(y, dtype=torch.long)[:, :1], 3.0))
writing("fill_diagonal_", lambda y: y.fill_diagonal_(0.0), refused=_before(2, 9, "storage_offset"))
writing("zero_ on a transposed view", lambda y: y.t()[1:3].zero_())
writing("add_ on a reshaped view", lambda y: y.view(-1, 2, 4)[:, 0].add_(3))
writing("relu_", lambda y: y.relu_())
writing("clamp_", lambda y: y[:, 1:].clamp_(-0.1, 0.1))
writing("sigmoid_", lambda y: torch.sigmoid_(y[:, 1:]))
for _activation in (nn.ReLU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Hardtanh, nn.Hardswish, nn.CELU, nn.SELU, nn.Mish, nn.Threshold):
    _options = (0.1, 0.2) if _activation is nn.Threshold else ()
    add(f"{_activation.__name__} in place on a slice",
        lambda a=_activation, o=_options: Then(OnSlice(a(*o, inplace=True))))  # fmt: skip


class Buffers(nn.Module):
    """Buffers that are written: in training, always, under no_grad."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.a = where, nn.Linear(8, 6)
        self.register_buffer("seen", torch.zeros(6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        if self.where == "always":
            self.calls += 1
            self.seen.mul_(0.5).add_(y.detach().mean(0))
        else:
            with torch.no_grad():
                self.calls.add_(1)
                self.seen.copy_(y.mean(0))
                y.add_(1)
        return y + self.seen


add("buffers written", lambda: Buffers("always"))
add("buffers written under no_grad", lambda: Buffers("no_grad"))


class Constant(nn.Module):
    """A tensor that the code makes, and writes to or returns."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        scale = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
        scale[1:].add_(1)
        return self.a(x) * scale, scale


add("constants written", Constant)


class ChangesInput(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a = how, nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        if self.how == "add_":
            x.add_(1)
        elif self.how == "slice":
            x[:, 2:] *= 2
        else:
            x.detach().mul_(3)
        return self.a(x)


for _how in ("add_", "slice", "detached"):
    add(f"input changed: {_how}", lambda h=_how: ChangesInput(h))

# -- what a call returns -----------------------------------------------------------------------------------------------

raw("adaptive_max_pool1d", lambda m, y: F.adaptive_max_pool1d(y, 2), floats(3, 8))
raw("adaptive_max_pool2d", lambda m, y: F.adaptive_max_pool2d(y, 2), floats(3, 4, 8))
raw("adaptive_max_pool3d", lambda m, y: F.adaptive_max_pool3d(y, 2), floats(3, 4, 4, 8))
raw("adaptive_max_pool2d, indices", lambda m, y: F.adaptive_max_pool2d(y, 2, return_indices=True), floats(3, 4, 8))
raw("max_pool1d, indices", lambda m, y: F.max_pool1d(y, 2, return_indices=True), floats(3, 8))
raw("max_pool2d, indices", lambda m, y: F.max_pool2d(y, 2, return_indices=True), floats(3, 4, 8))
raw("max_pool3d, indices", lambda m, y: F.max_pool3d(y, 2, return_indices=True), floats(3, 4, 4, 8))
raw("max_pool1d, max_pool3d", lambda m, y: (F.max_pool3d(y, 2), F.max_pool1d(y[:, :, 0, 0], 2)), floats(3, 4, 4, 8))
raw("topk", lambda m, y: y.topk(3))
raw("sort", lambda m, y: torch.sort(y, descending=True))
raw("max over a dimension", lambda m, y: y.max(1))
raw("values of max", lambda m, y: y.max(1).values * 2)
raw("split", lambda m, y: y.split([3, 5], 1))
raw("chunk", lambda m, y: y.chunk(2, 1))
raw("unbind", lambda m, y: list(y.unbind(1)))
raw("nested output", lambda m, y: {"y": y, "more": [y * 2, (y + 1, None)], "number": 3})
raw("var_mean", lambda m, y: torch.var_mean(y, 1))
raw("einsum", lambda m, y: torch.einsum("ni,nj->nij", y, y))
raw("meshgrid, tensordot", lambda m, y: (
    torch.meshgrid(y[0], y[1], indexing="ij"), torch.tensordot(y, y, dims=([1], [1]))))  # fmt: skip
raw("broadcast_tensors, cdist, norm", lambda m, y: (
    torch.broadcast_tensors(y[:, None], y[:, :, None]), torch.cdist(y, y + 1), y.norm(dim=1), torch.norm(y, p=1)))  # fmt: skip
_ACTIVATIONS = (
    F.silu, F.elu, F.leaky_relu, F.hardtanh, F.hardswish, F.hardsigmoid, F.celu, F.selu, F.mish, F.softplus, F.relu6
)  # fmt: skip
raw("activations", lambda m, y: sum(f(y) for f in _ACTIVATIONS))
raw("interpolate", lambda m, y: (F.interpolate(y, scale_factor=2.0), F.interpolate(y, size=6, mode="linear")), floats(3, 8))
raw("pads", lambda m, y: (F.pad(y, (1, 1), "reflect"), F.pad(y, (1, 2), value=2.0), F.pad(y, (1, 1), "circular")), floats(3, 8))
raw("losses", lambda m, y: (F.mse_loss(y, y * 2), F.smooth_l1_loss(y, y * 2, beta=0.5), F.cross_entropy(y, y.argmax(1))))

# -- copies and aliases ------------------------------------------------------------------------------------------------

raw("to, copied", lambda m, y: (y.to(y.dtype, copy=True), y.to(torch.float32)))
raw("copy of what is written later", lambda m, y: (y.to(torch.float64, copy=True), y.clone(), y.add_(1)))
raw("to another", lambda m, y: y.to(torch.zeros(1, dtype=torch.float32)))
raw("contiguous, alias", lambda m, y: (y.contiguous(), y.t().contiguous()))
raw("detach", lambda m, y: (y.detach(), y))
raw("detach_", lambda m, y: (y * 2).detach_() + m.a.bias)
raw("data", lambda m, y: y.data * m.a.bias, refused={"export": "lost track of a tensor"})
raw("no_grad", lambda m, y: _without(y) * m.a.bias)
raw("slice of everything, written", lambda m, y: y[:].add_(1) + y)
raw("channels last", lambda m, y: y.to(memory_format=torch.channels_last).contiguous(), floats(3, 4, 8))


def _without(y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return y.exp() + 1


raw("a parameter itself", lambda m, y: (y, m.a.weight))

# -- embeddings --------------------------------------------------------------------------------------------------------

for _options in (
    {}, {"padding_idx": 1}, {"padding_idx": -1}, {"scale_grad_by_freq": True}, {"max_norm": 0.5}, {"sparse": True},
    {"padding_idx": 2, "max_norm": 0.5, "scale_grad_by_freq": True},
):  # fmt: skip
    add(f"Embedding {_options}", lambda o=_options: nn.Sequential(nn.Embedding(7, 8, **o), nn.Linear(8, 3)), tokens)
for _mode in ("sum", "mean", "max"):
    add(
        f"EmbeddingBag {_mode}",
        lambda m=_mode: nn.Sequential(nn.EmbeddingBag(7, 8, mode=m, padding_idx=1), nn.Linear(8, 3)),
        tokens,
    )


class Tied(nn.Module):
    """Stored in another order than used, and one tensor by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.table = nn.Linear(8, 8), nn.Embedding(7, 8)
        self.logits = nn.Linear(8, 7, bias=False)
        self.logits.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits(self.last(self.table(x)))


add("tied weights", Tied, tokens)
for _kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
    add(_kind.__name__, lambda k=_kind: k(8, 6))
    add(f"{_kind.__name__} within", lambda k=_kind: nn.Sequential(nn.Linear(8, 8), k(8, 6)))

# -- backward ----------------------------------------------------------------------------------------------------------


class Straight(torch.autograd.Function):
    """Rounds; its gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        ctx.scale = scale
        return torch.round(x * scale)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * 3 * ctx.scale, None


class Both(torch.autograd.Function):
    """Two results, one of which has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
        ctx.save_for_backward(x, y)
        signs = torch.sign(x)
        ctx.mark_non_differentiable(signs)
        return x * y, signs

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> Any:
        return grad, grad * 2


between("autograd.Function", lambda y: Straight.apply(y, 2.0))
raw("autograd.Function of two", lambda m, y: Both.apply(y, m.a.bias))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, how: str) -> None:
        super().__init__()
        self.reentrant, self.how = reentrant, how
        self.a, self.b, self.drop = nn.Linear(8, 6), nn.Linear(6, 3), nn.Dropout(0.2)

    def part(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.drop(torch.tanh(x)))

    def forward(self, x: torch.Tensor) -> Any:
        y = self.a(x)
        part = {"method": self.part, "module": self.b, "function": lambda v: F.relu(self.b(v))}[self.how]
        return checkpoint(part, y, use_reentrant=self.reentrant)


for _reentrant in (False, True):
    for _how in ("method", "module", "function"):
        add(f"checkpoint of a {_how}, reentrant {_reentrant}", lambda r=_reentrant, h=_how: Checkpointed(r, h))

# -- custom operators --------------------------------------------------------------------------------------------------


@torch.library.custom_op("stp_fx_cases::bump", mutates_args=("x",))
def bump(x: torch.Tensor, by: float) -> None:
    x.add_(by)


@torch.library.custom_op("stp_fx_cases::note", mutates_args=("seen",))
def note_mean(x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    seen.copy_(x.mean(0))
    return x * 2


@note_mean.register_fake
def _(x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Bumps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 2)
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> Any:
        with torch.no_grad():
            y = self.a(x).detach()
            bump(y, 2.0)
            y = note_mean(y, self.seen)
        return self.b(y)


add("custom operators that write", Bumps)

# -- inputs ------------------------------------------------------------------------------------------------------------


def takes(name: str, cls: type[nn.Module], inputs: Any = rows, **more: Any) -> None:
    def build() -> nn.Module:
        class Net(cls):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(8, 4)

        return Net()

    add(name, build, inputs, **more)


class PositionalConstant(nn.Module):
    def forward(self, x: torch.Tensor, flag: bool, scale: float, y: torch.Tensor) -> Any:
        return self.a(x) * scale + (y if flag else 0)


class KeywordOnly(nn.Module):
    def forward(self, x: torch.Tensor, *, shift: torch.Tensor, flag: bool = False) -> Any:
        return self.a(x) + (shift if flag else -shift)


class Defaults(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 2.0) -> Any:
        y = self.a(x) * scale
        return y if mask is None else y * mask


class NestedInput(nn.Module):
    def forward(self, batch: dict[str, Any], pair: Any) -> Any:
        return {"out": self.a(batch["x"]) + batch["deep"][0], "pair": [pair[0] * 2, pair[1]]}


def _constant(batch: int) -> tuple[Any, ...]:
    return (*rows(batch), True, 2.0, torch.randn(batch, 4, dtype=torch.float64))


def _nested(batch: int) -> tuple[Any, ...]:
    (x,), (y,), (z,) = rows(batch), rows(batch), rows(batch)
    return {"x": x, "deep": [y[:, :4].clone()]}, (z, 3)


takes("positional constants", PositionalConstant, _constant)
takes("keyword only", KeywordOnly, kwargs={"shift": torch.ones(4, dtype=torch.float64), "flag": True})
takes("defaults", Defaults)
takes("None for a tensor", Defaults, lambda batch: (*rows(batch), None, 3.0))
takes("a mask by position", Defaults, lambda batch: (*rows(batch), torch.ones(4, dtype=torch.float64) * 2))
takes("a constant by name", Defaults, kwargs={"scale": 0.5})
takes("nested inputs", NestedInput, _nested)
