"""The library inside of ``torch.inference_mode``: graphs get tensors that can be trained, and gradients can be taken."""

from __future__ import annotations

import contextlib

import torch

__all__ = ["normal_mode", "normal_tensor"]


def normal_mode() -> contextlib.AbstractContextManager[object]:
    """Leaves ``torch.inference_mode``, whose tensors can neither be trained nor watched for changes; elsewhere, does nothing."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


def normal_tensor(value: torch.Tensor) -> torch.Tensor:
    """The tensor, or its copy if it was made in ``torch.inference_mode`` and could not be saved for a gradient."""
    return value.clone() if value.is_inference() and not torch.is_inference_mode_enabled() else value
