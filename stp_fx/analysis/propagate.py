"""Runs the graph once on meta tensors; each ATen call looks up its rule. No data, no memory, one forward's worth of time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode

from stp_fx.analysis.elements import Elements
from stp_fx.analysis.flow import FlowNode, flow_of
from stp_fx.errors import TraceError
from stp_fx.ir.meta_run import run_for_shape
from stp_fx.ir.provenance import example_of
from stp_fx.ir.runner import run_node
from stp_fx.ir.shapes import meta_twin
from stp_fx.ir.train_eval import AutogradCall
from stp_fx.rules import FIXED, Dim, Dims, Factor, fixed_dim, fixed_dims, has_ids, is_pointwise, pointwise, rule_for, tensors_in
from stp_fx.rules.literals import Policy, TensorDims, is_recurrent, policy_of

__all__ = ["AxisRecord", "Contraction", "Propagated", "propagate"]

_RANK = {"weight": 3, "scale": 2, "bias": 1, "buffer": 0, "other": 0}
_CONSTANT_LIMIT = 1 << 20
"""Index tensors with more values than this are not followed but pinned: they are data, not structure."""


@dataclasses.dataclass
class AxisRecord:
    """One dimension of a parameter or buffer, with the elements of its positions."""

    tensor: str
    dim: int
    ids: np.ndarray
    role: str
    side: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Contraction:
    """``multiplier`` x the sizes of all ``letters`` multiply-accumulates in ``node``, summing over ``contracted``."""

    node: str
    letters: tuple[Dim, ...]
    contracted: tuple[Dim, ...]
    multiplier: int


@dataclasses.dataclass
class Propagated:
    """What one run over the graph found."""

    elements: Elements
    axes: list[AxisRecord]
    shapes: dict[str, tuple[int, ...]]
    aliases: dict[str, str]
    values: dict[str, Any]
    contractions: list[Contraction]
    renumbered: dict[str, np.ndarray]
    unknown: dict[str, list[str]]
    flow: list[FlowNode] = dataclasses.field(default_factory=list)

    def pieces(self) -> Iterator[np.ndarray]:
        """The element arrays that values of the graph are made of, each once or more."""
        pending = list(self.values.values())
        while pending:
            value = pending.pop()
            if isinstance(value, TensorDims):
                yield from (factor.ids for dim in value.dims for factor in dim if factor.ids is not None)
            elif isinstance(value, (list, dict)):
                pending.extend(value.values() if isinstance(value, dict) else value)


def propagate(gm: fx.GraphModule) -> Propagated:
    """Works out the factors of every value of ``gm`` for its recorded example.

    Raises:
        InputError: ``gm`` carries no recorded example.
        TraceError: a node cannot run on meta tensors.
    """
    inputs = iter(example_of(gm))
    twin = meta_twin(gm).eval()
    run = _Propagation(gm, twin)
    run.result.flow = flow_of(gm)
    env: dict[fx.Node, Any] = {}
    with torch.no_grad(), run:
        for node in gm.graph.nodes:
            run.enter(node)
            try:
                env[node] = run_node(node, env.__getitem__, twin, inputs, run.module_of)
            except Exception as error:
                raise TraceError(f"node '{node.name}' ({node.format_node()}) cannot run on meta tensors: {error}") from error
            run.leave(node, env[node])
    return run.result


class _Propagation(TorchDispatchMode):
    """The :class:`~stp_fx.rules.Context` that rules talk to, and the mode that calls them."""

    def __init__(self, gm: fx.GraphModule, twin: nn.Module) -> None:
        super().__init__()
        self._twin = twin
        self._modules = dict(twin.named_modules(remove_duplicate=False))
        self._node: fx.Node | None = None
        self._policy = Policy.STRICT
        self._hidden = False
        self._given: set[int] | None = None
        self._dims: dict[int, Dims] = {}
        self._alive: list[torch.Tensor] = []
        self._stored: set[int] = set()
        self._axis_of: dict[int, AxisRecord] = {}
        self._names: dict[int, str] = {}
        self._constants: dict[int, torch.Tensor] = {}
        self.elements = Elements()
        self.result = Propagated(self.elements, [], {}, {}, {}, [], {}, {})
        self._enter_tensors(gm, twin)

    def _enter_tensors(self, gm: fx.GraphModule, twin: nn.Module) -> None:
        """Gives every parameter and buffer its axes; tied tensors are one."""
        originals = {**dict(gm.named_parameters(remove_duplicate=False)), **dict(gm.named_buffers(remove_duplicate=False))}
        for kind, named in (("other", twin.named_parameters), ("buffer", twin.named_buffers)):
            for name, tensor in named(remove_duplicate=False):
                self.result.shapes[name] = tuple(tensor.shape)
                if id(tensor) in self._names:
                    self.result.aliases[name] = self._names[id(tensor)]
                    continue
                self._names[id(tensor)] = name
                self._constants[id(tensor)] = originals[name]
                self._stored.add(id(tensor))
                dims = tuple(self.elements.new_dim(size) for size in tensor.shape)
                for k, dim in enumerate(dims):
                    if dim and dim[0].ids is not None:
                        axis = AxisRecord(name, k, dim[0].ids, kind)
                        self.result.axes.append(axis)
                        self._axis_of[id(dim[0].ids)] = axis
                self.assign(tensor, dims)

    # -- one node --------------------------------------------------------------------------------------------------

    def enter(self, node: fx.Node) -> None:
        self._node = node
        self.elements.node = node.name
        module = self._modules.get(str(node.target)) if node.op == "call_module" else None
        self._policy = policy_of(node, module)

    def leave(self, node: fx.Node, value: Any) -> None:
        if node.op == "output":
            self.outputs(value)
        self.result.values[node.name] = self._described(value)

    def _described(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return TensorDims(self.dims(value))
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            return [self._described(item) for item in value]
        if isinstance(value, dict):
            return {key: self._described(item) for key, item in value.items()}
        return value if isinstance(value, (int, float)) else None

    def outputs(self, value: Any) -> None:
        for tensor in tensors_in(value):
            for dim in self.dims(tensor):
                self.pin(dim, "graph output")

    def module_of(self, target: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._call_module(self._modules[target], args, kwargs)

    def _call_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changes = bool(module._forward_pre_hooks) or is_recurrent(module)
        self._given = {id(t) for t in tensors_in((args, kwargs))} if changes else None
        if self._policy is not Policy.OPAQUE:
            return module(*args, **kwargs)
        hidden = module.function if isinstance(module, AutogradCall) else type(module)
        reason = f"{hidden.__name__} hides how it uses its channels; lower it or write a rule"
        self._policy = Policy.STRICT
        value = module(*args, **kwargs)
        stored = [*module.parameters(), *module.buffers()]
        for tensor in [*tensors_in(args), *tensors_in(kwargs), *stored, *tensors_in(value)]:
            for dim in self.dims(tensor):
                self.pin(dim, reason)
        return value

    # -- dispatch --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        handler = rule_for(func)
        if handler is None and not is_pointwise(func):
            decomposed = self.decompose(func, args, kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        out = run_for_shape(func, args, kwargs)
        results = tensors_in(out)
        if not results:
            return out
        operands = tensors_in(args)
        only_stored = bool(operands) and all(id(t) in self._stored for t in operands)
        if only_stored:
            self._stored.update(id(t) for t in results)
        in_module = self._node is not None and self._node.op == "call_module"
        self._hidden = in_module and (only_stored or self._out_of_reach(func, operands, results))
        if handler is not None:
            handler(self, func, args, kwargs, out)
        elif is_pointwise(func):
            pointwise(self, func, args, kwargs, out)
        else:
            self._pin_unknown(func, operands)
        return out

    def _out_of_reach(self, func: Any, operands: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> bool:
        """Whether a call in a module with pre-hooks or a recurrence reads more than the module's arguments and views of them."""
        if self._given is None:
            return False
        if not all(id(t) in self._given or id(t) in self._stored for t in operands):
            return True
        returned = func._schema.returns
        if returned and all(r.alias_info is not None and not r.alias_info.is_write for r in returned):
            self._given.update(id(t) for t in results)
        return False

    def _pin_unknown(self, func: Any, operands: Sequence[torch.Tensor]) -> None:
        for tensor in operands:
            for dim in self.dims(tensor):
                self.pin(dim, f"no rule for {func}")
        self.result.unknown.setdefault(str(func), []).append(self.elements.node)

    # -- Context ---------------------------------------------------------------------------------------------------

    def dims(self, tensor: torch.Tensor) -> Dims:
        known = self._dims.get(id(tensor))
        return known if known is not None else fixed_dims(tensor.shape)

    def assign(self, tensor: torch.Tensor, dims: Dims) -> None:
        self._dims[id(tensor)] = dims
        self._alive.append(tensor)

    def unify(self, first: Dim, second: Dim) -> Dim:
        return self.elements.unify(first, second)

    def pin(self, dim: Dim, reason: str) -> None:
        self.elements.pin(dim, reason)

    def inexact(self, dim: Dim, reason: str) -> None:
        self.elements.inexact(dim, reason)

    def flat(self, dim: Dim) -> np.ndarray:
        return self.elements.flat(dim)

    @property
    def editable(self) -> bool:
        return self._policy is Policy.EDITABLE

    def contract(self, letters: Sequence[Dim], contracted: Sequence[Dim], multiplier: int) -> None:
        if self._hidden:
            for dim in contracted:
                self.inexact(dim, "contracted inside a module, where no mask reaches")
        if multiplier or any(has_ids(dim) for dim in contracted):
            self.result.contractions.append(Contraction(self.elements.node, tuple(letters), tuple(contracted), multiplier))

    def reads(self, tensor: torch.Tensor, role: str, out: int | None = None, into: int | None = None) -> None:
        if id(tensor) not in self._stored:
            return
        for k, dim in enumerate(self.dims(tensor)):
            side = "both" if k == out == into else "out" if k == out else "in" if k == into else ""
            for factor in dim:
                if factor.ids is not None:
                    root = factor.ids if factor.ids.base is None else factor.ids.base
                    axis = self._axis_of.get(id(root))
                    if axis is not None and axis.role != "buffer":
                        _take_role(axis, role, side)

    def literal_axis(self, size: int, what: str) -> Dim:
        if self._policy in (Policy.EDITABLE, Policy.FOLLOWS):
            return self.elements.new_dim(size)
        return fixed_dim(size)

    def positions(self, ids: np.ndarray) -> Dim:
        if len(ids) == 1:
            self.pin((Factor(1, ids),), "the only position of a piece")
            return ()
        if (ids == FIXED).all():
            return fixed_dim(len(ids))
        return (Factor(len(ids), ids),)

    def regroup(self, dims: Sequence[Dim], shape: Sequence[int]) -> Dims:
        pinned = None
        if self._policy is Policy.STRICT and tuple(len(d) for d in dims) != tuple(int(s != 1) for s in shape):
            pinned = "cut by a call whose sizes cannot be rewritten"
        result = self.elements.regroup(dims, shape, pinned)
        if pinned:
            for dim in result:
                self.pin(dim, pinned)
        return result

    def constant(self, tensor: torch.Tensor) -> np.ndarray | None:
        original = self._constants.get(id(tensor))
        if original is not None:
            if (
                original.is_floating_point()
                or original.dtype == torch.bool
                or original.numel() > _CONSTANT_LIMIT
                or original.is_meta
            ):
                return None
            return original.detach().cpu().numpy()
        return _literal_index(self._node, tensor)

    def renumber(self, tensor: torch.Tensor, ids: np.ndarray) -> None:
        name = self._names.get(id(tensor))
        if name is None:
            return
        known = self.result.renumbered.setdefault(name, ids)
        if known is not ids and not np.array_equal(known, ids):
            for array in (known, ids):
                self.elements.pin(self.positions(array), f"'{name}' indexes two different axes")

    def decompose(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not any(has_ids(dim) for t in tensors_in((args, kwargs)) for dim in self.dims(t)):
            return NotImplemented
        with self:
            if func in decomposition_table:
                return decomposition_table[func](*args, **kwargs)
            return func.decompose(*args, **kwargs)


def _take_role(axis: AxisRecord, role: str, side: str) -> None:
    if _RANK[role] > _RANK[axis.role]:
        axis.role, axis.side = role, side
    elif role == axis.role == "weight" and side and side != axis.side:
        axis.side = "both" if axis.side else side


def _literal_index(node: fx.Node | None, tensor: torch.Tensor) -> np.ndarray | None:
    """The values of a list written in ``x[:, [0, 2, 4]]``: the one list of numbers in the index."""
    if node is None or len(node.args) < 2:
        return None
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    lists = [item for item in index if isinstance(item, (list, tuple)) and all(isinstance(v, int) for v in item)]
    if len(lists) != 1 or len(lists[0]) != tensor.numel():
        return None
    return np.asarray(lists[0], dtype=np.int64)
