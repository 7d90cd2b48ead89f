"""The network as DOT text and, through Graphviz, as a picture.

Every view hands all nodes and all edges to Graphviz and only makes those of the other views invisible. So all views have one
layout, wherever the text is laid out.
"""

from __future__ import annotations

import html
import pathlib
import shutil
import subprocess
import warnings
from typing import TYPE_CHECKING, Any

from stp_fx.checks import is_choice, shown
from stp_fx.errors import InputError
from stp_fx.paths import path_of, replacing
from stp_fx.views.drawing import Drawing
from stp_fx.views.network import FOLDED, KINDS, network

if TYPE_CHECKING:
    import networkx as nx  # at run time only where a picture is made
    import pydot

__all__ = ["dot_text", "draw", "quoted", "svg"]

_VIEWS = {"computational": ("flow",), "dependency": ("direct", "forced"), "combined": ("flow", "direct", "forced")}
_SUFFIXES = ("dot", "png", "svg", "pdf")
_EDGES: dict[str, dict[str, Any]] = {
    "flow": {"color": "#888888"},
    "direct": {"color": "#1f4e9c", "penwidth": 2},
    "forced": {"color": "#c0392b", "penwidth": 2, "style": "dashed", "dir": "none", "constraint": "false"},
}
_INSIDE = 3
"""Lines about groups inside of a folded module."""
_MEANING = {"flow": "data flow", "direct": "direct coupling", "forced": "forced shape match (dashed)"}


def draw(drawing: Drawing, path: str | pathlib.Path, view: str = "dependency", fold: int | None = None) -> pathlib.Path:
    """See :meth:`ChannelGraph.draw`."""
    path = pathlib.Path(path_of(path))
    suffix = path.suffix.lstrip(".")
    if suffix not in _SUFFIXES:
        raise InputError(f"cannot draw {path.name!r}: the suffix must be .dot, .png, .svg or .pdf")
    text = dot_text(drawing, view, fold)
    if suffix != "dot" and shutil.which("dot") is not None:
        return _written(path, _run(text, suffix))
    if suffix != "dot":
        warnings.warn(
            f"Graphviz's `dot` is not on this machine, so {path.with_suffix('.dot')} was written in place of {path.name}: "
            "`apt-get install graphviz`, `brew install graphviz` or `conda install graphviz`, then draw again",
            stacklevel=3,
        )
    return _written(path.with_suffix(".dot"), text.encode())


def _written(path: pathlib.Path, content: bytes) -> pathlib.Path:
    with replacing(str(path)) as partial:
        pathlib.Path(partial).write_bytes(content)
    return path


def svg(drawing: Drawing) -> str | None:
    """The dependency view as SVG; None without Graphviz."""
    return None if shutil.which("dot") is None else _run(dot_text(drawing, "dependency"), "svg").decode()


def dot_text(drawing: Drawing, view: str = "dependency", fold: int | None = None) -> str:
    """The picture as DOT.

    Raises:
        InputError: an unknown view, or a negative ``fold``.
    """
    if not is_choice(view, _VIEWS):
        raise InputError(f"unknown view {shown(view)}; known: {', '.join(map(repr, _VIEWS))}")
    import networkx as nx
    import pydot

    nodes = network(drawing, fold)
    relations = _VIEWS[view]
    picture = pydot.Dot("channels", graph_type="digraph", fontname="Helvetica", nodesep="0.3", ranksep="0.3", newrank="true")
    picture.set("label", _legend(nodes, relations))
    handles = {name: f"n{k}" for k, name in enumerate(nodes.nodes)}
    flow = nx.DiGraph((s, t) for s, t, relation in nodes.edges(keys=True) if relation == "flow")
    flow.add_nodes_from(nodes)
    homes: dict[int | None, list[str]] = {}
    for name, data in nodes.nodes(data=True):
        homes.setdefault(data["home"], []).append(name)
    for home, names in homes.items():
        inner: Any = picture
        if home is not None and len(names) > 1:
            group, units = drawing.groups[home][0], _units(drawing, home)
            # Edges come in through the caption's line: the caption stands between two of them, or right of one, with as much
            # room to its left as it takes itself (a blank is half as wide as a letter).
            entries = [name for name in names if flow.pred[name] and not nx.ancestors(flow, name) & set(names)]
            room = "\u00a0" * (6 + 2 * max(len(group), len(units))) if len(entries) < 2 else ""
            caption = quoted(f"{room}{group}\n{room}{units}")
            look: dict[str, Any] = {"color": "#999999", "style": "rounded", "fontsize": "10", "fontname": "Helvetica"}
            inner = pydot.Cluster(f"group{home}", label=caption, labeljust="r" if len(entries) < 2 else "c", **look)
            picture.add_subgraph(inner)
        for name in names:
            inner.add_node(_node(drawing, handles[name], nodes.nodes[name], alone=inner is picture))
    for source, target, data in nodes.edges(data=True):
        style = _EDGES[data["relation"]] | ({} if data["relation"] in relations else {"style": "invis"})
        look = {key: quoted(str(value)) for key, value in style.items()}
        picture.add_edge(pydot.Edge(handles[source], handles[target], **look))
    return picture.to_string()


def _units(drawing: Drawing, group: int) -> str:
    """How many units a group has, and the share that the plan removes."""
    removed = f", {drawing.removed[group]:.0%} removed" if drawing.removed else ""
    return f"{drawing.groups[group][1]} units{removed}"


def _captions(drawing: Drawing, data: dict[str, Any], alone: bool) -> list[str]:
    """Lines about groups that have no frame: the one that a box without a frame makes, and those inside of a folded module."""
    title, *_ = data["label"].split("\n")
    here = set() if data["home"] is None else {data["home"]}
    lines = []
    for group in sorted(here if alone else set()):
        name = drawing.groups[group][0]
        own = name.partition(":")[0].rpartition(".")[0] == title
        lines.append(_units(drawing, group) if own else f"{name}: {_units(drawing, group)}")
    inside = [group for group in data["inside"] if group not in here] if data["kind"] == FOLDED else []
    shown = inside if len(inside) <= _INSIDE else inside[: _INSIDE - 1]
    lines += [f"{drawing.groups[k][0].removeprefix(title + '.')}: {_units(drawing, k)}" for k in shown]
    return [*lines, f"and {len(inside) - len(shown)} more groups"] if len(shown) < len(inside) else lines


def _node(drawing: Drawing, handle: str, data: dict[str, Any], alone: bool) -> pydot.Node:
    import pydot

    names = ", ".join(drawing.groups[k][0] for k in sorted(data["groups"]))
    several = "2" if len(data["groups"]) > 1 else "1"
    look: dict[str, Any] = {
        "shape": "box",
        "style": "filled",
        "fillcolor": quoted(KINDS[data["kind"]][0]),
        "fontname": "Helvetica",
    }
    return pydot.Node(
        handle,
        label=quoted("\n".join([data["label"], *_captions(drawing, data, alone)])),
        peripheries=several,
        tooltip=quoted(names or "no group"),
        **look,
    )


def _legend(nodes: nx.MultiDiGraph, shown: tuple[str, ...]) -> str:
    present = {data["kind"] for _, data in nodes.nodes(data=True)}
    cells = [f'<TD BGCOLOR="{colour}">{html.escape(kind)}</TD>' for kind, (colour, _) in KINDS.items() if kind in present]
    # Entries that a view does not show are white, not absent: the legend's width moves the nodes.
    colours = {relation: look["color"] if relation in shown else "#ffffff" for relation, look in _EDGES.items()}
    lines = [f'<TD COLOR="{c}"><FONT COLOR="{c}">{_MEANING[relation]}</FONT></TD>' for relation, c in colours.items()]
    lines.append("<TD>double border: in several groups</TD>")
    rows = [cells[:5], cells[5:], lines]
    table = "".join(f"<TR>{''.join(row)}</TR>" for row in rows if row)
    return f'<<TABLE BORDER="0" CELLBORDER="1" CELLSPACING="4">{table}</TABLE>>'


def quoted(text: str) -> str:
    """A DOT string that holds the text, whatever is in it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _run(text: str, suffix: str) -> bytes:
    done = subprocess.run(["dot", f"-T{suffix}"], input=text.encode(), capture_output=True, check=False)
    if done.returncode:
        raise InputError(f"Graphviz could not draw the graph: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout
