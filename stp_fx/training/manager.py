"""PATPassManager: pruning steps at the right epochs of an otherwise unchanged training loop.

Report, sections 1.2, 2.2, 2.4.3 and 2.5. Every step is a pipeline of the library's passes; the manager decides when, for
how much, and puts the result into the model that the loop holds.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Unpack

from stp_fx.analysis.build import analyze
from stp_fx.analysis.cost import cost
from stp_fx.analysis.groups import Group
from stp_fx.analysis.names import prunable_groups
from stp_fx.checks import check_callable, check_flag, is_whole, shown
from stp_fx.criteria import Criterion, needs_of, score
from stp_fx.errors import FunctionChangedError, InputError
from stp_fx.ir import has_provenance, provenance_of, trace
from stp_fx.ir.provenance import needs_whole_tensors
from stp_fx.ir.validation import Validate
from stp_fx.measure.measured import measure
from stp_fx.passes import Artifacts, MaskChannels, Pipeline, RecalibrateBatchNorm, RemoveChannels, SelectUnits
from stp_fx.passes.compensations import compensation_named
from stp_fx.passes.measure_damage import damage_for
from stp_fx.rewrite.bias import restore_biases
from stp_fx.rewrite.removal import mask, remove
from stp_fx.selection import PrunePlan
from stp_fx.selection.choice import select
from stp_fx.selection.selection import Selection, SelectionOptions, takes_selection
from stp_fx.text import ROWS, html_table
from stp_fx.training import regularizers, schedules
from stp_fx.training.adopt import add_to_optimizers, adopt, cut_optimizer, keep_forward, listed_optimizers
from stp_fx.training.arguments import check_state, checked_recalibration, criterion_for, limited_loader, listed_followers, wrapped
from stp_fx.training.distributed import assert_same_plan, share_buffers
from stp_fx.training.epochs import step_epochs
from stp_fx.training.regularizers import Regularizer
from stp_fx.training.schedules import Schedule

__all__ = ["PATPassManager"]

_log = logging.getLogger("stp_fx.pat")
_VERSION = 1


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
                optimizer.zero_grad()

    The model and its parameters are the same objects throughout; optimizers given here have their state cut with
    the parameters. Steps before the last mask by default (the structure, the optimizer's state and the learning-rate
    schedule are not changed), the last one removes. ``criterion``, ``ratio``, ``loss`` and ``options`` (the other fields of
    :class:`stp_fx.Selection`) are those of :func:`stp_fx.prune_graph`; ``ratio`` is the fraction removed after the last step, of
    the model as given.

    Args:
        gm: what :func:`stp_fx.trace` returned; it is changed in place (trace a copy to keep the original).
        steps: pruning steps; at most 1 is one-shot.
        start_epoch: the epoch of the first step; regularization starts before it (sparse pre-training).
        end_epoch: the epoch of the last step; by default ``start_epoch + (steps - 1) * epoch_rate``.
        epoch_rate: epochs from one step to the next; follows from ``end_epoch`` if that is given.
        schedule: a name or a value of :mod:`stp_fx.schedules`: how the ratio is shared among the steps.
        mask_until_last: mask at all steps but the last; else every step removes.
        regularizer: of :mod:`stp_fx.regularizers`, by name or as a value; it acts until the last step.
        compensation: None, "mean", "least_squares", "sequential", "blockwise" or "distillation".
        recalibrate: batches on which BatchNorm is recalibrated after the last step (True: as many as for calibration).
        train_loader: batches for criteria and compensation that read data, and for recalibration.
        calibration_batches: how many of them are read at a step; None reads all.
        optimizer: one or several optimizers of the model's parameters; ``()`` if they come later, by :meth:`connect`.
        followers: further GraphModules of the same structure that follow every rewrite, such as the module of an
            ``AveragedModel``.
        validate: whether every removal is run beside the masked graph and compared, and the capture checked, as for
            :func:`stp_fx.prune_graph`.
        wrap: called with the model, now and after every change of shapes; its result is :attr:`parallel`
            (``torch.nn.parallel.DistributedDataParallel``).

    Raises:
        InputError: an argument out of range, or data that is needed and not given.
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
        schedule: str | Schedule = "geometric",
        mask_until_last: bool = True,
        regularizer: str | Regularizer | None = None,
        compensation: str | None = None,
        recalibrate: int | bool | None = None,
        train_loader: Iterable[Any] | None = None,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        loss: Any = None,
        calibration_batches: int | None = None,
        followers: Sequence[fx.GraphModule] = (),
        wrap: Callable[[nn.Module], nn.Module] | None = None,
        example_inputs: Any = None,
        validate: Validate = "auto",
        **options: Unpack[SelectionOptions],
    ) -> None:
        selection = Selection(ratio, **options)
        self.model: fx.GraphModule = gm if example_inputs is None else trace(gm, example_inputs, validate=validate)
        if not has_provenance(self.model):
            raise InputError("`gm` has not been traced: call stp_fx.trace(model, example_inputs) first, or pass example_inputs")
        needs_whole_tensors(self.model)
        keep_forward(self.model)
        self.criterion: Criterion = criterion_for(self.model, criterion, selection, compensation, train_loader, loss)
        self.epochs: tuple[int, ...] = step_epochs(steps, start_epoch, end_epoch, epoch_rate)
        shares = schedules.resolve(schedule)
        self.ratios: tuple[float, ...] = shares.ratios(ratio, len(self.epochs))
        self.regularizer: Regularizer | None = None if regularizer is None else regularizers.resolve(regularizer)
        self.mask_until_last: bool = check_flag("mask_until_last", mask_until_last)
        self._loader = limited_loader(train_loader, calibration_batches)
        self._compensation = compensation_named(compensation, self._loader, "train_loader")
        self._damage = damage_for(selection, compensation, self._loader, "train_loader")
        self._needs = (*needs_of(self.criterion), *self._damage.needs, *self._compensation.needs)
        self._loss = check_callable("loss", loss, "(graph, batch) -> scalar")
        self._recalibrate = checked_recalibration(recalibrate)
        if train_loader is None and (self._needs or self._recalibrate):
            raise InputError("the criterion, the compensation or the recalibration reads data: give `train_loader`")
        self._selection, self._removal = selection, RemoveChannels(validate=validate)
        self.optimizers, self.followers = listed_optimizers(optimizer), listed_followers(followers)
        self.step, self.epoch, self._wrap = 0, -1, wrap
        self._whole = cost(self.model)
        self._own = {name: shares.ratios(own, len(self.epochs)) for name, own in (selection.ratios or {}).items()}
        self._sizes = {group.name: group.size for group in analyze(self.model).groups}
        self._plan_of_random_scores()
        self._groups: tuple[Any, list[Group]] | None = None
        if self.regularizer is not None and "step" in self.regularizer.forms and optimizer is None:
            raise InputError(f"{type(self.regularizer).__name__} works after each step of the optimizer: give `optimizer`")
        self._after_step: RemovableHandle | None = None
        self._hook_optimizers()
        if self.regularizer is not None:
            self.regularizer.attach(self.model)
        self.parallel: nn.Module = wrapped(self.model, wrap)

    def __repr__(self) -> str:
        state = "finished" if self.finished else f"next at epoch {self.epochs[self.step]}"
        return (
            f"PATPassManager({type(self.model).__name__}, {self.criterion}, {self._selection}; "
            f"step {self.step} of {len(self.epochs)}, {state})"
        )

    def _repr_html_(self) -> str:
        rows = [
            (number, epoch, f"{ratio:.1%}", "taken" if number <= self.step else "to come")
            for number, (epoch, ratio) in enumerate(zip(self.epochs, self.ratios, strict=True), 1)
        ]
        return html_table(repr(self), ("step", "epoch", "removed", ""), rows[:ROWS], len(rows))

    # -- the two calls of a training loop --------------------------------------------------------------------------

    def prune(self, epoch: int) -> bool:
        """To be called at the start of every epoch: takes the steps that are due; True if there was one."""
        if not is_whole(epoch):
            raise InputError(f"`epoch` is a whole number; got {shown(epoch)}")
        self.epoch = int(epoch)
        due = sum(epoch >= each for each in self.epochs)
        if due <= self.step:
            return False
        if due - self.step > 1:
            _log.warning("epoch %d: %d steps were due at once; they are taken as one", epoch, due - self.step)
        self._take(due)
        return True

    def regularize(self) -> float:
        """Adds the regularizer's gradients to those of the parameters, after ``backward`` (with a ``GradScaler``, after its
        ``unscale_``), once an optimizer step; returns the L1 norm of its gradients.

        0.0 without a regularizer that works on gradients, and once the last step has been taken."""
        if self.regularizer is None or self.finished or "gradients" not in self.regularizer.forms:
            return 0.0
        return self.regularizer.apply_gradients(self.model, self._prunable())

    def loss(self) -> torch.Tensor:
        """The loss term of a regularizer that has no other form, of the last forward in train mode; else 0, and once the
        last step has been taken."""
        forms = () if self.regularizer is None or self.finished or not self.model.training else self.regularizer.forms
        if self.regularizer is None or "loss" not in forms or "gradients" in forms:
            return torch.zeros((), device=next((p.device for p in self.model.parameters()), None))
        return self.regularizer.loss(self.model, self._prunable())

    @property
    def finished(self) -> bool:
        """Whether the last step has been taken: the rest is fine-tuning."""
        return self.step >= len(self.epochs)

    def connect(self, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> None:
        """Takes these optimizers in place of those given before: for frameworks that make theirs late, or anew.

        They must have been made from the model as it is now. Biases that earlier steps have added are put in the order of an
        uninterrupted run, so that the state dict of its optimizer can be loaded.
        """
        self.optimizers = listed_optimizers(optimizer)
        add_to_optimizers(self.optimizers, self.model, self._new(provenance_of(self.model).added))
        self._hook_optimizers()

    def _hook_optimizers(self) -> None:
        if self._after_step is not None:
            self._after_step.remove()
        regularizer = self.regularizer
        if regularizer is None or "step" not in regularizer.forms or not self.optimizers:
            return

        def after_step(*_: Any) -> None:
            if not self.finished:
                regularizer.after_step(self.model, self._prunable())

        self._after_step = self.optimizers[-1].register_step_post_hook(after_step)

    def _new(self, names: Iterable[str]) -> list[tuple[str, nn.Parameter]]:
        return [(name, self.model.get_parameter(name)) for name in names]

    def _prunable(self) -> list[Group]:
        graph = analyze(self.model)
        if self._groups is None or self._groups[0] is not graph:
            self._groups = (graph, prunable_groups(self.model, graph, self._selection.ignore))
        return self._groups[1]

    # -- one step --------------------------------------------------------------------------------------------------

    def _take(self, step: int) -> None:
        last = step == len(self.epochs)
        if last and self.regularizer is not None:
            self.regularizer.detach(self.model)
        masking = self.mask_until_last and not last
        share_buffers(self.model)
        measured = measure(self.model, self._needs, self._loader if self._needs else None, self._loss)
        scores = score(self.model, self.criterion, measured, ignore=self._selection.ignore)
        select_units = SelectUnits(self._selection_at(step), whole=self._sizes)
        passes = Pipeline(*self._damage.passes, select_units, *self._compensation.passes)
        prepared = passes.apply(self.model, Artifacts(measured, scores))
        plan = prepared.artifacts.planned("PATPassManager")
        assert_same_plan(plan)
        rewrite = MaskChannels() if masking else self._removal
        try:
            rewrite = MaskChannels() if masking else self._removal
            result = rewrite.apply(prepared.graph_module, prepared.artifacts).graph_module
        except FunctionChangedError:
            if last and self.regularizer is not None:
                self.regularizer.attach(self.model)
            raise
        for each in self.followers:
            restore_biases(each, provenance_of(prepared.graph_module).added)
        carried_out = mask if masking else remove
        followed = [carried_out(each, plan) for each in self.followers]
        self._put(result, plan, shorter=not masking)
        for held, each in zip(self.followers, followed, strict=True):
            adopt(held, each)
        self.step = step
        if last and self._recalibrate and self._loader is not None:
            limit = None if self._recalibrate is True else int(self._recalibrate)
            adopt(self.model, RecalibrateBatchNorm(self._loader, limit)(self.model).graph_module)
        now = cost(self.model)
        _log.info(
            "step %d of %d, epoch %d: %s %d axes; MACs %s of %s (%.1f%%), parameters %s of %s (%.1f%%)",
            step, len(self.epochs), self.epoch, "masked" if masking else "shortened", len(plan.kept),
            f"{now.macs:,}", f"{self._whole.macs:,}", 100 * now.macs / max(self._whole.macs, 1),
            f"{now.params:,}", f"{self._whole.params:,}", 100 * now.params / max(self._whole.params, 1),
        )  # fmt: skip

    def _plan_of_random_scores(self) -> None:
        """Plans once at the final ratio, so that arguments that do not fit the model are refused now; keeps no result."""
        scores = score(self.model, "random", ignore=self._selection.ignore)
        selection = dataclasses.replace(self._selection_at(len(self.epochs)), allocation="scope")  # no damages are known yet
        select(self.model, scores, selection, whole=self._sizes)

    def _selection_at(self, step: int) -> Selection:
        """The selection of a step, for the graph as it is now: a masked one still counts all its units, a shortened one those
        that are left."""
        ratio = self.ratios[step - 1]
        target, scope = self._selection.target, self._selection.scope
        if not self.mask_until_last and self.step and (target != "channels" or scope != "local"):
            ratio = max(0.0, 1 - (1 - ratio) / self._left(target))
        own = {name: shares[step - 1] for name, shares in self._own.items()}
        return dataclasses.replace(self._selection, ratio=ratio, ratios=own)

    def _left(self, target: str) -> float:
        """The fraction that earlier steps have left of what ``target`` counts."""
        if target in ("macs", "params"):
            return getattr(cost(self.model), target) / getattr(self._whole, target)
        if target == "channels":
            return sum(group.size for group in analyze(self.model).groups) / sum(self._sizes.values())
        return 1 - self.ratios[self.step - 1]

    def _put(self, result: fx.GraphModule, plan: PrunePlan, *, shorter: bool) -> None:
        before = {id(p): p.shape for p in self.model.parameters()}
        new = {name for name, _ in adopt(self.model, result)}
        for optimizer in self.optimizers if shorter else ():
            cut_optimizer(optimizer, self.model, plan, before)
        # in the order of the notes, which is all that a resumed run knows
        add_to_optimizers(self.optimizers, self.model, self._new(name for name in provenance_of(self.model).added if name in new))
        if self._wrap is not None and (shorter or new):
            self.parallel = wrapped(self.model, self._wrap)
        elif self._wrap is None:
            self.parallel = self.model

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain data: the steps taken, the removed and the masked channels, the regularizer's state."""
        saved = getattr(self.regularizer, "state_dict", None)
        return {
            "version": _VERSION,
            "step": self.step,
            "epoch": self.epoch,
            "epochs": list(self.epochs),
            **self._structure(),
            "regularizer": None if saved is None else saved(),
        }

    def _structure(self) -> dict[str, Any]:
        state = provenance_of(self.model)
        return {
            "plan": None if state.plan is None else state.plan.to_json(),
            "masked": None if state.masked is None else state.masked.to_json(),
            "added": list(state.added),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Gives the model the structure that it had; then load the model's and the optimizer's own state dicts.

        The manager must have been made as the one that saved, around the unpruned model. A model that has that structure
        already keeps it.

        Raises:
            InputError: a state of another schedule or version, or a model that has been pruned otherwise.
        """
        check_state(state, self.state_dict())
        if state.get("version") != _VERSION:
            raise InputError(f"the state is of version {state.get('version')!r}; this is version {_VERSION}")
        if list(state["epochs"]) != list(self.epochs):
            raise InputError(
                f"the state is of a schedule with steps at epochs {state['epochs']}; this one has {list(self.epochs)}"
            )
        load = getattr(self.regularizer, "load_state_dict", None)
        if load is None and state["regularizer"] is not None:
            raise InputError("the state holds that of a regularizer, and this manager has none that takes it: give `regularizer`")
        if {key: state[key] for key in ("plan", "masked", "added")} != self._structure():
            if self.step or provenance_of(self.model).plan is not None:
                raise InputError("load_state_dict needs a manager around the unpruned model, before its first step")
            self._restructure(state)
        self.step, self.epoch = int(state["step"]), int(state["epoch"])
        if load is not None and state["regularizer"] is not None:
            load(state["regularizer"])
        if self.regularizer is not None and self.finished:
            self.regularizer.detach(self.model)

    def _restructure(self, state: Mapping[str, Any]) -> None:
        restore_biases(self.model, state["added"])
        add_to_optimizers(self.optimizers, self.model, self._new(state["added"]))
        for kind, rewrite in (("plan", remove), ("masked", mask)):
            if state[kind] is None:
                continue
            plan = PrunePlan.from_json(state[kind])
            self._put(rewrite(self.model, plan), plan, shorter=kind == "plan")
            for held in self.followers:
                adopt(held, rewrite(held, plan))
