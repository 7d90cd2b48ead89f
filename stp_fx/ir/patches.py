"""All that is patched while a model's Python is traced, and by whom it is seen.

Python calls much that a proxy cannot answer: factories whose sizes are proxies, ``isinstance``, functions of ``math``, a custom
``autograd.Function``. While :func:`tracing` is active in a thread, these lead to its tracer. All other threads, and every module
that is imported meanwhile, read and call the originals:

- attributes of ``torch`` and ``math`` are answered by a subclass of the module's type; their dictionaries stay as they are;
- methods of ``torch.Tensor`` and ``Function.apply`` are descriptors that give the original to other threads;
- ``nn.Module.__call__`` and ``__getattr__`` ask which tracer is active in their thread, and ``training`` tells it of reads;
- names in the globals of the model's own forwards become functions that do as the originals where no proxy is given.

One process-wide lock is held from the first patch to the last; it is re-entrant, so a forward may itself trace a model.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import math
import random
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy
import torch
from torch import nn
from torch.fx import _symbolic_trace

from stp_fx.ir import inverse_fourier, vmapped
from stp_fx.ir._torch_compat import as_written, fx_tracing, joins_to_patch, module_patches
from stp_fx.ir.active import HERE, LOCK, PatchedTracer, active, suspended
from stp_fx.ir.asked import BUILTINS, as_tensor, is_tensor, scripted_isinstance
from stp_fx.ir.checked import CHECKS
from stp_fx.ir.proxies import ValueProxy, holds_proxy, user_line
from stp_fx.ir.stand_ins import Autocasts, StandIn

__all__ = ["LOCK", "PatchedTracer", "active", "applying", "hooks_seen", "suspended", "tracing"]

_FACTORIES = ("arange", "zeros", "ones", "full", "empty", "linspace", "eye", "tensor", "asarray")
"""These take no tensor, so proxies among their sizes and dtypes do not reach ``__torch_function__``."""

_RANDOM = ("rand", "randn", "randint", "randperm", "normal")
"""These draw anew at each call of the graph, whatever they are given."""

_SHAPED = ("expand", "repeat", "view", "reshape", "new_zeros", "new_ones", "new_full", "new_empty", "tile", "narrow")
"""Methods of a tensor that the model's own code made; proxies among their sizes do not reach it either."""

_OURS = "_stp_fx_takes_proxies"
"""Marks functions that a trace has put into globals, so that a trace within it leaves them."""


@contextmanager
def tracing(tracer: PatchedTracer, scopes: Iterable[dict[str, Any]]) -> Iterator[None]:
    """A block in which this thread's calls lead to ``tracer``; ``scopes`` are the globals of the forwards that it traces."""
    with LOCK, ExitStack() as undo:
        if HERE.depth == 0:
            _install(undo)
        _patch_wrapped(tracer, undo)
        for scope in {id(each): each for each in scopes}.values():
            _patch_scope(scope, undo)
        undo.enter_context(fx_tracing())
        undo.callback(_leave)
        HERE.tracers.append(tracer)
        HERE.depth += 1
        yield


def _leave() -> None:
    HERE.depth -= 1
    HERE.tracers.pop()


@contextmanager
def applying(apply: Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """A block in which this thread's ``Function.apply(...)`` is ``apply(Function, its own apply, args, kwargs)``."""
    thread, original = threading.get_ident(), _inherited(torch.autograd.Function, "apply")

    def applied(cls: Any, *args: Any, **kwargs: Any) -> Any:
        bound = original.__get__(None, cls)
        return bound(*args, **kwargs) if threading.get_ident() != thread else apply(cls, bound, args, kwargs)

    with LOCK, ExitStack() as undo:
        _set(torch.autograd.Function, "apply", classmethod(applied), undo)
        yield


@contextmanager
def hooks_seen() -> Iterator[list[str]]:
    """A block after which the list says where this thread has registered hooks on the gradients of tensors."""
    thread, original, seen = threading.get_ident(), torch.Tensor.register_hook, list[str]()

    def register_hook(self: torch.Tensor, hook: Callable[..., Any]) -> Any:
        if threading.get_ident() == thread:
            seen.append(user_line())
        return original(self, hook)

    with LOCK, ExitStack() as undo:
        _set(torch.Tensor, "register_hook", register_hook, undo)
        yield seen


# -- what is patched once, however many traces are nested --------------------------------------------------------------


def _install(undo: ExitStack) -> None:
    for module, kind in _module_types().items():
        undo.callback(setattr, module, "__class__", module.__class__)
        module.__class__ = kind
    for name in _SHAPED:
        original = _inherited(torch.Tensor, name)
        _set(torch.Tensor, name, _ForThread(original, _taking_proxies(original, "call_method", name)), undo)
    apply = _inherited(torch.autograd.Function, "apply")
    _set(torch.autograd.Function, "apply", _ForThread(apply, _applying(apply)), undo)
    for name, patch in (("__call__", _calling), ("__getattr__", _reading), *module_patches()):
        method = vars(nn.Module)[name]
        _set(nn.Module, name, _ForThread(method, patch(method)), undo)
    _set(nn.Module, "training", _Training(), undo)
    scripted = _inherited(torch.jit.ScriptFunction, "__call__")
    takes = as_written(scripted, lambda *given: active() is not None and holds_proxy(given))
    _set(torch.jit.ScriptFunction, "__call__", takes, undo)
    if "torch._dynamo" in sys.modules:  # what torch.compile has compiled is called as it was before
        settings: Any = sys.modules["torch._dynamo"].config
        undo.callback(setattr, settings, "error_on_nested_fx_trace", settings.error_on_nested_fx_trace)
        settings.error_on_nested_fx_trace = False
    bootstrap: Any = importlib._bootstrap  # type: ignore[attr-defined]
    _set(bootstrap, "_find_and_load", _importing(bootstrap._find_and_load), undo)


def _set(owner: Any, name: str, value: Any, undo: ExitStack) -> None:
    if name in vars(owner):
        undo.callback(setattr, owner, name, vars(owner)[name])
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)


def _inherited(owner: type, name: str) -> Any:
    return next(vars(kind)[name] for kind in owner.__mro__ if name in vars(kind))


class _ForThread:
    """A class attribute that is ``patched`` in a thread that traces, and ``original`` in others."""

    def __init__(self, original: Any, patched: Any) -> None:
        self.original, self.patched = original, patched

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return (self.original if active() is None else self.patched).__get__(instance, owner)


class _Training:
    """``nn.Module.training`` while a model is traced: the flag as it is, and the tracer hears that it was read."""

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            raise AttributeError("training")
        tracer = active()
        if tracer is not None:
            tracer.asks_mode = True
        try:
            return instance.__dict__["training"]
        except KeyError:
            raise AttributeError("training") from None

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__["training"] = value

    def __delete__(self, instance: Any) -> None:
        del instance.__dict__["training"]


def _calling(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tracer = active()
        if tracer is None:
            return original(self, *args, **kwargs)
        forward = original if self.__dict__.get("_compiled_call_impl") is None else nn.Module._call_impl  # m.compile()
        return tracer.call_module(self, functools.partial(forward, self), args, kwargs)

    return call


def _reading(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def read(self: nn.Module, name: str) -> Any:
        tracer, value = active(), original(self, name)
        return value if tracer is None else tracer.getattr(name, value, {})

    return read


def _applying(original: Any) -> Any:
    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        tracer, bound = active(), original.__get__(None, cls)
        if tracer is None or not holds_proxy((args, kwargs)):
            return bound(*args, **kwargs)
        return tracer.apply_function(cls, bound, args, kwargs)

    return classmethod(apply)


def _importing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Called for a module that is not loaded yet. It may keep what it reads of torch, as ``torch._dynamo`` does."""

    def find_and_load(*args: Any) -> Any:
        if active() is None:
            return original(*args)
        with suspended():
            return original(*args)

    return find_and_load


def _taking_proxies(original: Any, kind: str, target: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        tracer = active()
        if tracer is not None and holds_proxy((args, kwargs)):
            return tracer.create_proxy(kind, target, args, kwargs)
        return original(*args, **kwargs)

    return call


def _joining(original: Any) -> Callable[..., Any]:
    """Of a function that takes a sequence of tensors: also one that is a node, as what ``meshgrid`` gives and slices of it."""
    taking = _taking_proxies(original, "call_function", original)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        node = isinstance(args[0] if args else kwargs.get("tensors"), ValueProxy)
        return (taking if node else original)(*args, **kwargs)

    return call


def _drawing(original: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        tracer = active()
        if tracer is None or kwargs.get("generator") is not None:
            return original(*args, **kwargs)
        return tracer.create_proxy("call_function", original, args, kwargs)

    return call


# -- modules of functions ----------------------------------------------------------------------------------------------


class _Limits(StandIn):
    """The type of what stands for ``torch.finfo`` and ``torch.iinfo``: calls take proxies."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _taking_proxies(cls.original, "call_function", cls.original)(*args, **kwargs)


@functools.cache
def _replaced() -> dict[types.ModuleType, dict[str, Any]]:
    """The attributes that a thread which traces reads from these modules instead of their own."""
    calls: dict[str, Any] = {name: _taking_proxies(f := vars(torch)[name], "call_function", f) for name in _FACTORIES}
    calls |= {name: _drawing(vars(torch)[name]) for name in _RANDOM}
    calls |= {name: _joining(vars(torch)[name]) for name in joins_to_patch()}
    calls |= {"is_tensor": is_tensor, "as_tensor": as_tensor, "istft": inverse_fourier.istft, "vmap": vmapped.vmap, **CHECKS}
    limits = {name: _Limits(name, (), {"original": getattr(torch, name)}) for name in ("finfo", "iinfo")}
    casts = {"autocast": Autocasts("autocast", (), {"original": torch.autocast})}
    functions = {name: f for name, f in vars(math).items() if not name.startswith("_") and callable(f)}
    drawn: dict[types.ModuleType, dict[str, Any]] = {
        module: {name: _told(f, module) for name, f in _drawing_functions(module)} for module in (random, numpy.random)
    }
    drawn[numpy.random]["default_rng"] = _told(numpy.random.default_rng, numpy.random, unless_seeded=True)
    asked = {torch.jit: {"isinstance": scripted_isinstance}, torch.amp: casts}
    return {torch: calls | limits | casts, math: {name: _wrapped(f) for name, f in functions.items()}, **asked, **drawn}


def _drawing_functions(module: types.ModuleType) -> list[tuple[str, Any]]:
    """The functions of Python's or numpy's module that draw: methods of its hidden generator."""
    owners = (random.Random, numpy.random.RandomState)
    methods = [(name, f) for name, f in vars(module).items() if isinstance(getattr(f, "__self__", None), owners)]
    return [(name, f) for name, f in methods if not name.endswith(("seed", "state"))]


def _told(original: Any, module: types.ModuleType, unless_seeded: bool = False) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        tracer = active()
        seeded = unless_seeded and [*args, *kwargs.values()] not in ([], [None])
        if tracer is not None and not seeded:
            tracer.draws.add(module.__name__)
        return original(*args, **kwargs)

    return call


@functools.cache
def _module_types() -> dict[types.ModuleType, type]:
    return {module: _module_type(module, names) for module, names in _replaced().items()}


def _module_type(module: types.ModuleType, names: dict[str, Any]) -> type:
    def answering(name: str, patched: Any) -> property:
        return property(
            lambda self: vars(self)[name] if active() is None else patched,
            lambda self, value: vars(self).__setitem__(name, value),
            lambda self: vars(self).__delitem__(name),
        )

    return type("module", (type(module),), {name: answering(name, patched) for name, patched in names.items()})


# -- names in the globals of a model's own code ------------------------------------------------------------------------


def _patch_scope(scope: dict[str, Any], undo: ExitStack) -> None:
    """``isinstance`` sees tensors, and names imported from ``torch`` and ``math`` are those that take proxies."""
    for name, value in list(scope.items()):
        patched = _by_identity().get(id(value)) if callable(value) and not name.startswith("_") else None
        if isinstance(value, functools._lru_cache_wrapper):
            patched = _uncached(value)
        if patched is not None:
            _put(scope, name, patched, undo)
    if not str(scope.get("__name__", "")).startswith("torch."):
        for name, value in BUILTINS.items():
            if name not in scope:
                _put(scope, name, value, undo)


def _uncached(cache: Any) -> Callable[..., Any]:
    """A function that remembers its results works them out for proxies: what it remembers is asked for by number."""

    @functools.wraps(cache)
    def call(*args: Any, **kwargs: Any) -> Any:
        if active() is None or not holds_proxy((args, kwargs)):
            return cache(*args, **kwargs)
        return cache.__wrapped__(*args, **kwargs)

    for name in ("cache_info", "cache_clear", "cache_parameters"):
        setattr(call, name, getattr(cache, name))
    return call


@functools.cache
def _by_identity() -> dict[int, Any]:
    return {id(vars(module)[name]): patched for module, names in _replaced().items() for name, patched in names.items()}


def _put(scope: dict[str, Any], name: str, value: Any, undo: ExitStack) -> None:
    if name in scope:
        undo.callback(scope.__setitem__, name, scope[name])
    else:
        undo.callback(scope.pop, name, None)
    scope[name] = value


def _patch_wrapped(tracer: PatchedTracer, undo: ExitStack) -> None:
    """Functions that users have given to ``fx.wrap`` stay calls, where the tracer does not rather look into them."""
    for (_, name), scope in list(_symbolic_trace._wrapped_fns_to_patch.items()):
        original = scope.get(name, getattr(builtins, name, None))
        if original is not None and not hasattr(original, _OURS) and tracer.keeps_call(original):
            _put(scope, name, _wrapped(original), undo)


def _wrapped(original: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        tracer = active()
        if tracer is None or not holds_proxy((args, kwargs)):
            return original(*args, **kwargs)
        result = tracer.create_proxy("call_function", original, args, kwargs)
        node = getattr(result, "node", None)
        if node is not None and node.target is original:
            node.meta["is_wrapped"] = True  # the code of a graph says so, for those who trace it again
        return result

    setattr(call, _OURS, True)
    return call
