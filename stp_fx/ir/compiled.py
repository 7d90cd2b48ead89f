"""Modules that ``torch.compile`` has compiled are captured, and run by checks, as the Python that they were before."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["COMPILED", "compiled_parts", "eagerly", "uncompiled"]

COMPILED = "what torch.compile has compiled is captured as it was before: compile the result"


def compiled_parts(model: nn.Module) -> bool:
    """Whether the model, or a module in it, has been compiled."""
    return "torch._dynamo" in sys.modules and any(
        hasattr(module, "_orig_mod") or module.__dict__.get("_compiled_call_impl") is not None for module in model.modules()
    )


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given; any other as it is."""
    return getattr(model, "_orig_mod", model) if "torch._dynamo" in sys.modules else model


@contextmanager
def eagerly() -> Iterator[None]:
    """A block in which compiled code runs as the Python that it was: nothing is compiled for a check."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
