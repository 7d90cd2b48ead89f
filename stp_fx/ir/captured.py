"""A graph that keeps what belongs to it: however it is copied, pickled or packaged, ``meta[KEY]`` comes along.

``fx.GraphModule`` loses its ``meta`` when it is pickled, its class name when it is copied deeply, and stored tensors that no
node reads when it is copied shallowly. Here all three survive, in any order of copies.
"""

from __future__ import annotations

import builtins
import functools
import types
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.fx import graph_module
from torch.package import Importer, PackageExporter, PackageImporter, sys_importer
from typing_extensions import Self

from stp_fx.ir._torch_compat import import_block
from stp_fx.ir.modes import graph_of_mode, has_modes
from stp_fx.ir.patches import LOCK

__all__ = ["KEY", "CapturedGraph", "compiled"]

KEY = "stp_fx"
"""Under which of a graph's ``meta`` the library keeps its own value. Copies get it by ``copy.deepcopy`` of the value."""

_HOOKS = frozenset(key for key in nn.Module().__dict__ if "hooks" in key)


class CapturedGraph(fx.GraphModule):
    """The result of :func:`stp_fx.trace`: a ``GraphModule`` named as the model's class is.

    A shallow copy shares modules, tensors and the graph; it has a ``meta`` of its own, with the same values.
    """

    def __init__(self, root: Any, graph: fx.Graph, class_name: str = "GraphModule") -> None:
        super().__init__(root, graph, class_name)
        if isinstance(root, graph_module._CodeOnlyModule):  # a copy, of which GraphModule takes one name of what is tied
            for store in ("_modules", "_parameters", "_buffers"):
                for name, value in root.__dict__[store].items():
                    self.__dict__[store].setdefault(name, value)
            self._non_persistent_buffers_set = set(root._non_persistent_buffers_set)

    def recompile(self) -> Any:
        """As ``fx.GraphModule``; where training and evaluation go different ways, ``forward`` runs that of the mode."""
        code = super().recompile()
        if has_modes(self.graph):
            type(self).forward = _by_mode(type(self).forward, self.graph)  # type: ignore[method-assign]
        return code

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module``, but for modules that the model's own ``train`` keeps in another mode."""
        super().train(mode)
        held = getattr(self.__dict__.get("meta", {}).get(KEY), "held", {}).get(mode, ())
        for name in held:
            try:
                self.get_submodule(name).training = not mode
            except AttributeError:  # a pass has removed it
                continue
        return self

    def __copy__(self) -> CapturedGraph:
        body = graph_module._CodeOnlyModule({**self.__dict__, "_modules": dict(self._modules)})
        result = CapturedGraph(body, self.graph, class_name=type(self).__name__)
        self.graph.owning_module = self
        result.meta = dict(self.meta)
        return result

    def _deepcopy_init(self) -> Callable[..., None]:
        return functools.partial(_copied, class_name=type(self).__name__)

    def __reduce__(self) -> tuple[Any, ...]:
        # The content is a state, not an argument: hooks on state dicts refer to their module, which is this one.
        state = (type(self).__name__, self._body(), self._source(sys_importer))
        return _empty, (), state, None, None, _fill

    def __reduce_package__(self, exporter: PackageExporter) -> tuple[Any, ...]:
        name = f"fx-generated._{exporter.get_unique_id()}"
        exporter.save_source_string(name, self._source(exporter.importer))
        return _unpackaged, (type(self).__name__, self._body(), name)

    def _source(self, importer: Importer) -> str:
        """The graph as Python. (``GraphModule`` recompiles itself for that, which replaces ``forward``.)"""
        code = self.graph.python_code("self")
        return import_block(code.globals, importer) + code.src

    def _body(self) -> dict[str, Any]:
        """The state that is pickled beside the source: all attributes, and of ``meta`` the library's entries only."""
        traces = {node.name: node.meta["stack_trace"] for node in self.graph.nodes if "stack_trace" in node.meta}
        kept = {key: value for key, value in self.__dict__.items() if key not in ("_graph", "_code", "_lineno_map", "meta")}
        kept["meta"] = {KEY: self.meta[KEY]} if KEY in self.meta else {}
        return {**kept, "_graphmodule_graph_node_meta_stack_trace": traces}


def _by_mode(whole: Callable[..., Any], graph: fx.Graph) -> Callable[..., Any]:
    """A ``forward`` that runs what the mode of its module runs; ``whole`` has the signature."""
    modes = {f"_{name}": compiled(graph_of_mode(graph, mode)) for name, mode in (("evaluation", False), ("training", True))}
    # Global names of its own in place of a closure: who holds the function can be given other code (`training.adopt`). A code
    # object of its own: torch.compile counts recompilations by it.
    forward = types.FunctionType(_forward.__code__.replace(), {"__builtins__": builtins, **modes}, "forward")
    return functools.wraps(whole)(forward)


def _forward(self: CapturedGraph, *args: Any, **kwargs: Any) -> Any:
    return (_training if self.training else _evaluation)(self, *args, **kwargs)  # type: ignore[name-defined]  # noqa: F821


def compiled(graph: fx.Graph) -> Callable[..., Any]:
    """A graph as a function, of the module that has its tensors and of its inputs."""
    code = graph.python_code("self")
    return graph_module._forward_from_src(code.src, code.globals)


def _copied(result: CapturedGraph, body: nn.Module, graph: fx.Graph, class_name: str) -> None:
    """``result`` gets all that ``body``, a deep copy, stores: torch would leave out the names that no node reads."""
    CapturedGraph.__init__(result, body, graph, class_name=class_name)
    for store in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        result.__dict__[store] = body.__dict__[store]


def _empty() -> CapturedGraph:
    """A graph that :func:`_fill` makes one of."""
    return object.__new__(CapturedGraph)


def _fill(gm: CapturedGraph, state: tuple[str, dict[str, Any], str]) -> None:
    name, body, source = state
    built = _rebuilt(name, body, graph_module._forward_from_src(source, {}))
    gm.__class__ = type(built)
    gm.__dict__ = built.__dict__
    gm.graph.owning_module = gm


def _unpackaged(importer: PackageImporter, name: str, body: dict[str, Any], module: str) -> CapturedGraph:
    return _rebuilt(name, body, importer.import_module(module).forward)  # type: ignore[attr-defined]


def _rebuilt(name: str, body: dict[str, Any], forward: Callable[..., Any]) -> CapturedGraph:
    """The graph that ``forward`` is the code of. torch traces it, and keeps ``forward`` on a class that all threads share."""
    body = {**body, "_graphmodule_cls_name": name}
    meta = body.pop("meta")
    with LOCK:
        gm: Any = graph_module._deserialize_graph_module(forward, body, CapturedGraph)
    gm.meta.update(meta)
    gm.__dict__.update({key: value for key, value in body.items() if key in _HOOKS})  # torch leaves them out
    return gm
