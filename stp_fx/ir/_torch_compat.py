"""The differences between the versions of PyTorch that the library runs with, from 2.6 on; the rest of the code asks here.

Each function does what the newest PyTorch does, by its own means where it has them. Modules of ``torch.export`` are imported
where they are used: they take long.
"""

from __future__ import annotations

import functools
import inspect
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._library.fake_class_registry import FakeScriptObject
from torch.fx import _symbolic_trace, graph_module
from torch.package import Importer
from torch.utils import checkpoint

__all__ = [
    "SAVES_FOR_CHECKPOINT",
    "STORED_CONSTANTS",
    "as_newest_exports",
    "as_written",
    "children_of",
    "exported_module",
    "fx_tracing",
    "guards_of",
    "import_block",
    "is_exporting",
    "is_pointwise",
    "joins_to_patch",
    "meta_kernels",
    "module_patches",
    "set_versions",
]


_VERSION = tuple(map(int, torch.__version__.split(".")[:2]))


def children_of(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    """The specs of a container's values. (A method from 2.9 on.)"""
    return spec.children() if hasattr(spec, "children") else spec.children_specs  # type: ignore[attr-defined]


def set_versions(tensors: Sequence[torch.Tensor], versions: Sequence[int]) -> None:
    """Sets the version counters of tensors. (Older versions set one at a time.)"""
    set_counter: Any = torch._C._autograd._unsafe_set_version_counter  # type: ignore[attr-defined]
    if "arg0: torch.Tensor," not in (set_counter.__doc__ or ""):
        set_counter(tensors, versions)
        return
    for tensor, version in zip(tensors, versions, strict=True):
        set_counter(tensor, version)


_aten: Any = torch.ops.aten
_TAGGED_LATER = frozenset({
    _aten._conj_physical.default, _aten.celu_.default, _aten.elu_.default, _aten.hardsigmoid_.default, _aten.hardtanh_.default,
    _aten.ldexp.Tensor, _aten.leaky_relu.default, _aten.leaky_relu_.default, _aten.selu_.default,
})  # fmt: skip
"""Ops that are pointwise, and that only newer versions tag so."""


def is_pointwise(func: Any) -> bool:
    """Whether torch tags an op overload as working on each position by itself."""
    return torch.Tag.pointwise in func.tags or func in _TAGGED_LATER


is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
"""Whether ``torch.export`` runs the code. (Not told before 2.7.)"""


# -- torch.fx ----------------------------------------------------------------------------------------------------------


STORED_CONSTANTS: tuple[type, ...] = getattr(
    _symbolic_trace, "_constant_attribute_types", (torch.Tensor, torch.ScriptObject, FakeScriptObject)
)
"""The objects that ``fx.Tracer`` reads by name, if it finds them in an attribute of a module."""


def fx_tracing() -> AbstractContextManager[None]:
    """A block in which ``is_fx_tracing`` is true in this thread. (Older versions have one flag for all threads.)"""
    context = getattr(_symbolic_trace, "_is_fx_tracing_context", None)
    return _flagged() if context is None else context(True)


@contextmanager
def _flagged() -> Iterator[None]:
    module: Any = _symbolic_trace
    previous, module._is_fx_tracing_flag = module._is_fx_tracing_flag, _InThread()
    try:
        yield
    finally:
        module._is_fx_tracing_flag = previous


class _InThread:
    """True in the thread that has made it."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def __bool__(self) -> bool:
        return threading.get_ident() == self._thread


SAVES_FOR_CHECKPOINT: Any = getattr(checkpoint, "_NoopSaveInputs", None)
"""With this function, older versions keep the inputs of a checkpoint for its backward; nobody reads the numbers of its result."""


class _Anything:
    @classmethod
    def __torch_function__(cls, *_: Any) -> Any: ...


def _assigning(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def assign(self: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, fx.Proxy) and name in self.__dict__.get("_buffers", ()):
            self._buffers[name] = value  # type: ignore[assignment]
        else:
            original(self, name, value)

    return assign


def module_patches() -> list[tuple[str, Callable[[Callable[..., Any]], Callable[..., Any]]]]:
    """Methods of ``nn.Module`` that do not take proxies, by name, with what makes one that does of each.

    Older versions refuse a proxy as the value of a buffer.
    """
    probe: Any = nn.Module()
    probe.register_buffer("value", None)
    try:
        probe.value = _Anything()
    except TypeError:
        return [("__setattr__", _assigning)]
    return []


def joins_to_patch() -> list[str]:
    """Functions of ``torch`` that take a sequence of tensors, and refuse a proxy in its place. (Older versions do.)"""
    names = ("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "row_stack", "column_stack")
    return [name for name in names if _refuses(getattr(torch, name))]


def _refuses(function: Callable[..., Any]) -> bool:
    try:
        function(_Anything())
    except TypeError:
        return True
    return False


def import_block(names: Mapping[str, Any], importer: Importer) -> str:
    """The imports of a graph's code. (Older versions cannot write annotations that are text.)"""
    texts = [f"{name} = {value!r}" for name, value in names.items() if isinstance(value, str)]
    rest = {name: value for name, value in names.items() if not isinstance(value, str)}
    return "\n".join([*texts, graph_module._format_import_block(rest, importer)])


# -- meta tensors ------------------------------------------------------------------------------------------------------


def meta_kernels() -> dict[Any, Callable[..., Any]]:
    """By op, what gives its result on the meta device, or NotImplemented, where torch's own kernel is not to be trusted.

    2.6 has none for ``_convolution``, and gives an empty tensor where a kernel is larger than the input.
    """
    if _VERSION >= (2, 14):
        return {}
    return {_aten.convolution.default: _kernel_fits, _aten._convolution.default: _convolution}


def _convolution(*args: Any) -> Any:
    _kernel_fits(*args)
    return _aten.convolution.default(*args[:9])


def _kernel_fits(
    x: torch.Tensor, weight: torch.Tensor, _: Any, __: Any, padding: Any, dilation: Any, transposed: bool, *___: Any
) -> Any:
    kernel = weight.shape[2:]
    pads, steps = (list(given) * len(kernel) if len(given) == 1 else list(given) for given in (padding, dilation))
    padded = [size + 2 * pad for size, pad in zip(x.shape[-len(kernel) :], pads)]
    spread = [step * (size - 1) + 1 for size, step in zip(kernel, steps)]
    if not transposed and any(space < size for space, size in zip(padded, spread)):
        raise RuntimeError(f"input size with padding: {padded}. The kernel of size {spread} is larger than that")
    return NotImplemented


# -- torch.export ------------------------------------------------------------------------------------------------------


@contextmanager
def as_newest_exports() -> Iterator[None]:
    """A block in which ``torch.export`` does what the newest does.

    Older versions warn of what they do themselves, see nothing of the gradient of a scripted function once that is optimised,
    and refuse a forward that assigns to attributes.
    """
    from torch.export import _trace

    module: Any = _trace
    with ExitStack() as undo:
        undo.enter_context(warnings.catch_warnings())
        warnings.filterwarnings(
            "ignore", "Attempted to insert a get_attr Node|Node .* does not reference|Unable to find the path"
        )
        warnings.filterwarnings("ignore", r"Additional \d+ warnings suppressed about get_attr")
        if _VERSION < (2, 14):
            undo.callback(setattr, torch.jit.ScriptFunction, "__call__", torch.jit.ScriptFunction.__call__)
            here = _InThread()
            torch.jit.ScriptFunction.__call__ = as_written(  # type: ignore[method-assign]
                torch.jit.ScriptFunction.__call__, lambda *_: bool(here)
            )
        if not _takes_assignments():
            undo.callback(setattr, module, "_detect_attribute_assignment", module._detect_attribute_assignment)
            module._detect_attribute_assignment = _assignments_told
        yield


def as_written(original: Callable[..., Any], when: Callable[[Any, Any], bool]) -> Callable[..., Any]:
    """``ScriptFunction.__call__`` that, ``when(args, kwargs)``, calls the Python function that was scripted."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        written = getattr(self, "_torchdynamo_inline", None) if when(args, kwargs) else None
        return original(self, *args, **kwargs) if written is None else written(*args, **kwargs)

    return call


_OF_MODULES = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


@functools.cache
def _takes_assignments() -> bool:
    from torch.export import _trace

    probe: Any = nn.Module()
    try:
        with _trace._detect_attribute_assignment(probe):
            probe.number = 1
    except ValueError:
        return False
    return True


@contextmanager
def _assignments_told(model: nn.Module) -> Iterator[None]:
    """A block after which attributes are what they were; a warning names those to which tensors were assigned."""
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    try:
        yield
    finally:
        found: list[str] = []
        for name, module in model.named_modules():
            kept = before.get(name, {})
            for key, value in vars(module).items():
                if isinstance(value, torch.Tensor) and value is not kept.get(key):
                    found.append(f"self.{name}.{key}" if name else f"self.{key}")
            vars(module).update({key: value for key, value in kept.items() if key not in _OF_MODULES})
        if found:
            warnings.warn(f"The tensor attributes {', '.join(found)} were assigned during export.", stacklevel=2)


def exported_module(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The graph of an exported program, without a module that checks its guards. (Older versions have none.)

    Raises:
        RuntimeError: it stores a fake tensor in place of a constant, which newer versions find themselves.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    lost = [name for name, value in program.constants.items() if isinstance(value, FakeTensor)]
    if lost:
        raise RuntimeError(f"the constant {lost[0]} is a fake tensor")
    settings = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    return program.module(**settings)  # type: ignore[return-value]


def guards_of(program: torch.export.ExportedProgram, positional: Sequence[str]) -> list[str]:
    """The conditions on sizes of inputs that ``torch.export`` took for granted, as Python: ``L['x'].size()[0] <= 2``.

    Older versions only keep it as formulas, and name inputs by their places; ``positional`` are the names of those places.
    """
    from torch._export.non_strict_utils import key_path_to_source

    conditions = program._guards_code if hasattr(program, "_guards_code") else _guards_in_code(program)
    if "sourced_prefixes" in inspect.signature(key_path_to_source).parameters:
        return conditions
    named = [re.sub(r"L\['args'\]\[0\]\[(\d+)\]", lambda m: f"L[{positional[int(m[1])]!r}]", each) for each in conditions]
    return [each.replace("L['args'][1][", "L[") for each in named]


def _guards_in_code(program: torch.export.ExportedProgram) -> list[str]:
    from torch.fx.experimental import symbolic_shapes

    values = (node.meta.get("val") for node in program.graph.nodes)
    sizes = (size for value in values if isinstance(value, torch.Tensor) for size in value.shape)
    free: Any = next((size for size in sizes if isinstance(size, torch.SymInt)), None)
    if free is None:
        return []
    shapes = free.node.shape_env
    sources = shapes.var_to_sources
    printer = symbolic_shapes.ShapeGuardPythonPrinter(sources, lambda source: source.name(), sources)
    known = [guard.expr for guard in shapes.guards if guard.expr.free_symbols <= sources.keys()]
    return [code for code in map(printer.doprint, known) if "L['self']" not in code]
