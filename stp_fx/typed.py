"""Functions and classes of torch whose types its stubs leave out or hide, with their types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["BatchNorm", "from_numpy", "modules_of"]

BatchNorm = _BatchNorm
"""Base of BatchNorm1d, 2d and 3d and of SyncBatchNorm."""


def from_numpy(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """``torch.from_numpy``: a tensor that shares its memory with ``array``."""
    return torch.from_numpy(array)


def modules_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``module.named_modules()``: every module once, with its first name."""
    yield from module.named_modules()
