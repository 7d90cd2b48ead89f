"""Runs the graph once on meta tensors; each ATen call looks up its rule. No data, no memory, one forward's worth of time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode

from stp_fx.analysis.choices import choose
from stp_fx.analysis.chosen import Numbers, is_reached
from stp_fx.analysis.elements import Elements, Exclusion
from stp_fx.analysis.flow import flow_of
from stp_fx.analysis.norm_calls import norm_calls
from stp_fx.analysis.propagated import AxisRecord, Contraction, Propagated
from stp_fx.errors import InputError, TraceError
from stp_fx.ir.meta_run import run_for_shape
from stp_fx.ir.modes import MARKS, Choice, is_mark
from stp_fx.ir.nested import tensors_within
from stp_fx.ir.provenance import example_of
from stp_fx.ir.runner import call, operands, run_node
from stp_fx.ir.shapes import meta_twin
from stp_fx.ir.train_eval import AutogradCall
from stp_fx.ir.unread import unread
from stp_fx.rules import (
    FIXED,
    Dim,
    Dims,
    Entry,
    Factor,
    OpCall,
    TensorDims,
    entry_of,
    fixed_dim,
    fixed_dims,
    has_ids,
    is_pointwise,
    pointwise,
    tensors_in,
)
from stp_fx.rules.literals import Policy, policy_of
from stp_fx.rules.registry import load_for_imported
from stp_fx.rules.zeros import keeps_zeros

__all__ = ["propagate"]

_RANK = {"weight": 3, "scale": 2, "bias": 1, "buffer": 0, "other": 0}
_CONSTANT_LIMIT = 1 << 20
"""Index tensors with more values than this are not followed but pinned: they are data, not structure."""


def propagate(gm: fx.GraphModule) -> Propagated:
    """Works out the factors of every value of ``gm`` for its recorded example.

    Raises:
        InputError: ``gm`` carries no recorded example.
        TraceError: a node cannot run on meta tensors.
    """
    load_for_imported()
    inputs = iter(example_of(gm))
    twin = meta_twin(gm).eval()
    run = _Propagation(gm, twin)
    run.result.flow = flow_of(gm)
    env: dict[fx.Node, Any] = {}
    with torch.no_grad(), run:
        for node in gm.graph.nodes:
            run.enter(node)
            try:
                env[node] = run.node(node, env, inputs)
            except InputError:
                raise  # a rule that does not fit its op
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
        self._module: nn.Module | None = None
        self._policy = Policy.STRICT
        self._unread = unread(gm.graph)
        self._rescaled = {norm.node for norm in norm_calls(gm) if norm.kind == "rms" and not norm.hooked}
        self._hidden = False
        self._trains_only = False
        self._given: Any = ()
        self._zero: dict[int, torch.Tensor] | None = None
        self._calls: list[tuple[OpCall, Entry | None]] = []
        self._dims: dict[int, Dims] = {}
        self._alive: list[torch.Tensor] = []
        self._stored: set[int] = set()
        self._axis_of: dict[int, AxisRecord] = {}
        self._names: dict[int, str] = {}
        self._constants: dict[int, torch.Tensor] = {}
        self.elements = Elements()
        self.numbers = Numbers(self.elements)
        self.state_numbers, self.numbers_in = self.numbers.state, self.numbers.ask
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
                self._stored.add(id(tensor))
                dims = tuple(self.elements.new_dim(size) for size in tensor.shape)
                if originals[name].layout is torch.strided:
                    self._constants[id(tensor)] = originals[name]
                else:
                    for dim in dims:
                        self.pin(dim, f"{name!r} is a sparse tensor, which is not shortened")
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
        self._trains_only = MARKS[str(node.target)] == "train" if is_mark(node) else self._trains_only
        self._module = self._modules.get(str(node.target)) if node.op == "call_module" else None
        self._policy = policy_of(node, self._module)

    def mask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The operands of the node at hand are what a mask can make zero."""
        self._given, self._zero = (args, kwargs), None
        self._calls.clear()

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
        for dim in (dim for tensor in tensors_within(value) for dim in self.dims(tensor)):
            self.pin(dim, "graph output")
        self.numbers.leave(tensors_within(value), "numbers of its positions are graph output")
        self.numbers.finish()

    def node(self, node: fx.Node, env: Mapping[fx.Node, Any], inputs: Iterator[Any]) -> Any:
        """Runs one node."""
        if node.op in ("placeholder", "get_attr"):
            return run_node(node, env.__getitem__, self._twin, inputs)
        args, kwargs = operands(node, env.__getitem__)
        self.mask(args, kwargs)
        return call(node, args, kwargs, self._module_of)

    def _module_of(self, target: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._call_module(self._modules[target], args, kwargs)

    def _call_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(module, Choice):
            self.numbers.leave(tensors_within(args), "training and evaluation choose its positions in two ways")
            return choose(self, *args)
        if self._policy is not Policy.OPAQUE:
            return module(*args, **kwargs)
        hidden = module.function if isinstance(module, AutogradCall) else type(module)
        reason = f"{hidden.__name__} hides how it uses its channels; lower it or write a rule"
        self._policy = Policy.STRICT
        value = module(*args, **kwargs)
        stored = [*module.parameters(), *module.buffers()]
        self.numbers.leave([*tensors_in(args), *tensors_in(kwargs)], reason)
        for tensor in [*tensors_in(args), *tensors_in(kwargs), *stored, *tensors_in(value)]:
            for dim in self.dims(tensor):
                self.pin(dim, reason)
        return value

    # -- dispatch --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        entry = entry_of(func)
        rule = None if entry is None else entry.rule
        if rule is None and not is_pointwise(func):
            decomposed = self.decompose(func, args, kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        if torch.Tag.inplace_view in func.tags and isinstance(args[0], torch.Tensor):
            self.assign(args[0], self.dims(args[0]))  # before its shape changes
        out = run_for_shape(func, args, kwargs)
        call = OpCall(self, func, args, kwargs, out)
        operands, results = call.operands, call.outs
        if not results and rule is None and not func._schema.is_mutable:
            self.numbers.follow(call)
            return out
        only_stored = bool(operands) and all(id(t) in self._stored for t in operands)
        if only_stored:
            self._stored.update(id(t) for t in results)
            self._alive.extend(results)  # as long as their ids count
        self._hidden = only_stored and self._node is not None and self._node.op == "call_module"
        if rule is not None:
            rule(call)
        elif is_pointwise(func):
            pointwise(call)
        else:
            self._pin_unknown(func, [*operands, *results])
        self.numbers.follow(call)
        self._calls.append((call, entry))
        return out

    def _pin_unknown(self, func: Any, tensors: Sequence[torch.Tensor]) -> None:
        """The axes that an op without a rule reads, returns and writes to."""
        for tensor in tensors:
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
        if self._node in self._rescaled:  # its mean of squares is a sum, and removal puts the number of positions right
            self.result.contractions.append(Contraction(self.elements.node, (), (dim,), 0))
        else:
            self.elements.inexact(dim, reason)

    def several(self, dim: Dim, least: int) -> None:
        self.elements.several(dim, least)

    def excludes(self, source: torch.Tensor, dim: int, value: float, least: int, reason: str) -> bool:
        along, calls = self.dims(source)[dim], (made for made, _ in self._calls)
        if len(along) != 1 or along[0].ids is None or not is_reached(source, self._node, self._module, self._given, calls):
            return False
        self.elements.exclusions.append(Exclusion(along[0].ids, self.elements.node, dim, value, least, reason))
        return True

    def flat(self, dim: Dim) -> np.ndarray:
        return self.elements.flat(dim)

    @property
    def editable(self) -> bool:
        return self._policy is Policy.EDITABLE

    @property
    def unread(self) -> bool:
        return self._node is not None and self._node.name in self._unread

    def contract(
        self,
        letters: Sequence[Dim],
        contracted: Sequence[Dim],
        multiplier: int,
        carriers: Sequence[Sequence[torch.Tensor]],
        *,
        distance: bool = False,
    ) -> None:
        for dim, tensors in zip(contracted, carriers, strict=True):
            if self._hidden:
                self.inexact(dim, "contracted inside a module, where no mask reaches")
            elif not self._masked(tensors, all if distance else any):
                self.inexact(dim, f"summed over inside '{self.elements.node}', where no mask reaches")
        multiplier = 0 if self._trains_only else multiplier  # costs are those of evaluation
        if multiplier or any(has_ids(dim) for dim in contracted):
            self.result.contractions.append(Contraction(self.elements.node, tuple(letters), tuple(contracted), multiplier))

    def _masked(self, tensors: Sequence[torch.Tensor], which: Callable[[Iterable[bool]], bool]) -> bool:
        """Whether terms made of tensors are zero, as they are where any or all are (``which``), where a mask makes the node's
        operands zero; masks leave stored tensors alone."""
        live = [t for t in tensors if id(t) not in self._stored]
        if self._zero is None:
            self._zero = {id(t): t for t in tensors_in(self._given)}
        written = any(call.func._schema.is_mutable for call, _ in self._calls)
        if which is all and len(live) < len(tensors):
            return False
        if not live or (not written and which(id(t) in self._zero for t in live)):
            return True
        for made, entry in self._calls:  # of most nodes never asked for
            if keeps_zeros(made, entry, self._zero):
                self._zero.update((id(t), t) for t in made.outs)
            elif made.func._schema.is_mutable:
                written_to = {t.untyped_storage()._cdata for t in made.outs or made.operands}
                self._zero = {k: t for k, t in self._zero.items() if t.untyped_storage()._cdata not in written_to}
        self._calls.clear()
        return which(id(t) in self._zero for t in live)

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
