"""PAT as a callback of the Hugging Face Trainer (``transformers``)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from stp_fx.errors import InputError
from stp_fx.integrations._common import LateBatches, check_options, figures, graph_in, own_random_numbers
from stp_fx.training import PATPassManager

try:
    from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
except ImportError as _error:
    raise ImportError('stp_fx.integrations.transformers needs transformers: pip install "stp-fx[transformers]"') from _error

__all__ = ["PATCallback"]

_FILE = "stp_fx_pat.pt"


class PATCallback(TrainerCallback):
    """Prunes a graph while Trainer trains it; all the work is :class:`stp_fx.PATPassManager`'s.

    The Trainer's model is a graph that takes ``labels`` and gives a ``loss``, or any module that holds a graph::

        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        model = stp_fx.trace(BertForSequenceClassification(config), None, kwargs=batch)
        callback = PATCallback(ratio=0.5, steps=3)
        trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])
        trainer.train()
        trainer.train(resume_from_checkpoint=callback.restore("out/checkpoint-300"))     # in a new program, instead

    Steps are taken at the start of an epoch. A regularizer's gradients are added once an optimizer step: after accumulation,
    unscaling and, since Trainer has no place before it, clipping. One that is a loss is added to the loss that the model
    gives. Every row of Trainer's log has ``pat/macs``, ``pat/params`` and ``pat/step`` (in ``state.log_history`` and for the
    callbacks behind this one).

    Beside each checkpoint's weights there is a file with the manager's state. Trainer loads weights before it calls any
    callback, so :meth:`restore` comes first. Parameters that several modules share are saved once, as safetensors wants it.

    Trainer holds on to the DistributedDataParallel that it has made, so several processes are refused: use
    :mod:`stp_fx.integrations.accelerate` for them.

    Args:
        model: the name of the graph in the Trainer's model; may be left out if it has only one, or is one.
        log: whether to log.
        options: arguments of :class:`stp_fx.PATPassManager`. ``optimizer`` and ``wrap`` come from the Trainer, and so do the
            batches to read, unless ``train_loader`` is given; they are mappings, whose entries go to the graph's inputs by name.

    Raises:
        InputError: arguments that the manager refuses, no graph in the model, several processes, a checkpoint that does not
            fit the model.
    """

    def __init__(self, model: str | None = None, *, log: bool = True, **options: Any) -> None:
        check_options(options)
        self.path: str | None = model
        self.logs: bool = log
        self.options: dict[str, Any] = options
        self.manager: PATPassManager | None = None
        self._model: nn.Module | None = None
        self._output = ""
        self._loader: Iterable[Any] | None = None
        self._restored = False
        self._loss: RemovableHandle | None = None

    def _manage(self, model: nn.Module) -> PATPassManager:
        graph = graph_in(model, self.path)
        if self.manager is None or self.manager.model is not graph:
            options: dict[str, Any] = {"train_loader": LateBatches(lambda: self._loader), **self.options}
            self.manager = PATPassManager(graph, optimizer=(), **options)
        return self.manager

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs["model"]
        self._model, self._output = model, str(args.output_dir)
        if not isinstance(model, PreTrainedModel):  # which sees to it itself
            _save_shared_once(model)
        model.register_load_state_dict_pre_hook(_check_shapes)

    def restore(self, checkpoint: str | os.PathLike[str] | bool, optimizer: torch.optim.Optimizer | None = None) -> str:
        """Gives the Trainer's model, as yet unpruned, the structure that it had at ``checkpoint`` (a folder; True: the last in
        ``output_dir``); gives that folder, to be handed to ``trainer.train(resume_from_checkpoint=...)``.

        ``optimizer`` is the one that Trainer was given, if it was. One that Trainer makes itself has other groups in a run
        that has added biases (by compensation, to layers without), and cannot be resumed.

        Raises:
            InputError: no Trainer has this callback yet, no such file, the state of another run, or added biases and no
                ``optimizer``.
        """
        if self._model is None:
            raise InputError("restore() needs the model: make the Trainer with this callback first")
        folder = get_last_checkpoint(self._output) if checkpoint is True else os.fspath(checkpoint)  # type: ignore[arg-type]
        file = os.path.join(folder or self._output, _FILE)
        if folder is None or not os.path.isfile(file):
            raise InputError(f"there is no {file}: {checkpoint!r} should be a checkpoint that was saved with this callback")
        state = torch.load(file, map_location="cpu", weights_only=True)
        if state["added"] and optimizer is None:
            raise InputError(
                f"compensation has added {state['added'][0]!r}, which Trainer's optimizer had in another group than a new one "
                "has: make the optimizer yourself, Trainer(..., optimizers=(optimizer, None)), and give it to restore() too"
            )
        manager = self._manage(self._model)
        if optimizer is not None:
            manager.connect(optimizer)
        manager.load_state_dict(state)
        self._restored = True
        return folder

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.manager is not None:
            folder = os.path.join(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            torch.save(self.manager.state_dict(), os.path.join(folder, _FILE))

    # -- training ----------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size > 1:
            raise InputError(
                f"Trainer runs {args.world_size} processes, whose DistributedDataParallel a callback cannot renew when shapes "
                "change: write the loop with stp_fx.integrations.accelerate, or prune before training"
            )
        if state.global_step and (not self._restored or kwargs["model"] is not self._model):
            raise InputError("training goes on from a checkpoint: trainer.train(resume_from_checkpoint=callback.restore(folder))")
        self._loader = kwargs["train_dataloader"]
        manager = self._manage(kwargs["model"])
        manager.connect(kwargs["optimizer"])
        self.on_train_end(args, state, control)  # an earlier run may have been broken off
        forms = () if manager.regularizer is None else manager.regularizer.forms
        if "loss" in forms and "gradients" not in forms:
            self._loss = kwargs["model"].register_forward_hook(_adds_loss_of(manager))

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        epoch = int((state.epoch or 0) + 1e-6)
        if hasattr(self._loader, "set_epoch"):  # Trainer does so later, and a resumed run should read the same batches
            self._loader.set_epoch(epoch)  # type: ignore[union-attr]
        with own_random_numbers(args.seed + epoch):
            self._manage(kwargs["model"]).prune(epoch)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        manager = self._manage(kwargs["model"])
        if manager.regularizer is not None and "gradients" in manager.regularizer.forms:
            _unscale(kwargs["optimizer"])
            manager.regularize()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.logs and self.manager is not None:
            now = figures(self.manager)
            kwargs["logs"].update(now)
            state.log_history[-1].update(now)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._loss is not None:
            self._loss.remove()
            self._loss = None


def _adds_loss_of(manager: PATPassManager) -> Any:
    """A forward hook. No method of the callback: a copy of the model would copy the callback with it."""

    def add(module: nn.Module, inputs: Any, output: Any) -> Any:
        term = manager.loss() if module.training and torch.is_grad_enabled() else None
        if term is None or not term.requires_grad:
            return output
        if isinstance(output, tuple):
            return (output[0] + term, *output[1:])
        if not isinstance(output, dict) or output.get("loss") is None:
            raise InputError(
                f"{type(manager.regularizer).__name__} is added to the loss that the model gives, and it gives none: return "
                "{'loss': ...}, or use a regularizer on gradients"
            )
        output["loss"] = output["loss"] + term
        return output

    return add


def _unscale(optimizer: Any) -> None:
    """The gradients of a GradScaler, if Trainer has not unscaled them for clipping."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return
    try:
        scaler.unscale_(optimizer.optimizer)
    except RuntimeError as error:
        if "already been called" not in str(error):
            raise


def _check_shapes(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    for name, shape in shapes.items():
        saved = state_dict.get(prefix + name)
        if isinstance(saved, torch.Tensor) and saved.shape != shape:
            raise InputError(
                f"{name!r} has shape {tuple(saved.shape)} in the checkpoint and {tuple(shape)} in the model: they are of "
                "different steps of pruning. To go on from a checkpoint, give Trainer the unpruned model and call "
                "trainer.train(resume_from_checkpoint=callback.restore(folder))"
            )


def _save_shared_once(model: nn.Module) -> None:
    """Hooks that leave all but the first name of a shared parameter out of state dicts, and put them back at loading."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shared = [each for each in names.values() if len(each) > 1]
    if not shared:
        return

    others = {name: first for first, *rest in shared for name in rest}
    model.register_state_dict_post_hook(_LeaveOut(others))
    model.register_load_state_dict_pre_hook(_PutBack(others))


@dataclasses.dataclass
class _LeaveOut:
    """A hook on state dicts. (A class: closures cannot be pickled, and a model should be.)"""

    others: dict[str, str]
    """Of each shared parameter: its later names, with its first."""

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in self.others:
            state_dict.pop(prefix + name, None)


@dataclasses.dataclass
class _PutBack:
    """A hook on loading."""

    others: dict[str, str]

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, first in self.others.items():
            if prefix + first in state_dict:
                state_dict.setdefault(prefix + name, state_dict[prefix + first])
