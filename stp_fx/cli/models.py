"""MODEL on the command line: a factory of the user's, or a name of torchvision's or timm's; and weights from a file."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from stp_fx.cli.objects import called, close_to, installed_only, named_object
from stp_fx.errors import InputError

__all__ = ["Loaded", "load_model", "load_weights"]

_NESTED = ("state_dict", "model_state_dict", "model", "module", "net")
"""Under which keys training programs keep the weights in a checkpoint."""
_WEIGHTS = ("weights", "pretrained", "checkpoint_path")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model in eval mode. ``random``: its weights are known to be random; ``size`` is the input that a collection
    recommends, without the batch."""

    model: nn.Module
    random: bool = False
    size: tuple[int, ...] | None = None


def load_model(spec: str, arguments: Mapping[str, Any]) -> Loaded:
    """The model that ``spec`` names, made with ``arguments``.

    Raises:
        InputError: a name that nobody knows (suggests close ones), a factory that fails or gives no module.
    """
    prefix, _, name = spec.partition(":")
    if prefix == "torchvision":
        loaded = _from_torchvision(name, arguments)
    elif prefix == "timm":
        loaded = _from_timm(name, arguments)
    elif ":" in spec:
        loaded = Loaded(_from_factory(spec, arguments))
    elif spec in torchvision.models.list_models():
        loaded = _from_torchvision(spec, arguments)
    else:
        raise InputError(_unknown(spec))
    loaded.model.eval()
    return loaded


def load_weights(model: nn.Module, path: str) -> None:
    """Loads a ``.safetensors`` file, or a checkpoint of ``torch.save`` without running code from it (``weights_only``).

    Raises:
        InputError: no such file, one that is neither, or names and shapes that are not the model's; names the first.
    """
    state = _weights_in(_read(path), path)
    own = model.state_dict()
    if not set(state) & set(own) and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}  # saved from DistributedDataParallel
    for name in own:
        if name not in state:
            raise InputError(f"--weights: {path} has no {name!r}, which the model has{close_to(name, state)}")
        if tuple(state[name].shape) != tuple(own[name].shape):
            raise InputError(
                f"--weights: {name!r} has shape {tuple(state[name].shape)} in {path}, but {tuple(own[name].shape)} in the model; "
                "--factory-arg can change the model (num_classes=10)"
            )
    for name in state:
        if name not in own:
            raise InputError(f"--weights: {path} has {name!r}, which the model has not{close_to(name, own)}")
    model.load_state_dict(state)


def _from_torchvision(name: str, arguments: Mapping[str, Any]) -> Loaded:
    known = torchvision.models.list_models()
    if name not in known:
        raise InputError(f"torchvision has no model {name!r}{close_to(name, known)}")
    arguments = dict(arguments)
    parameters = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    if "weights_backbone" in parameters:
        arguments.setdefault("weights_backbone", None)  # by default it is downloaded
    random = not any(arguments.get(key) for key in _WEIGHTS)
    make = torchvision.models.get_model
    return Loaded(called(lambda **kwargs: make(name, **kwargs), f"torchvision:{name}", "MODEL", arguments), random)


def _from_timm(name: str, arguments: Mapping[str, Any]) -> Loaded:
    timm = _timm()
    if timm is None:
        raise InputError(f"timm:{name} needs timm: pip install timm")
    if not timm.is_model(name):
        raise InputError(f"timm has no model {name!r}{close_to(name.partition('.')[0], timm.list_models())}")
    random = not any(arguments.get(key) for key in _WEIGHTS)
    make = timm.create_model
    model = called(lambda **kwargs: make(name, **kwargs), f"timm:{name}", "MODEL", dict(arguments))
    return Loaded(model, random, tuple(getattr(model, "pretrained_cfg", {}).get("input_size", ())) or None)


def _timm() -> Any:
    """The installed timm, or None; never a file of that name in the current folder, which a mistyped MODEL must not run."""
    try:
        with installed_only():
            return importlib.import_module("timm")
    except ImportError:
        return None


def _from_factory(spec: str, arguments: Mapping[str, Any]) -> nn.Module:
    found = named_object(spec, "MODEL")
    if isinstance(found, nn.Module):
        if arguments:
            raise InputError(f"MODEL: {spec} is already a module, so --factory-arg has no function to be passed to")
        return found
    if not callable(found):
        raise InputError(f"MODEL: {spec} is a {type(found).__name__}; name a module, its class, or a function that makes one")
    model = called(found, spec, "MODEL", dict(arguments))
    if not isinstance(model, nn.Module):
        raise InputError(f"MODEL: {spec}() gave a {type(model).__name__}; it has to give a torch.nn.Module")
    return model


def _unknown(name: str) -> str:
    if name.endswith(".py"):
        return f"MODEL: {name!r} is a file; name one of its objects: {name}:NAME"
    known = list(torchvision.models.list_models())
    timm = _timm()
    if timm is not None:
        if timm.is_model(name):
            return f"MODEL: torchvision has no model {name!r}, but timm has: timm:{name}"
        known += [f"timm:{each}" for each in timm.list_models()]
    hint = close_to(name, known) or "; write package.module:factory, path/to/file.py:factory, torchvision:NAME or timm:NAME"
    return f"MODEL: unknown name {name!r}{hint}"


def _read(path: str) -> Any:
    try:
        regular = pathlib.Path(path).is_file()
    except OSError as error:
        raise InputError(f"--weights: {path!r} cannot be read: {error}") from error
    if not regular:
        raise InputError(f"--weights: there is no file {path!r}")
    if path.endswith(".safetensors"):
        try:
            return load_file(path)
        except Exception as error:  # whatever the parser says
            raise InputError(f"--weights: {path} is no readable safetensors file: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler may meet any of them in junk
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"--weights: {path} cannot be read without running code from it ({first}); save the state dict: "
            "torch.save(model.state_dict(), path)"
        ) from error


def _weights_in(found: Any, path: str) -> dict[str, torch.Tensor]:
    for key in _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    whole = isinstance(found, Mapping) and found and all(isinstance(name, str) for name in found)
    if not whole or not all(isinstance(v, torch.Tensor) and v.layout == torch.strided for v in found.values()):
        raise InputError(f"--weights: {path} holds no state dict (names to dense tensors)")
    return dict(found)
