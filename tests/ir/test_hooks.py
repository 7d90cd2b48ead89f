"""Forward hooks of the captured model run in the graph, as those of its submodules do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import stp_fx
from stp_fx.errors import TraceError
from stp_fx.ir import provenance_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None, shift: float = 0.0) -> torch.Tensor:
        y = self.last(self.first(x).relu()) + shift
        return y if scale is None else y * scale


def scaled(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "scale": kwargs["scale"] * 3} if "scale" in kwargs else kwargs


def forward_on_the_instance(net: nn.Module) -> None:
    original = net.forward
    net.forward = lambda x, scale=None: original(x, scale) * 5  # type: ignore[method-assign]


REGISTER: dict[str, Callable[[nn.Module], Any]] = {
    "hook": lambda net: net.register_forward_hook(lambda m, args, out: out * 2),
    "hook that looks": lambda net: net.register_forward_hook(lambda m, args, out: None),
    "hook with kwargs": lambda net: net.register_forward_hook(
        lambda m, args, kwargs, out: out + args[0].sum() + len(kwargs), with_kwargs=True
    ),
    "hook that is always called": lambda net: net.register_forward_hook(lambda m, args, out: out - 1, always_call=True),
    "pre-hook": lambda net: net.register_forward_pre_hook(lambda m, args: (args[0] / 255, *args[1:])),
    "pre-hook that gives one value": lambda net: net.register_forward_pre_hook(lambda m, args: args[0] / 255),
    "pre-hook with kwargs": lambda net: net.register_forward_pre_hook(scaled, with_kwargs=True),
    "forward on the instance": forward_on_the_instance,
    "several": lambda net: [REGISTER[k](net) for k in ("pre-hook", "hook", "forward on the instance", "hook with kwargs")],
}


@pytest.mark.parametrize("register", REGISTER)
@pytest.mark.parametrize("frontend", ["fx", "export"])
@pytest.mark.parametrize("by_name", [False, True])
def test_hooks_of_the_root_run_in_the_graph(register: str, frontend: str, by_name: bool) -> None:
    net = Net().double().eval()
    REGISTER[register](net)
    x, scale = torch.randn(2, 4).double(), torch.rand(2, 3).double()
    kwargs = {"scale": scale} if by_name else {}
    gm = stp_fx.trace(net, x, kwargs=kwargs, frontend=frontend)
    assert torch.allclose(gm(x, **kwargs), net(x, **kwargs))
    one = {name: value[:1] for name, value in kwargs.items()}
    assert torch.allclose(gm(x[:1], **one), net(x[:1], **one))
    assert stp_fx.prune_graph(gm, ratio=0.5)(x, **kwargs).shape == net(x, **kwargs).shape
    assert not gm._forward_hooks
    assert not gm._forward_pre_hooks


def test_hooks_for_all_modules_run_once() -> None:
    net, seen = Net(), []
    with nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m).__name__)):
        gm = stp_fx.trace(net, torch.randn(2, 4))
        seen.clear()
        gm(torch.randn(2, 4))
    assert seen == ["Linear", "Linear", "Net"]


def test_a_hook_that_cannot_be_traced_is_named() -> None:
    def looks_at_values(module: nn.Module, args: Any, output: torch.Tensor) -> Any:
        return output * 2 if output.sum() > 0 else output

    net = Net()
    net.register_forward_hook(looks_at_values)
    with pytest.raises(TraceError, match=r"forward hook .*looks_at_values.*test_hooks\.py"):
        stp_fx.trace(net, torch.randn(2, 4))


def test_backward_hooks_of_what_is_traced_through_are_noted() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 3))
    x = torch.randn(2, 4)
    net[1].register_full_backward_hook(lambda *_: None)
    assert provenance_of(stp_fx.trace(net, x)).notes == ()
    net.register_full_backward_hook(lambda *_: None)
    net[0].register_full_backward_pre_hook(lambda *_: None)
    assert any("the model, 0" in note for note in provenance_of(stp_fx.trace(net, x)).notes)
