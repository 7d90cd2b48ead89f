"""PAT in a loop of one's own with Hugging Face Accelerate: several processes, checkpoints across a removal."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stp_fx.errors import InputError
from stp_fx.integrations._common import LateBatches, graph_in
from stp_fx.training import PATPassManager

try:
    from accelerate import Accelerator
except ImportError as _error:
    raise ImportError('stp_fx.integrations.accelerate needs accelerate: pip install "stp-fx[accelerate]"') from _error

__all__ = ["pat_manager"]


def pat_manager(
    accelerator: Accelerator, model: nn.Module, *, graph: str | None = None, name: str = "pat", **options: Any
) -> PATPassManager:
    """A :class:`stp_fx.PATPassManager` for what ``accelerator.prepare`` gave::

        model, optimizer, loader = accelerator.prepare(stp_fx.trace(Net(), images), optimizer, loader)
        pat = pat_manager(accelerator, model, optimizer=optimizer, train_loader=loader, ratio=0.5, steps=3)
        for epoch in range(epochs):
            loader.set_epoch(epoch)                              # first, so that a resumed run prunes by the same batches
            pat.prune(epoch)
            for x, y in loader:
                with accelerator.accumulate(pat.parallel):
                    accelerator.backward(criterion(pat.parallel(x), y) + pat.loss())
                    if accelerator.sync_gradients:
                        accelerator.unscale_gradients()          # or clip_grad_norm_, which does
                        pat.regularize()
                    optimizer.step()
                    optimizer.zero_grad()
            accelerator.save_state(folder)

    ``pat.parallel`` is the model to call: with several processes it is a DistributedDataParallel, made anew, with the same
    options, whenever shapes change. ``save_state`` writes the manager's state beside the weights, and ``load_state`` gives an
    unpruned model its structure before it loads them; ``accelerator.register_for_checkpointing(pat)`` would do so after.

    Args:
        graph: the name of the graph in ``model``; may be left out if it has only one, or is one.
        name: tells the files of several managers of one Accelerator apart.
        options: arguments of :class:`stp_fx.PATPassManager`. A prepared ``train_loader`` is read without Accelerate counting it
            as an epoch.

    Raises:
        InputError: arguments that the manager refuses, no graph in the model, or a model that is sharded (FSDP) or compiled.
    """
    inner: Any = accelerator.unwrap_model(model, keep_torch_compile=False)
    plain = model is inner or isinstance(model, DistributedDataParallel)
    if not plain or any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise InputError(
            f"accelerator.prepare gave a {type(model).__name__}; channels can be removed from a plain model and from one in "
            "DistributedDataParallel, not from a sharded or compiled one"
        )
    loader = options.get("train_loader")
    if loader is not None:
        options["train_loader"] = LateBatches(lambda: loader)
    manager = PATPassManager(graph_in(inner, graph), wrap=_rewrap(accelerator, model), **options)
    _keep_with_checkpoints(accelerator, manager, f"stp_fx_{name}.pt")
    return manager


def _rewrap(accelerator: Accelerator, prepared: nn.Module) -> Callable[[nn.Module], nn.Module]:
    held: list[nn.Module] = []

    def wrap(_: nn.Module) -> nn.Module:
        if not held:
            held.append(prepared)
        elif isinstance(held[0], DistributedDataParallel):
            held[0] = _anew(accelerator, held[0])
        return held[0]

    return wrap


def _anew(accelerator: Accelerator, old: DistributedDataParallel) -> DistributedDataParallel:
    """The model that Accelerate's ``prepare_model`` makes. (Accelerate itself keeps, and saves, the model inside.)"""
    handler = accelerator.ddp_handler
    options: dict[str, Any] = {} if handler is None else handler.to_kwargs()
    new = DistributedDataParallel(old.module, device_ids=old.device_ids, output_device=old.output_device, **options)
    if handler is not None:
        handler.register_comm_hook(new)
    return new


def _keep_with_checkpoints(accelerator: Accelerator, manager: PATPassManager, file: str) -> None:
    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        if accelerator.is_main_process:
            torch.save(manager.state_dict(), os.path.join(folder, file))

    def load(models: list[nn.Module], folder: str) -> None:
        path = os.path.join(folder, file)
        if not os.path.isfile(path):
            raise InputError(f"there is no {path}: the state should be one that was saved with this manager")
        manager.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
