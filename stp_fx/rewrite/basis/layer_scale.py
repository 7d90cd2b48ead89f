"""A layer scale, moved into the contraction before it: ``s (W x + b) = (diag(s) W) x + s b``."""

from __future__ import annotations

import torch
from torch import fx

from stp_fx.analysis.carriers import Carrier
from stp_fx.rewrite.basis.probe import Probe, on_blocks, same
from stp_fx.rewrite.basis.streams import Stream, Touched
from stp_fx.rewrite.basis.ties import readers_of

__all__ = ["fold_layer_scales"]


def fold_layer_scales(gm: fx.GraphModule, stream: Stream, probe: Probe) -> bool:
    """Moves the scales that multiply what is written into ``stream`` into its writers, in place; False if there are none.

    Raises:
        NothingToRotateError: a scale whose writer cannot take it; ``gm`` may be half-done, so give a copy.
    """
    touched = Touched(probe, stream.units)
    names = {axis.tensor for axis in touched.graph.axes if axis.role == "scale"}
    norms = {norm.node for norm in stream.norms}
    folded = False
    for node in touched.nodes():
        if node in norms or node.op == "call_module":
            continue
        scales = [n for n in node.all_input_nodes if n.op == "get_attr" and touched.graph.first_name(str(n.target)) in names]
        values = [n for n in node.all_input_nodes if n not in scales and touched.has(n)]
        if len(scales) != 1 or len(values) != 1 or not touched.has(scales[0]):
            continue
        parameter = gm.get_parameter(str(scales[0].target))
        if bool((parameter == parameter.flatten()[0]).all()):
            continue
        _Fold(gm, touched, node, scales[0]).run(values[0])
        folded = True
    return folded


class _Fold:
    def __init__(self, gm: fx.GraphModule, touched: Touched, node: fx.Node, scale: fx.Node) -> None:
        self.gm, self.touched, self.node, self.scale = gm, touched, node, scale
        self.name = str(scale.target)
        self.vector = touched.probe.tensors[self.name].detach().flatten()

    def run(self, value: fx.Node) -> None:
        """Follows the value up to its writer, and scales that."""
        if len(readers_of(self.gm, self.name)) != 1 or self.vector.numel() != len(self.touched.units):
            raise self.touched.refused(self.node, "multiplies the channels by a scale that others read as well")
        user = self.node
        while True:
            if set(value.users) != {user} and not self._only_sizes(value, user):
                raise self.touched.refused(user, f"is scaled by '{self.name}' after others have read it as it was")
            if value.op == "placeholder" or not self._commutes(value):
                raise self.touched.refused(value, f"stands between a contraction and the scale '{self.name}'")
            if self.touched.stored(value) or any(i.op == "get_attr" and self.touched.has(i) for i in value.all_input_nodes):
                break
            (before,) = [n for n in value.all_input_nodes if self.touched.has(n)]
            value, user = before, value
        self._write(value)

    def _only_sizes(self, value: fx.Node, user: fx.Node) -> bool:
        return all(each is user or (not self.touched.has(each) and each.op != "call_module") for each in value.users)

    def change(self, tensor: torch.Tensor, carriers: tuple[Carrier, ...]) -> torch.Tensor:
        """``tensor`` with its channels scaled."""
        return on_blocks(tensor, carriers, lambda x: x * self.vector.to(x))

    def _commutes(self, node: fx.Node) -> bool:
        touched = self.touched
        if len([n for n in node.all_input_nodes if touched.has(n) and n.op != "get_attr"]) > 1:
            return False
        drawn = {n: touched.drawn(n) for n in node.all_input_nodes}
        new = {n: touched.changed(n, v, self.change) for n, v in drawn.items()}
        tensors = {name: self.change(touched.probe.tensors[name].detach(), touched.axes[name]) for name in touched.stored(node)}
        run = touched.probe.run
        return same(touched.changed(node, run(node, drawn, {}), self.change), run(node, new, tensors))

    def _write(self, writer: fx.Node) -> None:
        touched = self.touched
        names = [*touched.stored(writer), *(n for i in writer.all_input_nodes if i.op == "get_attr" for n in touched.stored(i))]
        with torch.no_grad():
            for name in names:
                if set(readers_of(self.gm, name)) != {writer}:
                    raise touched.refused(writer, f"shares '{name}' with others, so it cannot take the scale '{self.name}'")
                parameter = self.gm.get_parameter(name)
                parameter.copy_(self.change(touched.probe.tensors[name].detach(), touched.axes[name]).to(parameter))
            self.gm.get_parameter(self.name).fill_(1.0)
