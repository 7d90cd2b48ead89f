"""``Block``: a residual branch as a unit that can be removed, with a name, what it costs, or why it must stay."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from torch import fx, nn

from stp_fx.analysis.build import analyze
from stp_fx.analysis.residual import Branch, find_branches
from stp_fx.checks import shown
from stp_fx.errors import InputError, PlanError
from stp_fx.ir.memo import remembered
from stp_fx.ir.provenance import is_mask_buffer, provenance_of, structure_of
from stp_fx.ir.shapes import fetch
from stp_fx.text import did_you_mean, listed

__all__ = ["Block", "blocks_named", "blocks_of", "outermost", "planned_blocks", "with_inner"]


@dataclasses.dataclass(frozen=True)
class Block:
    """A residual branch: all that is computed between an earlier value and the sum that adds it to what that has become.

    Args:
        name: the path of the module that holds the branch's own weights, without those of blocks inside it; a second one of the
            same path is ``path#2``. The name stays when channels or other blocks are removed.
        layer: ``name`` up to its last number ("model.layers.3" of "model.layers.3.mlp").
        total: the node that adds the branch.
        root: the node of the whole sum that it is a term of; mostly ``total``.
        value: the node that is added.
        stream: the earlier value that reaches the sum unchanged, and that the branch reads.
        nodes: what is removed with the block, in graph order.
        parameters: names of the parameters that are removed with it.
        shared: names of the parameters that it reads and that stay, since others read them too.
        macs: multiply-accumulates of ``nodes`` for the recorded example, masked or not.
        params: elements of ``parameters``.
        inside: the smallest block that holds this one, or None.
        reason: why the block cannot be removed; empty if it can.
        written: whether a later call writes to the sum in place, so that a copy of its other operand stands for it.
    """

    name: str
    layer: str
    total: str
    root: str
    value: str
    stream: str
    nodes: tuple[str, ...] = dataclasses.field(repr=False)
    parameters: tuple[str, ...] = dataclasses.field(repr=False)
    shared: tuple[str, ...]
    macs: int
    params: int
    inside: str | None
    reason: str = ""
    written: bool = dataclasses.field(default=False, repr=False)

    @property
    def removable(self) -> bool:
        """Whether the block can be removed."""
        return not self.reason

    def explain(self) -> str:
        """The block, the nodes and tensors that are removed with it, or why it cannot be removed."""
        lines = [f"block '{self.name}': '{self.total}' adds '{self.value}', computed from '{self.stream}'"]
        if self.inside is not None:
            lines.append(f"  inside block '{self.inside}'")
        if self.reason:
            return "\n".join([*lines, f"  cannot be removed: {self.reason}"])
        lines.append(f"  its removal takes {len(self.nodes)} nodes, {self.params:,} parameters and {self.macs:,} MACs")
        if self.shared:
            lines.append(f"  others read, so they stay: {listed(self.shared, 6)}")
        return "\n".join(lines)


def blocks_of(gm: fx.GraphModule) -> tuple[Block, ...]:
    """The residual branches of a captured graph that hold parameters, in the order of their sums; also those that must stay.

    A sum of an earlier value and of what is computed from it makes a block of the latter: attention, MLP, a pair of convolutions,
    at any depth. Branches side by side in one sum are blocks each. ``Block.reason`` says what keeps a block from being removed: a
    shortcut that is computed too, a value that is read elsewhere, a sum that broadcasts, a write to a value of others.

    Raises:
        InputError: ``gm`` is not a graph that :func:`stp_fx.trace` captured.
        TraceError: the graph does not run on meta tensors.

    Example:
        >>> import stp_fx, torch
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        ...     def forward(self, x):
        ...         return x + self.mlp(x)
        >>> [block] = blocks_of(stp_fx.trace(Net(), torch.randn(2, 4)))
        >>> block.name, block.params, block.macs
        ('mlp', 76, 128)
    """
    known = provenance_of(gm)
    removed = () if known.plan is None else known.plan.blocks
    return remembered(gm, "blocks", (structure_of(gm), removed), lambda: _blocks(gm, removed))


def blocks_named(gm: fx.GraphModule, names: Iterable[str]) -> tuple[Block, ...]:
    """The blocks of these names, in graph order. A path that is no block's name means all blocks beneath it, and so does
    ``path.*``; other patterns are matched with the names.

    Raises:
        InputError: a name that matches no block, or a block that cannot be removed; says why.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise InputError(f"give names of blocks, a sequence of texts; got {shown(names)}")
    found = blocks_of(gm)
    wanted: set[str] = set()
    for name in names:
        if not isinstance(name, str) or not name:
            raise InputError(f"a block is given by its name; got {shown(name)}")
        matching = _matching(found, name)
        if not matching:
            raise InputError(f"no block {name!r}{_hint(gm, found, name)}")
        free = [block for block in matching if block.removable]
        if not free:
            raise InputError(f"block '{matching[0].name}' cannot be removed: {matching[0].reason}")
        wanted |= {block.name for block in free}
    return tuple(block for block in found if block.name in wanted)


def planned_blocks(gm: fx.GraphModule, names: Iterable[str]) -> list[Block]:
    """The blocks that a plan names, without those that lie in others of them.

    Raises:
        PlanError: a block that the graph does not have, or that cannot be removed.
    """
    among = blocks_of(gm)
    known = {block.name: block for block in among}
    names = set(names)
    for name in names:
        if name not in known:
            done = provenance_of(gm).plan
            gone = done is not None and name in done.blocks
            hint = ": it has been removed already" if gone else did_you_mean(name, known)
            raise PlanError(f"the plan removes block {name!r}, which the graph does not have{hint}")
    chosen = outermost([block for block in among if block.name in names], among)
    for block in chosen:
        if not block.removable:
            raise PlanError(f"the plan removes block '{block.name}', which cannot be removed: {block.reason}")
    return chosen


def outermost(blocks: Sequence[Block], among: Sequence[Block]) -> list[Block]:
    """Those of ``blocks`` that lie in no other of them; ``among``: all blocks of the graph."""
    chosen, parent = {block.name for block in blocks}, {block.name: block.inside for block in among}

    def covered(name: str | None) -> bool:
        return name is not None and (name in chosen or covered(parent[name]))

    return [block for block in blocks if not covered(block.inside)]


def with_inner(blocks: Sequence[Block], among: Sequence[Block]) -> tuple[str, ...]:
    """The names of ``blocks`` and of all blocks inside them, sorted."""
    held = {name for block in blocks for name in block.nodes}
    names = {block.name for block in blocks} | {each.name for each in among if each.total in held}
    return tuple(sorted(names))


def _matching(blocks: Sequence[Block], name: str) -> list[Block]:
    exact = [block for block in blocks if block.name == name]
    if exact:
        return exact
    path = name.removesuffix(".*")
    beneath = [block for block in blocks if block.name.split("#")[0] == path or block.name.startswith(f"{path}.")]
    return beneath or [block for block in blocks if fnmatch.fnmatchcase(block.name, name)]


def _hint(gm: fx.GraphModule, blocks: Sequence[Block], name: str) -> str:
    plan = provenance_of(gm).plan
    if plan is not None and name in plan.blocks:
        return ", it has been removed"
    if not blocks:
        return ": the graph has no residual branch with parameters"
    return did_you_mean(name, [block.name for block in blocks], f"; blocks: {listed([b.name for b in blocks], 6)}")


def _blocks(gm: fx.GraphModule, removed: Sequence[str]) -> tuple[Block, ...]:
    branches = find_branches(gm)
    weights = [_weight_owners(gm, branch.body | branch.gone) for branch in branches]
    macs = analyze(gm).survivors(None, partial=True).cost.per_node if branches else {}
    readers = _readers(gm)
    taken, names = set(removed), list[str]()
    for k, branch in enumerate(branches):
        inner = [weights[j] for j, other in enumerate(branches) if j != k and _is_in(other, branch)]
        names.append(_unique(_path(_own(weights[k], inner)) or branch.total.name, taken))
    order = {node: k for k, node in enumerate(gm.graph.nodes)}
    found: list[Block] = []
    for name, branch in zip(names, branches, strict=True):
        around = [
            (len(b.gone | b.body), n) for n, b in zip(names, branches, strict=True) if b is not branch and _is_in(branch, b)
        ]
        own, shared = _parameters(gm, branch, readers)
        found.append(
            Block(
                name,
                _layer(name),
                branch.total.name,
                branch.root.name,
                branch.value.name,
                branch.stream.name,
                tuple(node.name for node in sorted(branch.gone, key=order.__getitem__)),
                tuple(own),
                shared,
                sum(macs.get(node.name, 0) for node in branch.gone),
                sum(own.values()),
                min(around)[1] if around else None,
                branch.reason,
                branch.written,
            )
        )
    return tuple(found)


def _is_in(one: Branch, other: Branch) -> bool:
    return one.total in other.gone or one.total in other.body


def _weight_owners(gm: fx.GraphModule, nodes: Iterable[fx.Node]) -> dict[str, str]:
    """The module of every parameter that the nodes, or stored tensors that they read, hold, by the parameter's name; matrices and
    kernels alone if there are any."""
    found: dict[str, nn.Parameter] = {}
    stored = {each for node in nodes for each in node.all_input_nodes if each.op == "get_attr"}
    for node in {*nodes, *stored}:
        if node.op == "get_attr":
            tensor = fetch(gm, str(node.target))
            if isinstance(tensor, nn.Parameter):
                found[str(node.target)] = tensor
        elif node.op == "call_module":
            found.update({f"{node.target}.{name}": p for name, p in fetch(gm, str(node.target)).named_parameters()})
    large = {name: p for name, p in found.items() if p.dim() > 1} or found
    return {name: name.rpartition(".")[0] or name for name in large}


def _own(weights: Mapping[str, str], inner: Sequence[Mapping[str, str]]) -> list[str]:
    own = [owner for name, owner in weights.items() if not any(name in each for each in inner)]
    return own or list(weights.values())


def _path(owners: Sequence[str]) -> str:
    """The common beginning of paths; the first and the last of them if they have none."""
    paths = sorted({tuple(owner.split(".")) for owner in owners})
    if not paths:
        return ""
    first, last = paths[0], paths[-1]  # in between, sorted, is what begins alike
    length = next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return ".".join(first[:length]) or f"{'.'.join(paths[0])}-{'.'.join(paths[-1])}"


def _unique(path: str, taken: set[str]) -> str:
    number, name = 1, path
    while name in taken:
        number += 1
        name = f"{path}#{number}"
    taken.add(name)
    return name


def _layer(name: str) -> str:
    atoms = name.split("#")[0].split(".")
    last = max((k for k, atom in enumerate(atoms) if atom.isdigit()), default=len(atoms) - 1)
    return ".".join(atoms[: last + 1])


def _readers(gm: fx.GraphModule) -> dict[int, set[fx.Node]]:
    """Who reads a parameter, by the parameter's ``id``."""
    found: dict[int, set[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            value = fetch(gm, str(node.target))
            for each in value.parameters() if isinstance(value, nn.Module) else (value,):
                found.setdefault(id(each), set()).add(node)
    return found


def _parameters(
    gm: fx.GraphModule, branch: Branch, readers: Mapping[int, set[fx.Node]]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """The parameters that nobody else reads, with their sizes, and those that others read too."""
    own: dict[str, int] = {}
    shared: list[str] = []
    for name, parameter in gm.named_parameters():
        read = readers.get(id(parameter), set())
        if read & branch.gone and not is_mask_buffer(name):
            if read <= branch.gone:
                own[name] = parameter.numel()
            else:
                shared.append(name)
    return own, tuple(shared)
