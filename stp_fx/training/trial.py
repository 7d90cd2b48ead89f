"""An optimizer's state for a parameter, tried out: a new optimizer of the same class and options, on a made-up parameter.

The state of most optimizers comes into being at their first step, so nothing of the real one tells whether it can be cut.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["Trial", "trial"]

_SIZES = {1: (4096,), 2: (64, 128), 3: (32, 16, 24), 4: (32, 16, 4, 4), 5: (16, 8, 4, 4, 4)}
"""By rank: at least 4096 numbers, from where on optimizers of 8 and 4 bits quantise, and no two sizes alike in front."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """The made-up ``parameter`` and its ``state``; None where no optimizer could be made, or none that steps."""

    parameter: nn.Parameter | None = None
    state: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def trial(optimizer: Optimizer, group: Mapping[str, Any], like: torch.Tensor, *, step: bool) -> Trial:
    """A new optimizer with the options of ``group`` on a parameter of the rank, dtype, device and memory format of ``like``.

    With ``step`` it has stepped once, on a parameter of another size; else the state is that of an optimizer that was just made,
    for a parameter of the same shape. Random numbers are left alone.
    """
    cuda = [like.device] if like.device.type == "cuda" else []
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=cuda), torch.no_grad():
            warnings.simplefilter("ignore")
            size = _SIZES.get(like.dim(), like.shape) if step else like.shape
            parameter = nn.Parameter(torch.zeros(size, dtype=like.dtype, device=like.device))
            options = copy.deepcopy({key: value for key, value in group.items() if key != "params"})
            made: Any = type(optimizer)([{**options, "params": [parameter]}])  # type: ignore[call-arg]
            if step:
                if callable(getattr(made, "train", None)):  # of optimizers without a schedule, which have modes
                    made.train()
                parameter.grad = torch.randn_like(parameter)
                with contextlib.suppress(Exception), torch.compiler.set_stance("force_eager"):  # what it has made so far will do
                    made.step()
            return Trial(parameter, dict(made.state.get(parameter, {})))
    except Exception:  # a class with arguments of its own, or one that refuses the parameter
        return Trial()
