"""PATPassManager: pruning steps at the right epochs of an otherwise unchanged training loop.

Report, sections 1.2, 2.2, 2.4.3 and 2.5. Every step is a pipeline of the library's passes; the manager decides when, for
how much, and puts the result into the model that the loop holds.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from typing_extensions import Unpack

from stp_fx.analysis.cost import cost
from stp_fx.checks import check_flag, is_whole, shown
from stp_fx.criteria import Criterion
from stp_fx.errors import InputError
from stp_fx.ir import provenance_of
from stp_fx.ir.validation import Validate
from stp_fx.selection.selection import Selection, SelectionOptions, takes_selection
from stp_fx.training import checkpoint, schedules, sharded_checkpoint
from stp_fx.training.adopt import adopt
from stp_fx.training.arguments import first_wrapped, own_graph, step_passes, with_regrowth, wrapped
from stp_fx.training.commit import Change, commit, entry
from stp_fx.training.epochs import optimizer_steps, step_epochs
from stp_fx.training.followers import listed_followers
from stp_fx.training.optimizers import all_optimizers, check_optimizers, listed_optimizers, train_new
from stp_fx.training.regularized import Regularized
from stp_fx.training.regularizers import Regularizer
from stp_fx.training.schedules import Schedule
from stp_fx.training.sharded import Sharded, check_possible
from stp_fx.training.state import VERSION, check_state, described, rebuilt, structure
from stp_fx.training.step import Prepared, changes_to, without_observers
from stp_fx.training.targets import Targets
from stp_fx.training.words import position_text, steps_html, tell_step

__all__ = ["PATPassManager"]

_log = logging.getLogger("stp_fx.pat")


class PATPassManager:
    """Prunes ``gm`` in ``steps`` steps while it is trained.

    ::

        pat = stp_fx.PATPassManager(gm, criterion="magnitude", ratio=0.5, steps=5, optimizer=optimizer, train_loader=loader)
        for epoch in range(epochs):
            pat.prune(epoch)                       # does something at the epochs of the schedule
            for x, y in loader:
                loss = criterion(pat.model(x), y) + pat.loss()
                loss.backward()
                pat.regularize()                   # adds to the gradients; 0.0 once pruning is over
                optimizer.step()
                pat.step()                         # does something with `every`, `start_step` or `end_step`
                optimizer.zero_grad()

    The model and its parameters are the same objects throughout; optimizers given here have their state cut with
    the parameters. Steps before the last mask by default (the structure, the optimizer's state and the learning-rate
    schedule are not changed), the last one removes. ``criterion``, ``ratio``, ``loss`` and ``options`` (the other fields of
    :class:`stp_fx.Selection`) are those of :func:`stp_fx.prune_graph`; ``ratio`` is the fraction removed after the last step, of
    the model as given.

    A step is made as a whole or not at all: whatever fails, fails before the model, optimizers or followers are changed, and the
    step is due again. An interrupt (KeyboardInterrupt) that arrives while they are being changed is raised when all of them are.

    Args:
        gm: what :func:`stp_fx.trace` returned; changed in place, and with it the model that it was traced from, whose parameters
            it shares.
        steps: pruning steps; at most 1 is one-shot.
        start_epoch: the epoch of the first step; regularization starts before it (sparse pre-training).
        end_epoch: the epoch of the last step; by default ``start_epoch + (steps - 1) * epoch_rate``.
        epoch_rate: epochs from one step to the next; follows from ``end_epoch`` if that is given.
        start_step, end_step, every: the same in optimizer steps: if one of them is given, :meth:`step` prunes, after so many of
            its calls, and :meth:`prune` only notes the epoch.
        schedule: a name or a value of :mod:`stp_fx.schedules`: how the ratio is shared among the steps.
        mask_until_last: mask at all steps but the last; else every step removes.
        regrow: whether steps take masked units back where others score lower by now. A masked unit's score is that of its
            weights, which only momentum and weight decay still change. For criteria of weights, without compensation.
        regularizer: of :mod:`stp_fx.regularizers`, by name or as a value; it acts until the last step. One that aims at what the
            next step removes (``GrowingReg(ratio=None)``) is told now, after each step, and by :meth:`prune` at each epoch where
            the criterion reads weights alone.
        compensation: None, "mean", "least_squares", "sequential", "blockwise" or "distillation".
        recalibrate: batches on which BatchNorm is recalibrated after the last step (True: as many as for calibration).
        train_loader: batches for criteria and compensation that read data, and for recalibration.
        calibration_batches: how many of them are read at a step; None reads all.
        optimizer: one or several optimizers of the model's parameters; ``()`` if they come later, by :meth:`connect`.
        followers: further graphs of the same structure that follow every rewrite, such as an ``AveragedModel`` of ``gm``; they
            are compensated and recalibrated by what they compute themselves.
        validate: whether every removal is run beside the masked graph and compared, and the capture checked, as for
            :func:`stp_fx.prune_graph`.
        wrap: called with the model, now and after every change of shapes; its result is :attr:`parallel`
            (``torch.nn.parallel.DistributedDataParallel``). For a sharded model: what has sharded it (``fully_shard``); each step
            makes a new :attr:`model`, whose parameters the optimizers then have.
        inplace: False works on a copy of ``gm``, :attr:`model`: make the optimizer of its parameters and give it to
        :meth:`connect`.

    Raises:
        InputError: an argument out of range, data that is needed and not given, an optimizer of another network, or one whose
            state cannot be cut.
        NothingToPruneError: no channel may be removed.
        FunctionChangedError: at a step, removing channels is not masking them; the model is as before the step.
    """

    @takes_selection("ratio")
    def __init__(
        self,
        gm: fx.GraphModule,
        *,
        criterion: str | Criterion = "magnitude",
        ratio: float = 0.5,
        steps: int = 1,
        start_epoch: int = 0,
        end_epoch: int | None = None,
        epoch_rate: int = 1,
        start_step: int | None = None,
        end_step: int | None = None,
        every: int | None = None,
        schedule: str | Schedule = "geometric",
        mask_until_last: bool = True,
        regrow: bool = False,
        regularizer: str | Regularizer | None = None,
        compensation: str | None = None,
        recalibrate: int | bool | None = None,
        train_loader: Iterable[Any] | None = None,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        loss: Any = None,
        calibration_batches: int | None = None,
        followers: Sequence[nn.Module] = (),
        wrap: Callable[[nn.Module], nn.Module] | None = None,
        example_inputs: Any = None,
        validate: Validate = "auto",
        inplace: bool = True,
        **options: Unpack[SelectionOptions],
    ) -> None:
        selection = Selection(ratio, **options)
        self.model: fx.GraphModule = own_graph(gm, example_inputs, validate, check_flag("inplace", inplace))
        self._steps = optimizer_steps(steps, start_step, end_step, every)
        self.epochs: tuple[int, ...] = step_epochs(steps, start_epoch, end_epoch, epoch_rate)
        shares = schedules.resolve(schedule)
        self.ratios: tuple[float, ...] = shares.ratios(ratio, len(self.epochs))
        self._regularized = Regularized(regularizer, selection.ignore)
        self.regularizer: Regularizer | None = self._regularized.value
        self.mask_until_last: bool = check_flag("mask_until_last", mask_until_last)
        self._shards = Sharded.of(self.model, wrap)
        self._passes = step_passes(
            self._graph, criterion, selection, compensation, recalibrate, train_loader, calibration_batches, loss, validate
        )
        if check_flag("regrow", regrow):
            self._passes = with_regrowth(self._passes, mask_until_last=self.mask_until_last, sharded=self._shards is not None)
        self.criterion: Criterion = self._passes.criterion
        self._selection = selection
        check_possible(self._shards, self._passes, selection, followers=followers, regularizer=regularizer, validate=validate)
        self._averages, self.followers = listed_followers(followers, self.model)
        self.taken, self.epoch, self.count, self._wrap = 0, -1, 0, wrap
        own = {name: shares.ratios(each, len(self.epochs)) for name, each in (selection.ratios or {}).items()}
        sizes = self._passes.sizes
        self._targets = Targets(selection, self.ratios, own, cost(self._graph), sizes, self.mask_until_last)
        self._targets.check(self._graph)
        self._take_optimizers(optimizer)
        self._parallel: nn.Module | None = first_wrapped(self.model, wrap, sharded=self._shards is not None)
        if self.regularizer is not None:
            self.regularizer.attach(self.model)
        self._regularized.hook(self.model, self.optimizers, lambda: self.finished)
        self._aim()

    def __repr__(self) -> str:
        at, unit = (self.epochs, "epoch") if self._steps is None else (self._steps, "optimizer step")
        state = "finished" if self.finished else f"next at {unit} {at[self.taken]}"
        return (
            f"PATPassManager({type(self.model).__name__}, {self.criterion}, {self._selection}; "
            f"step {self.taken} of {len(self.epochs)}, {state})"
        )

    def _repr_html_(self) -> str:
        return steps_html(repr(self), self._steps, self.epochs, self.ratios, self.taken)

    # -- the two calls of a training loop --------------------------------------------------------------------------

    def prune(self, epoch: int) -> bool:
        """To be called at the start of every epoch: takes the steps that are due; True if there was one.

        Raises:
            StpFxError: what a pass of the step raises; nothing has been changed, and the step is due again.
        """
        if not is_whole(epoch):
            raise InputError(f"`epoch` is a whole number; got {shown(epoch)}")
        due = self.taken if self._steps is not None else sum(epoch >= each for each in self.epochs)
        if self._take_due(due, epoch=int(epoch)):
            return True
        if not self._passes.reads_data:
            self._aim()
        return False

    def step(self) -> bool:
        """To be called after every step of the optimizer, where the schedule is one of optimizer steps: takes the pruning steps
        that are due; True if there was one. Else it counts.

        Raises:
            StpFxError: what a pass of the step raises; nothing has been changed, and the step is due again at the next call.
        """
        count = self.count + 1
        return self._take_due(0 if self._steps is None else sum(count >= each for each in self._steps), count=count)

    def regularize(self) -> float:
        """Adds the regularizer's gradients to those of the parameters, after ``backward`` (with a ``GradScaler``, after its
        ``unscale_``), once an optimizer step; returns the L1 norm of its gradients.

        0.0 without a regularizer that works on gradients, and once the last step has been taken."""
        return 0.0 if self.finished else self._regularized.gradients(self.model)

    def loss(self) -> torch.Tensor:
        """The loss term of a regularizer that has no other form, of the last forward in train mode; else 0, and once the
        last step has been taken."""
        term = None if self.finished or not self.model.training else self._regularized.loss(self.model)
        return torch.zeros((), device=next((p.device for p in self.model.parameters()), None)) if term is None else term

    @property
    def finished(self) -> bool:
        """Whether the last step has been taken: the rest is fine-tuning."""
        return self.taken >= len(self.epochs)

    @property
    def parallel(self) -> nn.Module:
        """The model as ``wrap`` returned it last; the model itself without ``wrap``, or where it is sharded."""
        if self._parallel is None:
            self._parallel = wrapped(self.model, self._wrap)
        return self._parallel

    def connect(self, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> None:
        """Takes these optimizers in place of those given before: for frameworks that make theirs late, or anew.

        They must have been made from the model as it is now. Biases that earlier steps have added are put in the order of an
        uninterrupted run, so that the state dict of its optimizer can be loaded.

        Raises:
            InputError: something else than optimizers, those of another network, or one whose state cannot be cut.
        """
        self._take_optimizers(optimizer)
        added = [(name, self.model.get_parameter(name)) for name in provenance_of(self.model).added]
        commit(train_new(self.optimizers, self.model, added))
        self._regularized.hook(self.model, self.optimizers, lambda: self.finished)

    @property
    def _graph(self) -> fx.GraphModule:
        """The graph that the library's passes read: the model, or the structure of one that is sharded."""
        return self.model if self._shards is None else self._shards.graph

    def _take_optimizers(self, optimizer: Any) -> None:
        optimizers, following = listed_optimizers(optimizer), all_optimizers(optimizer)
        check_optimizers(following, self.model)
        self._regularized.check(optimizer)
        if optimizer is None:
            _log.warning("no optimizer is given, so none follows the model: give `optimizer`, or () if there is none, or later")
        self.optimizers, self._outer, self._following = optimizers, following[: len(optimizers)], following

    def _aim(self) -> None:
        """Tells a regularizer that aims what the next step would remove now."""
        if self._regularized.aims and not self.finished:
            plan = self._passes.planned(self.model, self._targets.at(self.model, self.taken + 1, self.taken))
            commit([self._regularized.aimed(self.model, plan)])

    # -- one step --------------------------------------------------------------------------------------------------

    def _take_due(self, due: int, **position: int) -> bool:
        """Takes the steps up to ``due``, and is then at this ``position``; without a step only the latter."""
        if due <= self.taken:
            self.__dict__.update(position)
            return False
        if due - self.taken > 1:
            _log.warning("%s: %d steps were due at once; they are taken as one", position_text(position), due - self.taken)
        last = due == len(self.epochs)
        masking = self.mask_until_last and not last
        selection = self._targets.at(self._graph, due, self.taken)
        if self._shards is not None:
            ready = self._shards.prepare(self._passes, selection, masking=masking)
        else:
            ready = self._passes.prepare(
                self.model, self.followers, selection, masking=masking, last=last, regularizer=self.regularizer
            )
        aims = self._regularized.aims and not last
        upcoming = self._passes.planned(ready.result, self._targets.at(ready.result, due + 1, due)) if aims else None
        changes = self._changes(ready)  # the parts of `ready.result` become those of the model
        if aims:
            changes.append(self._regularized.aimed(self.model, upcoming))
        commit([*changes, *(entry(self.__dict__, key, value) for key, value in {**position, "taken": due}.items())])
        _ = self.parallel
        whole, axes = self._targets.whole, len(ready.plan.kept)
        tell_step(due, len(self.epochs), position, masking, axes, cost(self._graph), whole)
        return True

    def _changes(self, ready: Prepared) -> list[Change]:
        if self._shards is not None:
            shards, changes = self._shards.changes(ready, self.optimizers, self._following)
            return [*changes, *shards.held(self.__dict__)]
        changes, moved = changes_to(self.model, self.followers, ready, self.optimizers, self._following)
        return [*changes, entry(self.__dict__, "_parallel", None)] if self._wrap is None or moved else changes

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain data: the steps taken, the removed and the masked channels, the regularizer's state, and what the run was asked
        for."""
        saved = getattr(self.regularizer, "state_dict", None)
        return {
            "version": VERSION,
            "step": self.taken,
            "epoch": self.epoch,
            "count": self.count,
            "unit": "epochs" if self._steps is None else "optimizer steps",
            "epochs": list(self._steps or self.epochs),
            "ratios": list(self.ratios),
            "criterion": described(self.criterion),
            **structure(self._graph),
            "regularizer": None if saved is None else saved(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Gives the model the structure that it had; then load the model's and the optimizer's own state dicts. (The optimizer's
        may have been loaded before, where no biases have been added.)

        The manager must have been made as the one that saved, around the unpruned model. A model that has that structure
        already keeps it. Nothing is changed where the state is refused.

        Raises:
            InputError: a state of another schedule, ratio, criterion or version, one that is damaged, or a model that has been
                pruned otherwise.
        """
        self._load(state, lambda gm: None)

    def _load(self, state: Mapping[str, Any], check: Callable[[fx.GraphModule], None]) -> fx.GraphModule:
        """``check`` is given the graph of the state's structure, before anything is changed. Gives the model."""
        check_state(state, self.state_dict())
        load, save = (getattr(self.regularizer, name, None) for name in ("load_state_dict", "state_dict"))
        if load is None and state["regularizer"] is not None:
            raise InputError("the state holds that of a regularizer, and this manager has none that takes it: give `regularizer`")
        known = structure(self._graph)
        finished = state["step"] == len(self.epochs)
        detached = self.regularizer if finished and not self.finished else None
        changes: list[Change] = []
        if any(known[key] != (list(state[key]) if key == "added" else state[key]) for key in known):
            if self.taken or provenance_of(self._graph).plan is not None:
                raise InputError("load_state_dict needs a manager around the unpruned model, before its first step")
            ready = rebuilt(self._graph, self.followers, state, detached, self._shards and self._shards.device)
            check(ready.result)
            changes += self._changes(ready)
        else:
            check(self._graph)
            if detached is not None:
                changes += adopt(self.model, without_observers(self.model, detached)).changes
        position = {"taken": int(state["step"]), "epoch": int(state["epoch"]), "count": int(state["count"])}
        changes += [entry(self.__dict__, name, value) for name, value in position.items()]
        if load is not None and save is not None and state["regularizer"] is not None:
            before = copy.deepcopy(save())
            changes.insert(0, Change(lambda: load(state["regularizer"]), lambda: load(before)))
        commit(changes)
        _ = self.parallel
        return self.model

    def save(self, path: str | os.PathLike[str], **objects: Any) -> None:
        """Writes the whole run into one file: the state of this manager, the model, the optimizers, the followers, ``objects``
        with state dicts (``scheduler=scheduler, scaler=scaler``), and the random states of every rank. To be called on all ranks.

        Raises:
            InputError: an object without ``state_dict`` and ``load_state_dict``.
            FileError: the file cannot be written; what was there is as it was.
        """
        if self._shards is not None:
            return sharded_checkpoint.save(path, self.model, self._outer, self.state_dict(), objects)
        averages = [each.state_dict() for each in self._averages]
        parts = {"manager": self.state_dict(), "model": self.model.state_dict(), "followers": averages}
        checkpoint.write(path, {**parts, **checkpoint.saved(objects, self._outer)})

    def load(self, path: str | os.PathLike[str], **objects: Any) -> None:
        """Goes on from :meth:`save`, in a manager that was made as the one that saved, around the unpruned model, with
        ``objects`` of the same names.

        Raises:
            FileError: no such file, or one that :meth:`save` has not written.
            InputError: the file is of another run (see :meth:`load_state_dict`), model or objects.
        """
        if self._shards is not None:
            return sharded_checkpoint.load(path, lambda state: self._load(state, lambda gm: None), self._outer, objects)
        found = checkpoint.read(path, objects)
        self._load(found["manager"], lambda gm: checkpoint.check_fits(gm, found["model"], "model"))
        self.model.load_state_dict(found["model"])
        checkpoint.load_others(found, self._averages, self._outer, objects)
