"""The one node runner: every kind of node, nested operands, defaults; it gives what ``fx.Interpreter`` gives."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from stp_fx.ir.runner import call, operands, run_graph, run_node


class Every(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> dict[str, object]:
        both = torch.cat([self.line(x) * self.scale, x.mul(other=self.scale)], dim=1)
        return {"both": [both[:, 1 : both.size(1)], (x, 3)]}


@pytest.fixture
def gm() -> fx.GraphModule:
    return fx.symbolic_trace(Every())


def test_it_gives_what_an_interpreter_gives(gm: fx.GraphModule) -> None:
    x = torch.randn(2, 4)
    found, expected = run_graph(gm.graph, gm, [x]), fx.Interpreter(gm).run(x)
    assert torch.equal(found["both"][0], expected["both"][0])
    assert found["both"][1] == expected["both"][1]


def test_values_may_be_anything(gm: fx.GraphModule) -> None:
    cat = next(node for node in gm.graph.nodes if node.target is torch.cat)
    args, kwargs = operands(cat, lambda node: node.name)
    assert list(args[0]) == ["mul", "mul_1"]
    assert kwargs == {"dim": 1}
    with pytest.raises(ValueError, match="no operands"):
        call(next(iter(gm.graph.nodes)), (), {}, gm.get_submodule)


def test_modules_may_be_replaced(gm: fx.GraphModule) -> None:
    line = next(node for node in gm.graph.nodes if node.op == "call_module")
    assert run_node(line, lambda node: 5, gm, module_of=lambda path: lambda value: (path, value)) == ("line", 5)
