"""``torch.vmap`` as models write it for masks: a function of single indices, which broadcasting gives all of at once.

``vmap(vmap(f, (None, 0)), (0, None))(rows, columns)`` is ``f(rows[:, None], columns)`` where all that ``f`` does is elementwise
or looks elements up. Anything else is refused, as it could mix elements. Over slices with dimensions of their own, such as the
weights of an ensemble, it is a loop; not over the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stp_fx.errors import TraceError
from stp_fx.ir._torch_compat import is_pointwise
from stp_fx.ir.active import active
from stp_fx.ir.nested import leaves_of
from stp_fx.ir.proxies import ValueProxy, holds_proxy, user_line

__all__ = ["vmap"]

_ORIGINAL = torch.vmap
_KEEPS = (torch.ops.aten._to_copy.default, torch.ops.aten.detach.default, torch.ops.aten.alias.default)


@functools.wraps(torch.vmap)
def vmap(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if active() is None:
        return _ORIGINAL(func, *args, **kwargs)
    return _Mapped(func, *args, **kwargs)


class _Mapped:
    """The function that ``vmap`` returns while a model is traced; ``in_dims`` and the rest are its own arguments."""

    def __init__(self, func: Callable[..., Any], in_dims: Any = 0, out_dims: Any = 0, *args: Any, **kwargs: Any) -> None:
        self.func, self.in_dims, self.out_dims = func, in_dims, out_dims
        self._plain = _ORIGINAL(func, in_dims, out_dims, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not holds_proxy((args, kwargs)):
            return self._plain(*args, **kwargs)
        levels: list[_Mapped] = [self]
        while isinstance(levels[-1].func, _Mapped):
            levels.append(levels[-1].func)
        places = None if kwargs else _places(levels, args)
        if places is None:
            return self._loop(args, kwargs)
        depth = len(levels)
        spread = [arg if k is None else arg[(slice(None), *[None] * (depth - 1 - k))] for arg, k in zip(args, places)]
        with _Elementwise(spread):
            result = levels[-1].func(*spread)
        if not isinstance(result, (torch.Tensor, ValueProxy)):
            raise TraceError(f"maps a function that gives no single tensor with torch.vmap, at {user_line()}")
        sizes = {k: arg.shape[0] for arg, k in zip(args, places) if k is not None}
        return result.expand(*(sizes[k] for k in range(depth)))

    def _loop(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        dims = self.in_dims if isinstance(self.in_dims, tuple) else (self.in_dims,) * len(args)
        mapped = [k for k, dim in enumerate(dims) if dim is not None]
        plain = all(isinstance(dim, int) and _dims(arg) for dim, arg in zip(dims, args) if dim is not None)
        if kwargs or len(dims) != len(args) or not mapped or not plain or not isinstance(self.out_dims, int):
            raise TraceError(f"calls torch.vmap with dimensions that cannot be followed, at {user_line()}")
        slices = [[*args[k].movedim(dims[k], 0)] for k in mapped]
        given = [dict(zip(mapped, each)) for each in zip(*slices)]
        results = [self.func(*(each.get(k, arg) for k, arg in enumerate(args))) for each in given]
        if not all(isinstance(each, (torch.Tensor, ValueProxy)) for each in results):
            raise TraceError(f"maps a function that gives no single tensor with torch.vmap, at {user_line()}")
        return torch.stack(results, self.out_dims)


def _places(levels: list[_Mapped], args: tuple[Any, ...]) -> list[int | None] | None:
    """By argument, the level that maps over its only dimension; None where a level or an argument is of another kind."""
    found: list[int | None] = [None] * len(args)
    for k, level in enumerate(levels):
        dims = level.in_dims if isinstance(level.in_dims, tuple) else (level.in_dims,) * len(args)
        if level.out_dims != 0 or len(dims) != len(args):
            return None
        mapped = [i for i, dim in enumerate(dims) if dim is not None]
        if not mapped or any(dims[i] != 0 or found[i] is not None or _dims(args[i]) != 1 for i in mapped):
            return None
        for i in mapped:
            found[i] = k
    return found


def _dims(arg: Any) -> int | None:
    value = arg.value if isinstance(arg, ValueProxy) else arg
    return value.dim() if isinstance(value, torch.Tensor) else None


class _Elementwise(TorchDispatchMode):
    """A block in which values that were spread over levels meet one another and single numbers, element by element, alone."""

    def __init__(self, spread: list[Any]) -> None:
        super().__init__()
        values = [each.value if isinstance(each, ValueProxy) else each for each in spread]
        self._over = [each for each in values if isinstance(each, torch.Tensor)]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        given = list(leaves_of(torch.Tensor, (args, kwargs or {})))
        result = func(*args, **(kwargs or {}))
        if any(self._is_over(each) for each in given) and not self._allowed(func, args, given):
            raise TraceError(f"maps a function that calls {func} with torch.vmap, at {user_line()}")
        made = result.dim() if isinstance(result, torch.Tensor) else 0
        if made:
            if not any(self._is_over(each) for each in given):
                return result  # of tensors that are not mapped over
            self._over.append(result)
        return result

    def _is_over(self, tensor: torch.Tensor) -> bool:
        return any(each is tensor for each in self._over)

    def _allowed(self, func: Any, args: tuple[Any, ...], given: list[torch.Tensor]) -> bool:
        if func is torch.ops.aten.index.Tensor:  # all dimensions of what is looked up in
            table, indices = args
            whole = len(indices) == table.dim() and all(each is not None for each in indices)
            return whole and not self._is_over(table) and all(self._is_over(each) or not each.dim() for each in indices)
        if func.overloadpacket in (torch.ops.aten.new_ones, torch.ops.aten.new_zeros, torch.ops.aten.new_full):
            return len(args[1]) == 0
        return (func in _KEEPS or is_pointwise(func)) and all(self._is_over(each) or not each.dim() for each in given)
