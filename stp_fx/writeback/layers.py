"""Layers that are removed as a whole: a model without them, and a graph under the names that its tensors have there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import fx, nn

from stp_fx.analysis.plan import PrunePlan
from stp_fx.errors import WriteBackError
from stp_fx.ir.provenance import provenance_of, with_provenance
from stp_fx.rewrite.slicing import copied
from stp_fx.text import listed
from stp_fx.writeback.tensors import is_number, tensors_of

__all__ = ["Layers", "removed_layers", "with_names", "without_layers"]


@dataclasses.dataclass(frozen=True)
class Layers:
    """A ``ModuleList`` or ``Sequential``: its path, the names of its entries, and the positions of those that stay."""

    path: str
    names: tuple[str, ...]
    kept: tuple[int, ...]

    @property
    def renamed(self) -> dict[str, str]:
        """The new names of the entries that stay. Names that are no positions stay."""
        if self.names != tuple(map(str, range(len(self.names)))):
            return {self.names[k]: self.names[k] for k in self.kept}
        return {self.names[old]: str(new) for new, old in enumerate(self.kept)}


def removed_layers(pruned: fx.GraphModule, model: nn.Module) -> tuple[Layers, ...]:
    """The containers of ``model`` with entries that the graph has no parameter of, since their blocks are removed.

    Raises:
        WriteBackError: a block is removed from a layer that keeps others: the class's code computes it.
    """
    plan = provenance_of(pruned).plan
    blocks = () if plan is None else plan.blocks
    left = set(tensors_of(pruned))
    gone: dict[str, set[str]] = {}
    partial: list[str] = []
    for block in blocks:
        entry = _entry(block.partition("#")[0], model, left)
        if entry is None:
            partial.append(block)
        else:
            gone.setdefault(entry[0], set()).add(entry[1])
    if partial:
        raise _refusal(partial, model, left)
    found: list[Layers] = []
    for path, entries in gone.items():
        names = tuple(model.get_submodule(path)._modules)
        found.append(Layers(path, names, tuple(k for k, name in enumerate(names) if name not in entries)))
    return tuple(found)


def _refusal(blocks: Sequence[str], model: nn.Module, left: set[str]) -> WriteBackError:
    """Why blocks cannot be removed from a class, with a parameter that stays in the layer of the first one."""
    layer = blocks[0].partition("#")[0].split(".")
    last = max((k for k, atom in enumerate(layer) if atom.isdecimal()), default=len(layer) - 1)
    path = ".".join(layer[: last + 1])
    stays = next((name for name in tensors_of(model) if name.startswith(f"{path}.") and name in left), None)
    why = f", such as {stays!r}" if stays else ""
    return WriteBackError(
        f"{type(model).__name__} computes blocks that the graph is without: {listed(blocks, 6)}. The class can be without whole "
        f"entries of a ModuleList or Sequential only, and other parts of these layers stay{why}. Remove all blocks of such a "
        "layer (a path such as 'layers.3' names them; a layer that ends in a norm keeps it), or go on with the GraphModule, "
        "which trains, saves and exports as any other",
        tuple(f"block {name}" for name in blocks),
    )


def _entry(block: str, model: nn.Module, left: set[str]) -> tuple[str, str] | None:
    """The container and the name of the outermost entry around a block that the graph has no parameter of."""
    atoms = block.split(".")
    for end in range(len(atoms)):
        path = ".".join(atoms[:end])
        try:
            owner = model.get_submodule(path)
            entry = owner.get_submodule(atoms[end])
        except AttributeError:
            return None
        if isinstance(owner, (nn.ModuleList, nn.Sequential)):
            names = [".".join([*atoms[: end + 1], name]) for name, _ in entry.named_parameters(remove_duplicate=False)]
            if names and left.isdisjoint(names):
                return path, atoms[end]
    return None


def without_layers(model: nn.Module, layers: Sequence[Layers]) -> nn.Module:
    """A copy of ``model``, which shares its tensors, without the entries that are removed; indices of entries are renewed."""
    result = copied(model, {id(tensor): tensor for tensor in tensors_of(model).values()})
    indices = [(each, _index_attributes(model, each)) for each in layers]
    for each, attributes in indices:
        container = result.get_submodule(each.path)
        for new, old in enumerate(each.kept):
            entry = container.get_submodule(each.names[old])
            for path, part in entry.named_modules():
                for name, value in list(vars(part).items()):
                    if (path, name) in attributes and value == old:
                        vars(part)[name] = new
    _renamed_entries(result, {each.path: each.renamed for each in layers})
    for each in layers:
        owner = result.get_submodule(each.path.rpartition(".")[0])
        if isinstance(owner, (nn.TransformerEncoder, nn.TransformerDecoder)):
            owner.num_layers = len(each.kept)
    return result


def _index_attributes(model: nn.Module, layers: Layers) -> set[tuple[str, str]]:
    """The attributes below the entries that hold the position of their entry, in each of two entries or more that have them."""
    found: dict[tuple[str, str], list[bool]] = {}
    container = model.get_submodule(layers.path)
    for position, name in enumerate(layers.names):
        for path, part in container.get_submodule(name).named_modules():
            for key, value in vars(part).items():
                if is_number(value):
                    found.setdefault((path, key), []).append(value == position)
    return {key for key, equal in found.items() if len(equal) > 1 and all(equal)}


def _renamed_entries(root: nn.Module, maps: Mapping[str, Mapping[str, str]]) -> None:
    """Renames the entries of containers, and takes out those without a name; inner containers first, by the paths of before."""
    for path in sorted(maps, key=lambda path: -len(path.split(".")) if path else 0):
        try:
            container = root.get_submodule(path)
        except AttributeError:  # a graph without any entry
            continue
        names = maps[path]
        container._modules = {names[old]: part for old, part in container._modules.items() if old in names}


def with_names(pruned: fx.GraphModule, layers: Sequence[Layers]) -> fx.GraphModule:
    """A copy of a graph, which shares its tensors, under the names that :func:`without_layers` gives; its plan has no blocks."""
    if not layers:
        return pruned
    result = copied(pruned, {id(tensor): tensor for tensor in tensors_of(pruned).values()})
    # a call without parameters may be left of a removed entry: the activation behind its sum
    maps = {each.path: {**{name: f"left_of_{name}" for name in each.names}, **each.renamed} for each in layers}
    for node in result.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            node.target = _renamed(str(node.target), maps)
    _renamed_entries(result, maps)
    result.graph.lint()
    result.recompile()
    known = provenance_of(pruned)
    plan = known.plan
    kept = {(_renamed(name, maps), dim): value for (name, dim), value in plan.kept.items()}
    sizes = {(_renamed(name, maps), dim): value for (name, dim), value in plan.sizes.items()}
    added = tuple(_renamed(name, maps) for name in known.added)
    return with_provenance(result, plan=PrunePlan(kept, sizes), added=added)


def _renamed(target: str, maps: Mapping[str, Mapping[str, str]]) -> str:
    atoms = target.split(".")
    new = [maps.get(".".join(atoms[:k]), {}).get(atom, atom) for k, atom in enumerate(atoms)]
    return ".".join(new)
