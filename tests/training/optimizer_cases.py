"""Optimizers beside a pruning step: each either goes on as a plain one of its kind would, or is refused by name.

The oracle shares no code with the library: a new optimizer on a contiguous copy of the network after the step, without fused or
foreach kernels, whose state is the old one's as it was before the step, cut by hand.
"""

from __future__ import annotations

import copy
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.optim import Optimizer

import stp_fx
from stp_fx.errors import InputError

X = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
Y = torch.arange(6) % 4
Make = Callable[[list[nn.Parameter]], Optimizer]


class Net(nn.Module):
    """Matrices, kernels, norms, and a matrix without a bias that gets one from compensation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.mid, self.head = nn.Linear(8, 12, bias=False), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.gelu(self.mid(F.relu(self.norm(self.b(F.relu(self.a(x))))).mean((2, 3)))))


def of(path: str, plain: dict[str, Any] | None = None, **options: Any) -> tuple[Make, Make]:
    """An optimizer of that name with these options, and the plain one."""
    module, _, name = path.rpartition(".")

    def make(extra: dict[str, Any]) -> Make:
        return lambda p: getattr(importlib.import_module(module), name)(p, **{**options, **extra})

    return make({}), make(plain or {})


def torchs(name: str, **options: Any) -> tuple[Make, Make]:
    return of(f"torch.optim.{name}", {"fused": None, "foreach": False}, **options)


def lookahead(p: list[nn.Parameter]) -> Optimizer:
    from timm.optim import Lookahead

    return Lookahead(torch.optim.Adam(p, lr=0.01), k=2)


def muons(p: list[nn.Parameter]) -> Optimizer:
    return torch.optim.Muon([q for q in p if q.dim() == 2], lr=0.01)


def without_schedule(name: str) -> tuple[Make, Make]:
    plain, _ = of(f"schedulefree.{name}", lr=0.01, foreach=False)
    fast, _ = of(f"schedulefree.{name}", lr=0.01, foreach=True)

    def training(make: Make) -> Make:
        def made(p: list[nn.Parameter]) -> Optimizer:
            optimizer: Any = make(p)
            optimizer.train()
            return optimizer

        return made

    return training(fast), training(plain)


def zero(p: list[nn.Parameter]) -> Optimizer:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(p, torch.optim.Adam, lr=0.01)


def buckets(p: list[nn.Parameter]) -> Optimizer:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(p, torch.optim.Adam, lr=0.01, parameters_as_bucket_view=True)


CASES: dict[str, tuple[Make, Make]] = {
    "SGD": torchs("SGD", lr=0.05, momentum=0.9, weight_decay=1e-3),
    "SGD nesterov foreach": torchs("SGD", lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "SGD fused": torchs("SGD", lr=0.05, momentum=0.9, fused=True),
    "SGD fused dampening": torchs("SGD", lr=0.05, momentum=0.9, dampening=0.1, fused=True),
    "Adam": torchs("Adam", lr=0.01),
    "Adam foreach": torchs("Adam", lr=0.01, foreach=True),
    "Adam fused amsgrad": torchs("Adam", lr=0.01, amsgrad=True, fused=True),
    "AdamW": torchs("AdamW", lr=0.01),
    "AdamW fused": torchs("AdamW", lr=0.01, fused=True),
    "NAdam": torchs("NAdam", lr=0.01),
    "RAdam": torchs("RAdam", lr=0.01),
    "Adamax": torchs("Adamax", lr=0.01),
    "Adadelta": torchs("Adadelta", lr=0.5),
    "Adagrad": of("torch.optim.Adagrad", lr=0.05, foreach=False),
    "Adagrad fused": of("torch.optim.Adagrad", {"fused": None}, lr=0.05, fused=True),
    "RMSprop": of("torch.optim.RMSprop", {"foreach": False}, lr=0.01, momentum=0.9, centered=True, foreach=True),
    "Rprop": of("torch.optim.Rprop", {"foreach": False}, lr=0.01, foreach=True),
    "ASGD": of("torch.optim.ASGD", {"foreach": False}, lr=0.01, foreach=True),
    "Adafactor": of("torch.optim.Adafactor", lr=0.01),
    "LBFGS": of("torch.optim.LBFGS", lr=0.1),
    "Muon": (muons, muons),
    "timm Lookahead": (lookahead, lookahead),
    "timm Lamb": of("timm.optim.Lamb", lr=0.01),
    "timm Lion": of("timm.optim.Lion", {"foreach": False}, lr=0.001, foreach=True),
    "timm Adan": of("timm.optim.Adan", {"foreach": False}, lr=0.01, foreach=True),
    "timm Adopt": of("timm.optim.Adopt", {"foreach": False}, lr=0.01, foreach=True),
    "timm LaProp": of("timm.optim.LaProp", lr=0.001),
    "timm MADGRAD": of("timm.optim.MADGRAD", lr=0.01),
    "timm AdaBelief": of("timm.optim.AdaBelief", lr=0.01),
    "timm SGDP": of("timm.optim.SGDP", lr=0.05, momentum=0.9),
    "timm Kron": of("timm.optim.Kron", lr=0.001),
    "timm Adafactor": of("timm.optim.Adafactor", lr=0.01),
    "timm AdafactorBigVision": of("timm.optim.AdafactorBigVision", {"foreach": False}, lr=0.01, foreach=True),
    "transformers Adafactor": of("transformers.optimization.Adafactor", lr=1e-3, relative_step=False, scale_parameter=False),
    "torchao AdamW8bit": of("torchao.optim.AdamW8bit", lr=0.01),
    "torchao AdamW4bit": of("torchao.optim.AdamW4bit", lr=0.01),
    "schedule-free SGD": without_schedule("SGDScheduleFree"),
    "schedule-free AdamW": without_schedule("AdamWScheduleFree"),
    "ZeroRedundancyOptimizer": (zero, zero),
    "ZeroRedundancyOptimizer, bucket views": (buckets, buckets),
}
COMBINATIONS = tuple(
    itertools.product((True, False), (None, "mean"), (torch.contiguous_format, torch.channels_last))
)  # masks, compensation, memory format
REFUSED_WITH_NEW_BIASES = ("SGD fused dampening", "ZeroRedundancyOptimizer")


def refused(name: str, compensation: str | None) -> str | None:
    """By which name the library has to refuse it; None where it has to follow."""
    if name in ("LBFGS", "timm Kron", "timm Adafactor", "transformers Adafactor", "torchao AdamW8bit", "torchao AdamW4bit"):
        return name.rpartition(" ")[2]
    if name.endswith("bucket views"):
        return "ZeroRedundancyOptimizer"
    if compensation is not None and name in REFUSED_WITH_NEW_BIASES:
        return "fused SGD" if name.startswith("SGD") else name
    return None


def run(name: str, masks: bool, compensation: str | None, memory: torch.memory_format) -> float | str:
    """The largest difference to the oracle, relative to the largest weight, or the text of the refusal.

    Raises:
        AssertionError: something changed although the optimizer was refused.
    """
    make, make_plain = CASES[name]
    torch.manual_seed(0)
    gm = stp_fx.trace(Net().double().to(memory_format=memory), X)
    optimizers = [make(list(gm.parameters()))]
    left = [p for p in gm.parameters() if not any(p is q for o in optimizers for q in of_all(o))]
    if left:  # biases, norms and kernels beside Muon
        optimizers.append(torch.optim.SGD(left, lr=0.05, momentum=0.9))
    before = {key: value.clone() for key, value in gm.state_dict().items()}
    pat = None
    try:
        pat = stp_fx.PATPassManager(
            gm, ratio=0.5, steps=2 if masks else 1, compensation=compensation, train_loader=[(X, Y)], optimizer=optimizers
        )
        train(gm, optimizers, memory)
        state, before = states(gm, optimizers), {key: value.clone() for key, value in gm.state_dict().items()}
        pat.prune(0)
    except InputError as error:
        found = gm.state_dict()
        assert list(found) == list(before), "the structure changed"
        assert all(torch.equal(value, found[key]) for key, value in before.items()), "the model changed"
        assert pat is None or pat.taken == 0, "the step is counted"
        if not isinstance(optimizers[0], torch.optim.LBFGS):  # which takes contiguous parameters only
            train(gm, optimizers, memory)  # and goes on
        return str(error)
    twin, others = oracle(gm, optimizers, (make_plain, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=False)), state)
    train(gm, optimizers, memory)
    train(twin, others, torch.contiguous_format)
    pairs = [(p.detach(), twin.get_parameter(key).detach()) for key, p in gm.named_parameters()]
    return max(float((a - b).abs().max() / (b.abs().max() + 1e-3)) for a, b in pairs)


def of_all(optimizer: Optimizer) -> Iterator[Any]:
    for group in optimizer.param_groups:
        yield from group["params"]


def innermost(optimizer: Any) -> Any:
    return getattr(optimizer, "_base_optimizer", getattr(optimizer, "optim", optimizer))


def train(gm: fx.GraphModule, optimizers: list[Optimizer], memory: torch.memory_format, steps: int = 3) -> None:
    gm.train()
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()

        def closure() -> torch.Tensor:
            loss = F.cross_entropy(gm(X.to(memory_format=memory)), Y)
            loss.backward()
            return loss

        if not isinstance(optimizers[0], torch.optim.LBFGS):
            closure()
        for optimizer in optimizers:
            optimizer.step(closure) if isinstance(optimizer, torch.optim.LBFGS) else optimizer.step()  # type: ignore[arg-type]


def states(gm: fx.GraphModule, optimizers: list[Optimizer]) -> dict[str, dict[str, Any]]:
    """The state of each parameter, by name, copied."""
    names = {id(p): name for name, p in gm.named_parameters()}
    return {names[id(p)]: copy.deepcopy(dict(s)) for o in optimizers for p, s in innermost(o).state.items() if id(p) in names}


def oracle(
    gm: fx.GraphModule, optimizers: list[Optimizer], makes: tuple[Make, Make], state: dict[str, dict[str, Any]]
) -> tuple[fx.GraphModule, list[Optimizer]]:
    twin = copy.deepcopy(gm)
    for p in twin.parameters():
        p.data, p.grad = p.detach().clone(memory_format=torch.contiguous_format), None
    kept = stp_fx.plan_of(gm).kept
    names = {id(p): name for name, p in gm.named_parameters()}
    others = []
    for optimizer, make in zip(optimizers, makes, strict=False):
        other = make([twin.get_parameter(names[id(p)]) for p in of_all(optimizer)])
        for new, old in zip(other.param_groups, optimizer.param_groups, strict=True):
            new.update({k: copy.deepcopy(v) for k, v in old.items() if k not in ("params", "fused", "foreach")})
        inside = innermost(other)
        for name in (names[id(p)] for p in of_all(optimizer)):
            if name in state:
                inside.state[twin.get_parameter(name)] = {k: by_hand(v, name, kept) for k, v in state[name].items()}
        others.append(other)
    return twin, others


def by_hand(value: Any, name: str, kept: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    found = value.numpy().copy()
    for (tensor, dim), index in kept.items():
        if tensor == name and found.ndim > dim and found.shape[dim] > 1:
            found = found.take(index, axis=dim)
    return torch.from_numpy(found.copy())
