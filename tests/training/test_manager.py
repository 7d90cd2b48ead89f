"""The PAT manager in a training loop: what it prunes when, what stays the same object, what the optimizer keeps."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import stp_fx
from stp_fx.errors import InputError
from stp_fx.ir.provenance import provenance_of

LOADER = [(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(k)), torch.arange(8) % 4) for k in range(3)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.a, self.na = nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.nb = nn.Conv2d(16, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.mid, self.head = nn.Linear(12, 20, bias=False), nn.Linear(20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.nb(self.b(F.relu(self.na(self.a(x))))))
        return self.head(F.gelu(self.mid(x.mean((2, 3)))))


def traced() -> fx.GraphModule:
    torch.manual_seed(0)
    return stp_fx.trace(Net(), LOADER[0][0])


def train(pat: stp_fx.PATPassManager, optimizer: torch.optim.Optimizer, epochs: range) -> None:
    for epoch in epochs:
        pat.prune(epoch)
        pat.model.train()
        for x, y in LOADER:
            (F.cross_entropy(pat.model(x), y) + pat.loss()).backward()
            pat.regularize()
            optimizer.step()
            optimizer.zero_grad()


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


@pytest.mark.parametrize(
    ("arguments", "epochs"),
    [
        ({"steps": 1, "start_epoch": 2}, (2,)),
        ({"steps": 0}, (0,)),
        ({"steps": 3, "start_epoch": 1, "epoch_rate": 2}, (1, 3, 5)),
        ({"steps": 3, "start_epoch": 1, "end_epoch": 9}, (1, 5, 9)),
    ],
)
def test_steps_fall_on_the_epochs_of_the_report(arguments: dict[str, int], epochs: tuple[int, ...]) -> None:
    pat = stp_fx.PATPassManager(traced(), **arguments)  # type: ignore[arg-type]
    assert [epoch for epoch in range(12) if pat.prune(epoch)] == list(epochs)
    assert pat.finished


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("target", ["channels", "macs", "params"])
def test_the_last_step_ends_at_the_ratio(masks: bool, target: str) -> None:
    gm = traced()
    whole = stp_fx.cost(gm)
    pat = stp_fx.PATPassManager(gm, ratio=0.6, steps=3, mask_until_last=masks, target=target)
    left = []
    for epoch in range(3):
        pat.prune(epoch)
        left.append(stp_fx.cost(pat.model))
        assert pat.model(LOADER[0][0]).shape == (8, 4)
    assert left[0].macs > left[1].macs > left[2].macs
    if target == "channels":
        assert pat.model.get_parameter("a.weight").shape[0] in (6, 7)
    else:
        assert getattr(left[2], target) / getattr(whole, target) == pytest.approx(0.4, abs=0.06)  # one of 12 channels is 8 %


def test_geometric_steps_take_equal_parts_of_what_is_left() -> None:
    pat = stp_fx.PATPassManager(traced(), ratio=0.75, steps=2)
    assert pat.ratios == pytest.approx((0.5, 0.75))


def test_the_users_objects_stay_the_same() -> None:
    gm = traced()
    parameters = dict(gm.named_parameters())
    pat = stp_fx.PATPassManager(gm, ratio=0.5, steps=2)
    for epoch in range(2):
        pat.prune(epoch)
        assert pat.model is gm
        for name, parameter in gm.named_parameters():
            assert parameter is parameters[name], name
    assert gm.get_parameter("a.weight").shape == (8, 6, 3, 3)
    assert copy.deepcopy(gm)(LOADER[0][0]).shape == (8, 4)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_optimizer_goes_on_with_the_state_of_what_stays(name: str) -> None:
    gm = traced()
    optimizer = OPTIMIZERS[name](gm.parameters())
    pat = stp_fx.PATPassManager(gm, ratio=0.5, steps=2, start_epoch=1, optimizer=optimizer, mask_until_last=False)
    train(pat, optimizer, range(1))
    before = {
        k: {s: v.clone() if torch.is_tensor(v) else v for s, v in optimizer.state[p].items()} for k, p in gm.named_parameters()
    }
    pat.prune(1)
    plan = stp_fx.plan_of(gm)
    checked = 0
    for key, parameter in gm.named_parameters():
        for what, value in optimizer.state[parameter].items():
            expected = before[key][what]
            if not torch.is_tensor(value) or value.dim() == 0:
                assert value == expected
                continue
            for (tensor, dim), kept in plan.kept.items():
                if tensor == key and expected.shape[dim] > 1:
                    expected = expected.index_select(dim, torch.from_numpy(kept))
            assert torch.equal(value, expected), (key, what)
            checked += value.shape != before[key][what].shape
    assert checked >= 4
    train(pat, optimizer, range(2, 4))
    assert all(torch.isfinite(p).all() for p in gm.parameters())


def test_a_loss_that_the_loop_still_holds_does_not_matter() -> None:
    gm = traced()
    optimizer = OPTIMIZERS["sgd"](gm.parameters())
    pat = stp_fx.PATPassManager(gm, ratio=0.5, steps=2, optimizer=optimizer, mask_until_last=False)
    held = []
    for epoch in range(3):
        pat.prune(epoch)
        for x, y in LOADER:
            loss = F.cross_entropy(pat.model(x), y)
            held.append(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in gm.parameters())


def test_masked_steps_leave_optimizer_and_schedule_as_they_are() -> None:
    gm = traced()
    optimizer = OPTIMIZERS["adamw"](gm.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    pat = stp_fx.PATPassManager(gm, ratio=0.5, steps=3, optimizer=optimizer)
    train(pat, optimizer, range(1))
    state = copy.deepcopy(optimizer.state_dict())
    pat.prune(1)
    assert str(state) == str(optimizer.state_dict())
    schedule.step()
    train(pat, optimizer, range(2, 4))
    schedule.step()
    assert pat.finished
    assert gm.get_parameter("a.weight").shape == (8, 6, 3, 3)


def test_what_is_masked_stays_masked() -> None:
    gm = traced()
    optimizer = OPTIMIZERS["sgd"](gm.parameters())
    pat = stp_fx.PATPassManager(gm, criterion="random", ratio=0.6, steps=4, optimizer=optimizer)
    gone: set[int] = set()
    for epoch in range(3):
        train(pat, optimizer, range(epoch, epoch + 1))
        now = set(range(16)) - set(provenance_of(gm).masked.kept["a.weight", 0].tolist())
        assert gone < now
        gone = now
    train(pat, optimizer, range(3, 4))
    assert gone <= set(range(16)) - set(stp_fx.plan_of(gm).kept["a.weight", 0].tolist())
    assert provenance_of(gm).masked is None


def test_mask_then_remove_is_removing_at_once() -> None:
    results = []
    for masks in (True, False):
        pat = stp_fx.PATPassManager(traced(), ratio=0.5, steps=2, mask_until_last=masks, criterion="random")
        pat.prune(1)  # both steps are due: one at once
        results.append(pat.model.eval()(LOADER[0][0]))
    gm = traced()
    pat = stp_fx.PATPassManager(gm, ratio=0.5, steps=2, criterion="random")
    pat.prune(0)
    pat.prune(1)
    assert torch.equal(results[0], results[1])
    assert torch.allclose(gm.eval()(LOADER[0][0]), results[0], atol=1e-6)


@pytest.mark.parametrize("compensation", ["mean", "least_squares", "sequential"])
@pytest.mark.parametrize("masks", [True, False])
def test_statistics_compensation_and_recalibration(compensation: str, masks: bool, caplog: pytest.LogCaptureFixture) -> None:
    gm = traced()
    optimizer = OPTIMIZERS["sgd"](gm.parameters())
    ema = torch.optim.swa_utils.AveragedModel(gm, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    pat = stp_fx.PATPassManager(
        gm, criterion="variance", ratio=0.5, steps=2, compensation=compensation, recalibrate=True, train_loader=LOADER,
        optimizer=optimizer, mask_until_last=masks, followers=[ema.module],
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        for epoch in range(2):
            train(pat, optimizer, range(epoch, epoch + 1))
            ema.update_parameters(pat.model)
    assert f"[{compensation}]" in caplog.text
    assert "step 2 of 2" in caplog.text
    added = "mid.bias" in dict(gm.named_parameters())  # it had none, and its inputs went
    assert added == (compensation != "sequential")
    assert not added or any(p is gm.get_parameter("mid.bias") for g in optimizer.param_groups for p in g["params"])
    shapes = {k: v.shape for k, v in gm.state_dict().items()}
    assert shapes == {k: v.shape for k, v in ema.module.state_dict().items()}
    assert ema.module(LOADER[0][0]).shape == (8, 4)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_ends_with_the_same_weights(stop: int) -> None:
    def start() -> tuple[stp_fx.PATPassManager, torch.optim.Optimizer]:
        gm = traced()
        optimizer = OPTIMIZERS["adamw"](gm.parameters())
        manager = stp_fx.PATPassManager(
            gm, criterion="variance", ratio=0.6, steps=3, compensation="mean", train_loader=LOADER, optimizer=optimizer
        )
        return manager, optimizer

    whole, optimizer = start()
    train(whole, optimizer, range(5))
    first, optimizer = start()
    train(first, optimizer, range(stop))
    saved = copy.deepcopy((first.state_dict(), first.model.state_dict(), optimizer.state_dict()))
    second, optimizer = start()
    second.load_state_dict(saved[0])
    second.model.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    train(second, optimizer, range(stop, 5))
    expected, found = whole.model.state_dict(), second.model.state_dict()
    assert list(expected) == list(found)
    assert all(torch.equal(expected[k], found[k]) for k in expected)


class Backwards(nn.Module):
    """Layers without biases, made in another order than they are used in."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(20, 4)
        self.c, self.b, self.a = nn.Linear(16, 20, bias=False), nn.Linear(12, 16, bias=False), nn.Linear(192, 12, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.gelu(self.c(F.gelu(self.b(F.gelu(self.a(x.flatten(1))))))))


def backwards(**options: Any) -> tuple[stp_fx.PATPassManager, torch.optim.Optimizer]:
    torch.manual_seed(0)
    gm = stp_fx.trace(Backwards(), LOADER[0][0])
    optimizer = OPTIMIZERS["adamw"]([{"params": [*gm.head.parameters()]}, {"params": [gm.a.weight, gm.b.weight, gm.c.weight]}])
    manager = stp_fx.PATPassManager(
        gm, ratio=0.5, steps=2, compensation="mean", train_loader=LOADER, **{"optimizer": optimizer, **options}
    )
    return manager, optimizer


def order(pat: stp_fx.PATPassManager, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {id(p): name for name, p in pat.model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


@pytest.mark.parametrize("late", [False, True])
def test_a_resumed_optimizer_has_new_biases_in_the_same_order(late: bool) -> None:
    """``late``: a framework makes the optimizer after the model has its structure, and so with biases beside their weights."""
    first, optimizer = backwards()
    train(first, optimizer, range(2))
    assert len(provenance_of(first.model).added) == 2
    second, other = backwards(**{"optimizer": ()} if late else {})
    second.load_state_dict(first.state_dict())
    if late:
        head, a, b, c = (second.model.get_submodule(name) for name in ("head", "a", "b", "c"))
        rest = [*a.parameters(), *b.parameters(), *c.parameters()]
        other = OPTIMIZERS["adamw"]([{"params": [*head.parameters()]}, {"params": rest}])
        second.connect(other)
    assert order(second, other) == order(first, optimizer)
    second.model.load_state_dict(first.model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(first, optimizer, range(2, 3))
    train(second, other, range(2, 3))
    found = second.model.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in first.model.state_dict().items())


def test_an_optimizer_may_come_late_and_anew() -> None:
    gm = traced()
    pat = stp_fx.PATPassManager(gm, ratio=0.5, steps=2, start_epoch=1, regularizer="gmp", optimizer=(), mask_until_last=False)
    regularizer: Any = pat.regularizer
    for count in (1, 2):
        optimizer = OPTIMIZERS["sgd"](gm.parameters())
        pat.connect(optimizer)
        train(pat, optimizer, range(1))
        assert regularizer.steps == count * len(LOADER)  # one hook, that of the optimizer given last
    pat.prune(1)
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in gm.parameters())
    with pytest.raises(InputError, match=r"torch\.optim"):
        pat.connect([None])  # type: ignore[list-item]


def test_an_optimizer_that_wraps_another_is_looked_through() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:  # as Accelerate's: the base class is never initialised
            self.optimizer = optimizer

    gm = traced()
    optimizer = OPTIMIZERS["sgd"](gm.parameters())
    pat = stp_fx.PATPassManager(gm, regularizer="gmp", optimizer=Wrapper(optimizer))
    assert pat.optimizers == (optimizer,)


def test_one_of_two_optimizers_takes_a_new_bias() -> None:
    gm = stp_fx.trace(Backwards(), LOADER[0][0])
    optimizers = [OPTIMIZERS["sgd"](gm.head.parameters()), OPTIMIZERS["sgd"]([gm.a.weight, gm.b.weight, gm.c.weight])]
    pat = stp_fx.PATPassManager(gm, compensation="mean", train_loader=LOADER, optimizer=optimizers)
    pat.prune(0)
    assert [len(o.param_groups[0]["params"]) for o in optimizers] == [2, 5]


def test_what_is_wrapped_around_forward_runs_the_rewritten_graph() -> None:
    """Accelerate's mixed precision keeps the function of ``forward`` and puts its own method on the object."""
    gm = traced()
    early: Any = gm.forward.__func__
    pat = stp_fx.PATPassManager(gm, ratio=0.5, steps=2, regularizer="variance_entropy")
    late: Any = gm.forward.__func__
    gm.eval()
    before = gm(LOADER[0][0])
    for epoch in range(2):
        pat.prune(epoch)
        gm.eval()
        expected = fx.Interpreter(gm).run(LOADER[0][0])
        for function in (early, late, type(gm).forward):
            assert torch.equal(function(gm, LOADER[0][0]), expected)
        assert not torch.equal(expected, before)
    assert copy.deepcopy(gm)(LOADER[0][0]).shape == (8, 4)


def test_a_state_is_taken_by_a_model_that_has_its_structure() -> None:
    pat = stp_fx.PATPassManager(traced(), ratio=0.5, steps=2)
    pat.prune(0)
    states = [pat.state_dict()]
    pat.prune(1)
    states.append(pat.state_dict())
    other = stp_fx.PATPassManager(traced(), ratio=0.5, steps=2)
    for state in states[1:] * 2:
        other.load_state_dict(state)
        assert (other.finished, other.epoch) == (True, 1)
    with pytest.raises(InputError, match="unpruned"):
        other.load_state_dict(states[0])


def test_macs_agree_between_the_masked_and_the_physical_path() -> None:
    costs = []
    for masks in (True, False):
        pat = stp_fx.PATPassManager(traced(), ratio=0.5, steps=2, mask_until_last=masks)
        pat.prune(0)
        costs.append(stp_fx.cost(pat.model).macs)
    assert costs[0] == costs[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1.0}, "ratio"),
        ({"steps": -1}, "steps"),
        ({"epoch_rate": 0}, "epoch_rate"),
        ({"steps": 4, "end_epoch": 1}, "end_epoch"),
        ({"schedule": "sometimes"}, "sometimes"),
        ({"criterion": "variance"}, "train_loader"),
        ({"compensation": "mean"}, "train_loader"),
        ({"compensation": "median", "train_loader": LOADER}, "median"),
        ({"scope": "everywhere"}, "everywhere"),
        ({"ignore": ["nowhere"]}, "nowhere"),
        ({"optimizer": "sgd"}, "torch.optim"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    gm = traced()
    before = {k: v.clone() for k, v in gm.state_dict().items()}
    with pytest.raises(InputError, match=message):
        stp_fx.PATPassManager(gm, **arguments)
    assert all(torch.equal(before[k], v) for k, v in gm.state_dict().items())


def test_a_state_of_another_run_is_refused() -> None:
    pat = stp_fx.PATPassManager(traced(), steps=2)
    state = pat.state_dict()
    with pytest.raises(InputError, match="schedule"):
        stp_fx.PATPassManager(traced(), steps=3).load_state_dict(state)
    with pytest.raises(InputError, match="version"):
        stp_fx.PATPassManager(traced(), steps=2).load_state_dict({**state, "version": 7})
    pat.prune(0)
    with pytest.raises(InputError, match="unpruned"):
        pat.load_state_dict(state)
    regularized = stp_fx.PATPassManager(traced(), steps=2, regularizer="growing", optimizer=()).state_dict()
    with pytest.raises(InputError, match="give `regularizer`"):
        stp_fx.PATPassManager(traced(), steps=2).load_state_dict(regularized)


def test_steps_that_remove_and_compensate_are_kept() -> None:
    def manager() -> stp_fx.PATPassManager:
        return stp_fx.PATPassManager(
            traced(), ratio=0.6, steps=2, mask_until_last=False, compensation="mean", train_loader=LOADER
        )  # fmt: skip

    pat = manager()
    pat.prune(0)
    first = provenance_of(pat.model).added
    pat.prune(1)
    assert first, "biases that the second step shortens"
    again = manager()
    again.load_state_dict(pat.state_dict())
    again.model.load_state_dict(pat.model.state_dict())
    assert torch.equal(again.model.eval()(LOADER[0][0]), pat.model.eval()(LOADER[0][0]))
