"""The dependency graph as a picture: which layers lose channels together."""

from __future__ import annotations

import pathlib
import shutil
from typing import TYPE_CHECKING

import networkx as nx
import pydot

from stp_fx.errors import InputError

if TYPE_CHECKING:
    from stp_fx.analysis.graph import ChannelGraph

__all__ = ["axis_graph", "draw"]

_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#edc948", "#9c755f", "#ff9da7", "#bab0ac")


def axis_graph(graph: ChannelGraph) -> nx.MultiDiGraph:
    """Modules that hold weights, and an edge for every group from each module whose outputs it cuts to each whose inputs.

    Nodes carry ``label``; edges ``group`` (its name), ``units`` and ``exact``.
    """
    result = nx.MultiDiGraph()
    for group in graph.groups:
        weights = [m for m in group.members if m.axis.role == "weight"]
        sources = dict.fromkeys(_module(m.axis.tensor) for m in weights if m.axis.side in ("out", "both"))
        targets = dict.fromkeys(_module(m.axis.tensor) for m in weights if m.axis.side in ("in", "both"))
        for name in (*sources, *targets):
            result.add_node(name, label=name)
        for source in sources:
            for target in targets:
                if source != target:
                    result.add_edge(source, target, group=group.name, units=group.size, exact=group.exact)
    return result


def draw(graph: ChannelGraph, path: str | pathlib.Path, view: str = "dependency") -> pathlib.Path:
    """Writes the picture; the suffix says how: ``.dot`` as text, ``.png``, ``.svg`` or ``.pdf`` through Graphviz.

    Without Graphviz's ``dot`` on the machine the text goes beside it and the path of that is returned.

    Raises:
        InputError: an unknown view or suffix.
    """
    if view != "dependency":
        raise InputError(f"unknown view {view!r}; known: 'dependency'")
    path = pathlib.Path(path)
    suffix = path.suffix.lstrip(".")
    if suffix not in ("dot", "png", "svg", "pdf"):
        raise InputError(f"cannot draw {path.name!r}: the suffix must be .dot, .png, .svg or .pdf")
    picture = _picture(graph)
    if suffix == "dot" or shutil.which("dot") is None:
        text = path.with_suffix(".dot")
        text.write_text(picture.to_string(), encoding="utf-8")
        return text
    picture.write(str(path), format=suffix)
    return path


def _picture(graph: ChannelGraph) -> pydot.Dot:
    picture = pydot.Dot("dependency", graph_type="digraph", rankdir="TB", fontname="Helvetica", strict=True)
    axes = axis_graph(graph)
    order = {group.name: k for k, group in enumerate(graph.groups)}
    for name in axes.nodes:
        picture.add_node(pydot.Node(_quoted(name), label=_quoted(name), shape="box", style="rounded", fontname="Helvetica"))
    for source, target, data in axes.edges(data=True):
        colour = _COLOURS[order[data["group"]] % len(_COLOURS)]
        style = "solid" if data["exact"] else "dashed"
        label = str(data["units"])
        picture.add_edge(
            pydot.Edge(
                _quoted(source), _quoted(target), label=label, color=colour, fontcolor=colour, style=style, fontname="Helvetica"
            )
        )
    return picture


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0] or tensor


def _quoted(text: str) -> str:
    return '"' + text.replace('"', "'") + '"'
