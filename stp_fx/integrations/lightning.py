"""PAT as a callback of Lightning's Trainer: ``lightning`` or ``pytorch_lightning``, of both the one imported first."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stp_fx.errors import InputError
from stp_fx.integrations._common import LateBatches, check_options, figures, graph_in, own_random_numbers
from stp_fx.training import PATPassManager

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["PATCallback"]

_HOOKS = ("on_load_checkpoint", "on_save_checkpoint")


def _library() -> Any:
    """Lightning under the name that the program uses already, or else the newer one: their classes differ, and Lightning
    refuses to mix them."""
    for name in sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ImportError('stp_fx.integrations.lightning needs Lightning: pip install "stp-fx[lightning]"')


if not TYPE_CHECKING:
    Callback = _library().Callback


class PATCallback(Callback):
    """Prunes a graph in a LightningModule while it is trained; all the work is :class:`stp_fx.PATPassManager`'s.

    ::

        class Classifier(LightningModule):
            def __init__(self):
                super().__init__()
                self.net = stp_fx.trace(Net(), torch.randn(2, 3, 32, 32))
            ...

        callback = PATCallback(criterion="variance", ratio=0.5, steps=3, compensation="mean")
        module = Classifier()
        Trainer(max_epochs=10, callbacks=[callback]).fit(module, loader)
        module.net                                  # is smaller now, and the same object

    Steps are taken at the start of an epoch. A regularizer's gradients are added once an optimizer step: after unscaling (AMP)
    and accumulation, before clipping. One that is a loss is added, in place, to the loss that Lightning is about to send
    backward, as a part of it: scaled and divided as it is. Logged every epoch: ``pat/macs``, ``pat/params``, ``pat/step`` and,
    with a regularizer on gradients, ``pat/regularization``, the L1 norm of what it adds.

    A checkpoint carries the state of the manager, and ``fit(module, ckpt_path=...)`` on an unpruned module goes on from it;
    the module gets its structure before its weights are loaded. ``validate``, ``test`` and ``predict`` with a callback of the
    same options do so too; without a Trainer, :meth:`restore` does it.

    Under DistributedDataParallel the module is wrapped anew when its shapes change. Strategies that shard parameters are refused.

    Args:
        model: the name of the graph in the LightningModule; may be left out if it has only one.
        add_loss: False if ``training_step`` adds ``callback.manager.loss()`` itself.
        log: whether to log.
        options: arguments of :class:`stp_fx.PATPassManager`. ``optimizer`` and ``wrap`` come from the Trainer, and so do the
            batches to read, unless ``train_loader`` is given.

    Raises:
        InputError: when training starts: arguments that the manager refuses, no graph in the module, a sharding strategy.
    """

    def __init__(self, model: str | None = None, *, add_loss: bool = True, log: bool = True, **options: Any) -> None:
        check_options(options)
        self.path: str | None = model
        self.add_loss: bool = add_loss
        self.logs: bool = log
        self.options: dict[str, Any] = options
        self.manager: PATPassManager | None = None
        self._trainer: Trainer | None = None

    @property
    def state_key(self) -> str:
        """Tells the callbacks of several graphs apart in a checkpoint."""
        return self._generate_state_key(model=self.path)

    # -- the graph and its manager -----------------------------------------------------------------------------------

    def _manage(self, module: nn.Module) -> PATPassManager:
        graph = graph_in(module, self.path)
        if self.manager is None or self.manager.model is not graph:
            given = {"train_loader": LateBatches(self._train_batches), **self.options}
            self.manager = PATPassManager(graph, optimizer=(), wrap=self._wrap, **given)
        return self.manager

    def _train_batches(self) -> Any:
        return None if self._trainer is None else self._trainer.train_dataloader

    def _wrap(self, graph: nn.Module) -> nn.Module:
        """Wraps the whole LightningModule anew: shapes inside have changed."""
        strategy: Any = None if self._trainer is None else self._trainer.strategy
        if strategy is None or not isinstance(strategy.model, DistributedDataParallel):
            return graph
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()
        return strategy.model

    # -- Lightning restores weights first, then callbacks, then makes optimizers, then calls on_fit_start ------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Looks into a checkpoint before its weights are loaded, which no hook of a callback can."""
        self._trainer = trainer
        theirs = {name: getattr(pl_module, name) for name in _HOOKS}

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            self.restore(pl_module, checkpoint)
            theirs["on_load_checkpoint"](checkpoint)

        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            if "callbacks" not in checkpoint:  # weights only: they need the structure all the same
                checkpoint[self.state_key] = self.state_dict()
            theirs["on_save_checkpoint"](checkpoint)

        for hook in (on_load_checkpoint, on_save_checkpoint):
            hook._stp_fx_around = pl_module.__dict__.get(hook.__name__)  # type: ignore[attr-defined]
            setattr(pl_module, hook.__name__, hook)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for name in _HOOKS:
            hook = pl_module.__dict__.pop(name, None)
            while hasattr(hook, "_stp_fx_around"):
                hook = hook._stp_fx_around
            if hook is not None:
                setattr(pl_module, name, hook)

    def restore(self, pl_module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Gives the graph in ``pl_module`` the structure that it had when ``checkpoint``, a Trainer's, was saved; its weights
        can be loaded then. A checkpoint without a state of this callback changes nothing.

        Raises:
            InputError: the state is of another run, or the module has been pruned otherwise.
        """
        state = checkpoint.get("callbacks", {}).get(self.state_key) or checkpoint.get(self.state_key)
        if state:
            self._manage(pl_module).load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """The state of the manager."""
        return {} if self.manager is None else self.manager.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Has been taken before the weights were loaded."""

    # -- training ----------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = trainer.strategy.model
        plain = model is pl_module or isinstance(model, DistributedDataParallel)
        if not plain or any(map(_is_sharded, pl_module.parameters())):
            raise InputError(
                f"{type(trainer.strategy).__name__} spreads parameters over processes, and they cannot be cut there: train with "
                "one device or strategy='ddp', or prune with stp_fx.prune_graph before training"
            )
        manager = self._manage(pl_module)
        own = {id(p) for p in manager.model.parameters()}
        manager.connect([o for o in trainer.optimizers if any(id(p) in own for g in o.param_groups for p in g["params"])])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        manager = self._manage(pl_module)
        with own_random_numbers(trainer.current_epoch):
            manager.prune(trainer.current_epoch)
        if self.logs:
            pl_module.log_dict(figures(manager), on_step=False, on_epoch=True, sync_dist=True)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        term = self._manage(pl_module).loss() if self.add_loss else None
        if term is None or not term.requires_grad:
            return
        if pl_module.automatic_optimization:
            term = term / trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss.add_(term if scaler is None else scaler.scale(term))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        manager = self._manage(pl_module)
        if manager.regularizer is None or optimizer is not manager.optimizers[0]:  # once, where several step in turn
            return
        added = manager.regularize()
        if self.logs and "gradients" in manager.regularizer.forms:
            pl_module.log("pat/regularization", added, on_step=False, on_epoch=True, sync_dist=True)


def _is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "device_mesh")  # a DTensor
