"""LayerNorm as RMSNorm: everything that writes into a stream is centred, so that there is no mean left to subtract.

``P = I - 1 1^T / C`` takes the mean over channels away. LayerNorm of x is RMSNorm of P x, and what writes into a stream is
linear in stored tensors, so P moves into them (Ashkboos et al., "SliceGPT", arXiv 2401.15024, section 3.1).
"""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn import functional as F

from stp_fx.analysis.carriers import Carrier
from stp_fx.analysis.norm_calls import NormCall
from stp_fx.ir.memo import forget
from stp_fx.ir.shapes import fetch
from stp_fx.rewrite.basis.probe import Change, Probe, applied, same
from stp_fx.rewrite.basis.streams import Stream, Touched
from stp_fx.rewrite.basis.write import write_tensors

__all__ = ["centre", "to_rms_norm"]


def centre(gm: fx.GraphModule, stream: Stream, probe: Probe) -> list[str]:
    """Centres what writes into ``stream`` and makes its LayerNorms RMSNorms, in place; their affine parts have been folded.
    Gives the nodes of these norms.

    Raises:
        NothingToRotateError: something reads the mean that a LayerNorm takes away; nothing has been changed.
    """
    touched = Touched(probe, stream.units)
    matrix = torch.eye(stream.size, dtype=torch.float64) - 1.0 / stream.size

    def change(tensor: torch.Tensor, carriers: tuple[Carrier, ...]) -> torch.Tensor:
        return applied(tensor, carriers, matrix)

    layer_norms = {norm.node: norm for norm in stream.norms if norm.kind == "layer"}
    centred: set[fx.Node] = set()
    for node in touched.nodes():
        if not _survives(touched, node, change, centred, layer_norms.get(node)):
            raise touched.refused(
                node, "writes into or reads the channels as no linear layer or LayerNorm does, so their mean cannot be taken away"
            )
    write_tensors(gm, touched, change)
    for norm in layer_norms.values():
        to_rms_norm(gm, norm)
    gm.recompile()
    return [norm.node.name for norm in layer_norms.values()]


def _survives(touched: Touched, node: fx.Node, change: Change, centred: set[fx.Node], norm: NormCall | None) -> bool:
    """Whether a node gives centred channels for centred ones, or what it gave before where it has none.

    ``centred`` are the nodes whose values have no mean in the original either; the node is added if it is one.
    """
    probe = touched.probe
    old = {n: touched.drawn(n) for n in node.all_input_nodes}
    old = {n: touched.changed(n, v, change) if n in centred else v for n, v in old.items()}
    new = {n: touched.changed(n, v, change) for n, v in old.items()}
    before = probe.run(node, old, {})
    if norm is not None:
        after = F.rms_norm(new[norm.value], (new[norm.value].shape[-1],), None, norm.eps)
    else:
        tensors = {name: change(probe.tensors[name].detach(), touched.axes[name]) for name in touched.stored(node)}
        after = probe.run(node, new, tensors)
    if not same(touched.changed(node, before, change), after):
        return False
    operands = [n for n in node.all_input_nodes if touched.has(n) and n.op != "get_attr"]
    if norm is not None or (touched.has(node) and operands and all(n in centred for n in operands)):
        centred.add(node)
    return True


def to_rms_norm(gm: fx.GraphModule, norm: NormCall) -> None:
    """Makes a LayerNorm without shift an RMSNorm under the same name, in place."""
    node = norm.node
    if node.op == "call_module":
        old = fetch(gm, str(node.target))
        if isinstance(old, nn.RMSNorm):  # another call of the same module
            return
        new = nn.RMSNorm(old.normalized_shape, norm.eps, old.weight is not None, device="meta").train(old.training)
        if old.weight is not None:
            new.weight = old.weight
        gm.set_submodule(str(node.target), new)
        forget(gm)
        return
    weight = (
        None if norm.weight is None else next(n for n in node.all_input_nodes if n.op == "get_attr" and n.target == norm.weight)
    )
    size = node.args[1] if len(node.args) > 1 else node.kwargs["normalized_shape"]
    node.target = F.rms_norm
    node.args, node.kwargs = (norm.value, size, weight, norm.eps), {}
    _forget(gm, norm.bias)


def _forget(gm: fx.GraphModule, name: str | None) -> None:
    """Takes a parameter that no call reads any more out of the graph."""
    if name is None:
        return
    for node in [n for n in gm.graph.nodes if n.op == "get_attr" and n.target == name and not n.users]:
        gm.graph.erase_node(node)
    if not any(n.op == "get_attr" and n.target == name for n in gm.graph.nodes):
        owner, _, own = name.rpartition(".")
        delattr(fetch(gm, owner) if owner else gm, own)
