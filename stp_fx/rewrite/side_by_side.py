"""Networks run over all batches at once, step by step: values are kept between steps and none is computed twice."""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from stp_fx.ir.in_place import may_write
from stp_fx.ir.modes import OneMode
from stp_fx.ir.runner import run_node
from stp_fx.ir.streamed import Streamed
from stp_fx.measure.calibration import eval_twin

_MAPPED = os.name == "posix"
"""Whether files of values are read by mapping them: they are deleted after a new one has been written, but before the tensors."""

Seen = Callable[[str, torch.Tensor], None]

__all__ = ["BatchState", "Network", "Seen", "States", "memory_limit"]


class Network:
    """One graph in evaluation. ``at``: the place of each node. Values are dropped after their last use, those in ``held`` not
    before they are released. ``compared`` says of a node that its whole numbers should be those of the other network. Of a
    ``streamed`` graph, tensors are loaded when nodes read them; it has the same nodes as ``gm``."""

    def __init__(
        self,
        gm: fx.GraphModule,
        compared: Callable[[str], bool],
        held: Collection[str] = (),
        streamed: Streamed | None = None,
    ) -> None:
        gm = gm if streamed is None else streamed.module
        self._compared = compared
        self._streamed = streamed
        self._graph = gm.graph
        self._run = OneMode(eval_twin(gm), gm.graph)
        self.module: nn.Module = self._run.module
        self.left_out = self._run.left_out
        self.nodes: list[fx.Node] = list(gm.graph.nodes)
        self.at: dict[str, int] = {node.name: k for k, node in enumerate(self.nodes)}
        self.by_name: dict[str, fx.Node] = {node.name: node for node in self.nodes}
        self._held = set(held)
        self._last = {node: k for k, node in enumerate(self.nodes)}
        self._last.update({used: k for k, node in enumerate(self.nodes) for used in node.all_input_nodes})
        self._dropped: list[list[fx.Node]] = [[] for _ in self.nodes]
        for node, k in self._last.items():
            self._dropped[k].append(node)
        self._cloned = {self.by_name[name] for name in held if any(may_write(u, self.module) for u in self.by_name[name].users)}

    def start(self, arguments: tuple[Any, ...]) -> dict[fx.Node, Any]:
        """Values of the placeholders."""
        self._run.args_iter, self._run.env = iter(self._graph.process_inputs(*arguments)), {}
        for node in self.nodes:
            if node.op == "placeholder":
                self._run.env[node] = self._run.run_node(node)
        return self._run.env

    def advance(self, env: dict[fx.Node, Any], start: int, stop: int, seen: Seen) -> None:
        """Runs the nodes from place ``start`` up to ``stop``; ``seen`` is given whole numbers and truth values."""
        self._run.env = env
        for k in range(start, stop):
            node = self.nodes[k]
            if node.op != "placeholder":
                self._load(node)
                value = self._run.run_node(node)
                if self._streamed is not None and node.op != "get_attr":
                    value = self._streamed.own(value)
                env[node] = value
                if node.op != "get_attr" and _counts(value) and self._compared(node.name):
                    seen(node.name, value)
                if node in self._cloned and isinstance(value, torch.Tensor):
                    env[node] = value.clone()
            for dropped in self._dropped[k]:
                if dropped.name not in self._held:
                    env.pop(dropped, None)

    def run(self, env: Mapping[fx.Node, Any], node: fx.Node, own: Mapping[fx.Node, Any] | None = None) -> Any:
        """The value of one node, which is not kept; ``own`` values stand before those of ``env``. Stored tensors are fetched."""
        own = own or {}
        self._load(node)

        def value_of(used: fx.Node) -> Any:
            if used in own:
                return own[used]
            return env[used] if used in env else run_node(used, value_of, self.module)

        return run_node(node, value_of, self.module)

    def _load(self, node: fx.Node) -> None:
        if self._streamed is not None:
            self._streamed.load(node)

    def fetch_stored(self, env: dict[fx.Node, Any], place: int) -> None:
        """Puts the stored tensors that are read from ``place`` on into ``env``, as they are now."""
        for node in self.nodes[:place]:
            if node.op == "get_attr" and self._last[node] >= place:
                env[node] = run_node(node, env.__getitem__, self.module)

    def release(self, names: Iterable[str]) -> None:
        """Values that need no longer be held."""
        self._held.difference_update(names)

    def drop(self, env: dict[fx.Node, Any], names: Iterable[str], place: int) -> None:
        """Drops those of the named values that nothing from ``place`` on reads."""
        for name in names:
            if self._last[self.by_name[name]] < place:
                env.pop(self.by_name[name], None)


def _counts(value: Any) -> bool:
    """Whether a value holds whole numbers or truth values, and one for each of something."""
    return isinstance(value, torch.Tensor) and value.dim() > 0 and not (value.is_floating_point() or value.is_complex())


class BatchState:
    """One batch in two networks: the values that are still needed, and how far each has come. ``parted``: nodes that give other
    whole numbers or truth values in one than in the other, such as the experts that tokens go to."""

    def __init__(self, values: tuple[dict[fx.Node, Any], dict[fx.Node, Any]]) -> None:
        self.values = values
        self.place = [0, 0]
        self.parted: set[str] = set()
        self._numbers: dict[str, tuple[torch.Size, float]] = {}

    def advance(self, which: int, network: Network, stop: int) -> None:
        """Runs the nodes of network ``which`` that come before place ``stop``."""
        if stop > self.place[which]:
            network.advance(self.values[which], self.place[which], stop, self.see)
            self.place[which] = stop

    def see(self, name: str, value: torch.Tensor) -> None:
        """Is given the whole numbers and truth values of both networks, and notes where they part."""
        flat = value.detach().reshape(-1).double()
        digest = value.shape, float(flat @ torch.arange(len(flat), dtype=flat.dtype, device=flat.device).cos())
        if self._numbers.setdefault(name, digest) != digest:
            self.parted.add(name)

    def is_alike(self, network: Network, names: Iterable[str]) -> bool:
        """Whether named values of ``network`` mean the same things in both: of the same tokens, in the same order. They do
        unless what they are computed from has parted."""
        found, waiting = set[str](), [network.by_name[name] for name in names] if self.parted else []
        while waiting:
            node = waiting.pop()
            if node.name in self.parted:
                return False
            if node.name not in found:
                found.add(node.name)
                waiting += node.all_input_nodes
        return True

    @property
    def kept(self) -> tuple[Any, ...]:
        """All but the values."""
        return self.place, self.parted, self._numbers

    @kept.setter
    def kept(self, kept: tuple[Any, ...]) -> None:
        self.place, self.parted, self._numbers = kept

    def bytes(self) -> int:
        """Memory of the kept values; stored tensors are the network's."""
        storages = {}
        for leaf in tree_leaves([[each for node, each in v.items() if node.op != "get_attr"] for v in self.values]):
            if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
                storage = leaf.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())


class States:
    """The states of all batches; what exceeds ``limit`` bytes lies in files of a temporary folder, removed at :meth:`close`."""

    def __init__(self, states: Sequence[BatchState], networks: tuple[Network, Network], limit: int) -> None:
        self._states: list[BatchState | pathlib.Path] = list(states)
        self._networks, self._limit = networks, limit
        self._bytes = [state.bytes() for state in states]
        self._stack = contextlib.ExitStack()
        self._folder: pathlib.Path | None = None
        self._written = 0

    def __enter__(self) -> States:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[BatchState]:
        """Each state in turn; what the caller changes in it is kept."""
        for k, held in enumerate(self._states):
            state = self._read(held) if isinstance(held, pathlib.Path) else held
            yield state
            self._bytes[k] = 0
            size = state.bytes()
            fits = sum(self._bytes) + size <= self._limit
            self._bytes[k] = size if fits else 0
            self._states[k] = state if fits else self._write(state)
            if isinstance(held, pathlib.Path):
                held.unlink()

    def __getitem__(self, k: int) -> BatchState:
        """One state, to be read only: what the caller changes in it may be lost."""
        held = self._states[k]
        return self._read(held) if isinstance(held, pathlib.Path) else held

    def _write(self, state: BatchState) -> pathlib.Path:
        if self._folder is None:
            self._folder = pathlib.Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="stp_fx_")))
        self._written += 1
        path = self._folder / f"{self._written}.pt"
        values = [{n.name: value for n, value in v.items() if n.op != "get_attr"} for v in state.values]
        torch.save((values, state.kept), path)
        return path

    def _read(self, path: pathlib.Path) -> BatchState:
        values, kept = torch.load(path, weights_only=False, mmap=_MAPPED)
        named = [{net.by_name[name]: value for name, value in v.items()} for net, v in zip(self._networks, values, strict=True)]
        state = BatchState((named[0], named[1]))
        state.kept = kept
        for network, env, place in zip(self._networks, state.values, state.place, strict=True):
            network.fetch_stored(env, place)
        return state


def memory_limit(device: torch.device) -> int:
    """Bytes of values that are kept in memory by default: half of what is free where they lie."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        available = {name: int(size.split()[0]) for name, _, size in (line.partition(":") for line in lines)}
        return available["MemAvailable"] * 1024 // 2  # with what files in memory can give up
    except (OSError, ValueError, KeyError, IndexError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError):
        return 1 << 32
