"""Forward hooks of the model that is captured: they run around its forward, so they are traced as those of its submodules are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from stp_fx.errors import TraceError

__all__ = ["backward_hooks", "with_hooks"]


def with_hooks(root: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``root(*args, **kwargs)`` with the hooks of ``root`` and without those that are registered for all modules.

    The latter run when the graph is called, since a graph is a module.

    Raises:
        TraceError: a hook fails on proxies; names it.
    """
    for key, hook in list(root._forward_pre_hooks.items()):
        if key in root._forward_pre_hooks_with_kwargs:
            result = _traced("pre-hook", root, hook, args, kwargs)
            if result is not None:
                args, kwargs = result
        else:
            result = _traced("pre-hook", root, hook, args)
            if result is not None:
                args = result if isinstance(result, tuple) else (result,)
    output = forward(*args, **kwargs)
    for key, hook in list(root._forward_hooks.items()):
        given = (args, kwargs, output) if key in root._forward_hooks_with_kwargs else (args, output)
        result = _traced("hook", root, hook, *given)
        output = output if result is None else result
    return output


def _traced(kind: str, root: nn.Module, hook: Callable[..., Any], *given: Any) -> Any:
    try:
        return hook(root, *given)
    except Exception as error:  # whatever a hook's own code raises
        raise TraceError(
            f"the forward {kind} {_name(hook)} of {type(root).__name__} cannot be traced: {type(error).__name__}: {error}. "
            "Remove it before the capture, and register it on the graph"
        ) from error


def _name(hook: Any) -> str:
    code = getattr(hook, "__code__", None)
    name = getattr(hook, "__qualname__", type(hook).__qualname__)
    return repr(name) if code is None else f"{name!r} ({code.co_filename}:{code.co_firstlineno})"


def backward_hooks(root: nn.Module, kept: Iterable[nn.Module]) -> tuple[str, ...]:
    """A note that names modules whose backward hooks the graph does not run; those of ``kept`` it calls."""
    called = {id(module) for module in kept}
    names = [
        name or "the model"
        for name, module in root.named_modules()
        if (module._backward_hooks or module._backward_pre_hooks) and id(module) not in called
    ]
    if not names:
        return ()
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (f"backward hooks do not run in the graph: those of {shown}",)
