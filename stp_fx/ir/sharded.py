"""Graphs whose parameters are spread over processes as ``DTensor`` (FSDP2's ``fully_shard``, tensor parallel).

``torch.distributed.tensor`` is imported where it is used: it takes most of a second.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import fx, nn

from stp_fx.errors import InputError

__all__ = ["check_sharded", "fsdp_modules", "is_sharded", "is_vector", "local_part", "without_wrappers"]

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
"""Attributes that modules keep beside their hooks, by the same keys."""
_OF_WRAPPERS = ("__composable_api", "_is_fsdp_managed_module", "_fsdp_use_orig_params")


def is_sharded(module: nn.Module) -> bool:
    """Whether a parameter or a buffer is a ``DTensor``, or a part of the module was given to ``fully_shard``."""
    tensors = (*module.parameters(), *module.buffers())
    kinds = any(hasattr(each, "placements") or type(each).__name__ == "FlatParameter" for each in tensors)
    return kinds or bool(fsdp_modules(module))


def is_vector(tensor: torch.Tensor) -> bool:
    """Whether it has one number a channel: a bias, or the scale of a norm. Such tensors are small."""
    return tensor.numel() == max(tensor.shape, default=1)


def fsdp_modules(module: nn.Module) -> dict[str, Any]:
    """The parts that were given to ``fully_shard``, by name."""
    return {name: each for name, each in module.named_modules() if hasattr(each, "reshard") and _fsdp_class(type(each))}


def _fsdp_class(kind: type) -> type | None:
    return next((each for each in kind.__mro__ if each.__name__ == "FSDPModule"), None)


def check_sharded(gm: fx.GraphModule) -> None:
    """Refuses what cannot be cut and put back in shards.

    Raises:
        InputError: a placement other than a shard or a replica, or a part given to ``fully_shard`` that the graph does not call,
            so that nothing would gather its parameters; layers of ``parallelize_module``; FSDP of the first kind.
    """
    for name, tensor in (*gm.named_parameters(), *gm.named_buffers()):
        if type(tensor).__name__ == "FlatParameter":
            raise InputError(f"{name!r} is a flat parameter of FullyShardedDataParallel, which has no channels: use fully_shard")
        for placement in getattr(tensor, "placements", ()):
            if type(placement).__name__ not in ("Shard", "Replicate"):
                raise InputError(
                    f"{name!r} is placed as {placement}: only Shard and Replicate can be cut. Prune before it is distributed"
                )
    for name, module in gm.named_modules():
        if name and any(
            _origin(h).startswith("torch.distributed.tensor") for s in _HOOKS for h in module.__dict__.get(s, {}).values()
        ):
            raise InputError(
                f"{name!r} computes on its part alone (parallelize_module), and whether parts match after a cut is not known: "
                "prune before it, or distribute the whole graph (torch.distributed.tensor.distribute_module), or use fully_shard"
            )
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    for name in fsdp_modules(gm):
        if name and name not in called:
            inside = [each for each in called if each.startswith(f"{name}.")]
            raise InputError(
                f"{name!r} was given to fully_shard, and the graph calls the {len(inside)} layers in it in its place, so nothing "
                "would gather its parameters: give fully_shard these layers as a list, or the whole graph alone"
            )


def local_part(whole: torch.Tensor, like: Any) -> torch.Tensor:
    """This process's part of a tensor that all processes have, placed as the DTensor ``like``. Nothing is sent."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    replica = DTensor.from_local(whole.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replica.redistribute(placements=like.placements).to_local()


def without_wrappers(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph and tensors in new module objects, which have no class, hooks and marks of ``torch.distributed``.

    It is to be copied, with something in place of its sharded parameters.
    """
    twins: dict[int, nn.Module] = {}

    def twin_of(module: nn.Module) -> nn.Module:
        if id(module) not in twins:
            twins[id(module)] = twin = object.__new__(_class_without(type(module)))
            twin.__dict__.update({k: v for k, v in module.__dict__.items() if not str(k).startswith(_OF_WRAPPERS)})
            twin.__dict__["_modules"] = {name: child and twin_of(child) for name, child in module._modules.items()}
            _drop_hooks(twin)
        return twins[id(module)]

    return twin_of(gm)  # type: ignore[return-value]


def _class_without(kind: type) -> type:
    wrapper = _fsdp_class(kind)
    return kind if wrapper is None else kind.__mro__[kind.__mro__.index(wrapper) + 1]


def _drop_hooks(module: nn.Module) -> None:
    dropped: set[Any] = set()
    for store in _HOOKS:
        hooks = module.__dict__.get(store)
        if hooks:
            dropped |= {key for key, hook in hooks.items() if _origin(hook).startswith("torch.distributed")}
            module.__dict__[store] = type(hooks)((key, hook) for key, hook in hooks.items() if key not in dropped)
    for store in _FLAGS:
        flags = module.__dict__.get(store)
        if flags:
            module.__dict__[store] = type(flags)((key, flag) for key, flag in flags.items() if key not in dropped)


def _origin(hook: Any) -> str:
    """The module that a hook was defined in."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    function = inspect.unwrap(getattr(hook, "hook", hook))
    return str(getattr(function, "__module__", ""))
