"""A pruning step is made as a whole or not at all: whatever fails, and whenever an interrupt arrives."""

from __future__ import annotations

import copy
import functools
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.optim.swa_utils import AveragedModel

import stp_fx
from stp_fx.errors import InputError
from stp_fx.ir.provenance import provenance_of
from stp_fx.training.commit import Change, commit, entry

# An interrupt that arrives in a `__del__` or in the callback of a weak reference can only be reported.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TRAINING = str(Path(stp_fx.__file__).parent / "training")
X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Run:
    """A small network with an EMA and an optimizer that has state, about to be pruned."""

    def __init__(self, loader: Any = None, **options: Any) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(),
            nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 3),
        ).double()  # fmt: skip
        self.gm: fx.GraphModule = stp_fx.trace(net, X)
        self.ema = AveragedModel(self.gm)
        self.optimizer = torch.optim.Adam(self.gm.parameters(), lr=1e-2)
        self.pat = stp_fx.PATPassManager(
            self.gm, ratio=0.5, compensation="mean", train_loader=[X] if loader is None else loader, recalibrate=True,
            optimizer=self.optimizer, followers=[self.ema], **options,
        )  # fmt: skip
        self.train()

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.gm.train()(X).square().mean().backward()
        self.optimizer.step()
        self.ema.update_parameters(self.gm)

    def all_of_it(self) -> tuple[Any, ...]:
        """Everything that a step may change, as values that can be compared."""
        pat = self.pat
        graphs = []
        for gm in (self.gm, self.ema.module):
            state = provenance_of(gm)
            values = {key: (value.shape, value.tolist()) for key, value in gm.state_dict().items()}
            grads = [None if p.grad is None else p.grad.tolist() for p in gm.parameters()]
            graphs.append((gm.code, values, grads, state.plan, state.masked, state.added, gm.eval()(X).tolist()))
            gm.train()
        names = {id(p): name for name, p in self.gm.named_parameters()}
        groups = [[names[id(p)] for p in group["params"]] for group in self.optimizer.param_groups]
        state = {
            names[id(p)]: {key: (value.stride(), value.tolist()) for key, value in each.items()}
            for p, each in self.optimizer.state.items()
        }
        return (*graphs, groups, state, pat.taken, pat.epoch, pat.state_dict(), pat.parallel is self.gm)


class Interrupter:
    """Raises ``KeyboardInterrupt`` at the event of that number: a line of the training package, or a call anywhere."""

    def __init__(self, at: int = -1) -> None:
        self.at, self.seen = at, 0

    def _event(self) -> None:
        self.seen += 1
        if self.seen - 1 == self.at:
            sys.settrace(None)
            raise KeyboardInterrupt

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            self._event()
        return self._line

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        self._event()
        return self._line if frame.f_code.co_filename.startswith(TRAINING) else None

    def during(self, call: Callable[[], Any]) -> BaseException | None:
        sys.settrace(self._call)
        try:
            call()
        except KeyboardInterrupt as error:
            return error
        finally:
            sys.settrace(None)
            torch.set_grad_enabled(True)  # a `with torch.no_grad()` that is interrupted on its way in does not come out
        return None


def chosen(events: int, seed: int) -> Iterator[int]:
    """Numbers of events, at random: all are as likely, and in turn those towards the end, where changes are made."""
    draws = random.Random(seed)
    for count in itertools.count():
        yield draws.randrange(events) if count % 2 else events - 1 - min(int(draws.expovariate(1 / 100)), events - 1)


def interrupted(number: int, epoch: int, **options: Any) -> dict[str, int]:
    """Interrupts step after step, and says how often the run was as before and as after."""
    done = Run(**options)
    for earlier in range(epoch):
        done.pat.prune(earlier)
    counter = Interrupter()
    counter.during(lambda: done.pat.prune(epoch))
    at, after = chosen(counter.seen, epoch), done.all_of_it()
    counts = {"before": 0, "after": 0}
    run: Run | None = None
    for _ in range(number):
        if run is None:
            run = Run(**options)
            for earlier in range(epoch):
                run.pat.prune(earlier)
            before = run.all_of_it()
        error = Interrupter(next(at)).during(functools.partial(run.pat.prune, epoch))
        found = run.all_of_it()
        assert error is not None or found == after
        assert found in (before, after), "between"
        counts["before" if found == before else "after"] += 1
        if found == after:
            run = None
    if run is not None:
        run.pat.prune(epoch)
        assert run.all_of_it() == after
    return counts


@pytest.mark.parametrize(("epoch", "masks"), [(0, True), (1, True), (0, False)])
def test_an_interrupted_step_is_as_before_or_as_after(epoch: int, masks: bool) -> None:
    counts = interrupted(8, epoch, steps=2, mask_until_last=masks)
    assert counts["before"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("epoch", "masks"), [(0, True), (1, True), (0, False), (1, False)])
def test_a_thousand_interrupts(epoch: int, masks: bool) -> None:
    counts = interrupted(250, epoch, steps=2, mask_until_last=masks)
    print(f"epoch {epoch}, masks {masks}: {counts}")
    assert counts["before"] > 20
    assert counts["after"] > 20


class Failing:
    """A loader that fails at one of its iterations."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.left -= 1
        if self.left == -1:
            raise OSError("the disk is gone")
        yield X


@pytest.mark.parametrize("at", range(4))
def test_data_that_fail_leave_the_step_to_be_taken_again(at: int) -> None:
    """The model's statistics, its recalibration, the follower's statistics, and its recalibration."""
    run = Run(Failing(at))
    before = run.all_of_it()
    with pytest.raises(InputError, match="the disk is gone"):
        run.pat.prune(0)
    assert run.all_of_it() == before
    assert run.pat.prune(0)
    assert run.pat.finished
    again = Run()
    again.pat.prune(0)
    assert run.all_of_it() == again.all_of_it()


def test_an_optimizer_that_turns_out_not_to_be_cuttable_stops_the_step_before_it_begins() -> None:
    run = Run()
    run.optimizer.state[run.gm.get_parameter("0.weight")]["history"] = torch.zeros(7)
    before = run.all_of_it()
    for _ in range(2):
        with pytest.raises(InputError, match=r"Adam keeps 'history' of '0.weight' with shape \(7,\)"):
            run.pat.prune(0)
        assert run.all_of_it() == before


def test_a_wrapper_that_fails_is_made_again() -> None:
    made: list[int] = []

    def wrap(model: nn.Module) -> nn.Module:
        made.append(1)
        if len(made) == 2:
            raise RuntimeError("no process group")
        return nn.Sequential(model)

    run = Run(wrap=wrap)
    with pytest.raises(InputError, match="no process group"):
        run.pat.prune(0)
    assert run.pat.finished
    assert run.pat.parallel(X).shape == (16, 3)
    assert len(made) == 3


# -- states ---------------------------------------------------------------------------------------------------------


def saved(**options: Any) -> tuple[dict[str, Any], Run]:
    run = Run(steps=2, **options)
    run.pat.prune(0)
    run.pat.prune(1)
    return run.pat.state_dict(), run


def test_an_interrupted_load_is_as_before_or_as_after() -> None:
    state, _ = saved()
    done = Run(steps=2)
    counter = Interrupter()
    counter.during(lambda: done.pat.load_state_dict(state))
    after = done.all_of_it()
    run = Run(steps=2)
    before = run.all_of_it()
    for at in (*range(counter.seen - 12, counter.seen, 3), *range(5, counter.seen, counter.seen // 6)):
        Interrupter(at).during(functools.partial(run.pat.load_state_dict, state))
        found = run.all_of_it()
        assert found in (before, after)
        run = Run(steps=2) if found == after else run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": [0.1, 0.2]}, "another schedule or ratio"),
        ({"criterion": "Variance()"}, "another criterion"),
        ({"epochs": [0, 7]}, "another schedule"),
        ({"unit": "optimizer steps"}, "another schedule"),
        ({"step": 3}, "after step 3 of 2"),
        ({"step": -1}, "after step -1"),
        ({"plan": None}, "no channels removed"),
        ({"plan": "{"}, "no plan"),
        ({"added": [3]}, "wrong kind"),
        ({"added": ["nowhere.bias"]}, "nowhere.bias"),
        ({"epoch": None}, "wrong kind"),
        ({"version": 1}, "version 1"),
    ],
)
def test_a_state_that_cannot_be_is_refused_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    state, _ = saved()
    run = Run(steps=2)
    before = run.all_of_it()
    with pytest.raises(InputError, match=message):
        run.pat.load_state_dict({**state, **change})
    for key in state:
        with pytest.raises(InputError, match="state"):
            run.pat.load_state_dict({k: v for k, v in state.items() if k != key})
    assert run.all_of_it() == before
    run.pat.load_state_dict(state)
    assert run.pat.finished


def test_the_optimizers_state_may_be_loaded_first() -> None:
    def start() -> tuple[stp_fx.PATPassManager, torch.optim.Optimizer]:
        torch.manual_seed(0)
        gm = stp_fx.trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double(), X)
        optimizer = torch.optim.Adam(gm.parameters(), lr=1e-2)
        return stp_fx.PATPassManager(gm, ratio=0.5, optimizer=optimizer), optimizer

    def train(pat: stp_fx.PATPassManager, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        pat.model(X).square().mean().backward()
        optimizer.step()

    first, optimizer = start()
    train(first, optimizer)
    first.prune(0)
    train(first, optimizer)
    second, other = start()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    second.load_state_dict(first.state_dict())
    second.model.load_state_dict(first.model.state_dict())
    for pat, each in ((first, optimizer), (second, other)):
        train(pat, each)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


# -- the changes themselves ---------------------------------------------------------------------------------------


def test_a_change_that_fails_undoes_the_others() -> None:
    mapping: dict[str, int] = {"a": 1}

    def fail() -> None:
        raise RuntimeError("no")

    changes = [entry(mapping, "a", 2), entry(mapping, "b", 3), Change(fail, lambda: None)]
    with pytest.raises(RuntimeError, match="no"):
        commit(changes)
    assert mapping == {"a": 1}


def test_an_interrupt_while_changes_are_undone_is_held_back_too() -> None:
    mapping, calls = {"a": 1}, list[int]()

    def fail() -> None:
        raise RuntimeError("no")

    def once() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(RuntimeError, match="no"):
        commit([entry(mapping, "a", 2), Change(lambda: None, once), Change(fail, lambda: None)])
    assert mapping == {"a": 1}


def test_an_interrupt_is_held_back_until_all_changes_are_made() -> None:
    mapping: dict[str, int] = {}
    calls: list[int] = []

    def once() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        commit([entry(mapping, "a", 1), Change(once, lambda: None), entry(mapping, "b", 2)])
    assert mapping == {"a": 1, "b": 2}
