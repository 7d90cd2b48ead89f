"""What a graph does is what its model does: values, buffers, gradients, inputs that change, modes; or the capture is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from export_cases import CASES, Case
from torch import fx, nn
from torch.utils import _pytree as pytree

import stp_fx
from stp_fx.errors import TraceError
from stp_fx.ir.example import bound_arguments

MODES = (None, False, True)
"""As it was captured, and after ``.eval()`` and ``.train()``."""


def made(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.build().double()


def captured(case: Case, model: nn.Module, frontend: str) -> fx.GraphModule:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return stp_fx.trace(model, case.inputs(4), kwargs=case.kwargs, frontend=frontend, validate=False)


def observed(module: nn.Module, model: nn.Module, case: Case, batch: int) -> dict[str, Any]:
    """All that can be seen of one call."""
    torch.manual_seed(2)
    given = pytree.tree_map_only(
        torch.Tensor, lambda t: t.requires_grad_(t.is_floating_point()), (case.inputs(batch), dict(case.kwargs))
    )
    leaves = [t for t in pytree.tree_leaves(given) if isinstance(t, torch.Tensor)]
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.clone() if t.is_floating_point() else t, given)
    if module is not model:
        arguments = bound_arguments(model, args, kwargs)
        call = [arguments[str(node.target)] for node in module.graph.nodes if node.op == "placeholder"]
        torch.manual_seed(3)
        output = module(*call)
    else:
        torch.manual_seed(3)
        output = module(*args, **kwargs)
    inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    flat, spec = pytree.tree_flatten(output)
    tensors = [t for t in flat if isinstance(t, torch.Tensor)]
    pointers = {t.data_ptr(): k for k, t in enumerate(inputs)}
    first = {}
    aliases = [(pointers.get(t.data_ptr()), first.setdefault(t.data_ptr(), k)) for k, t in enumerate(tensors)]
    loss: Any = sum((t * torch.linspace(1, 2, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in tensors if t.requires_grad)
    if isinstance(loss, torch.Tensor):
        loss.backward()
    found = {
        "structure": spec,
        "values": [v.detach().clone() if isinstance(v, torch.Tensor) else v for v in flat],
        "requires_grad": [t.requires_grad for t in tensors],
        "aliases": aliases,
        "inputs": [t.detach().clone() for t in inputs],
        "gradients of inputs": [t.grad for t in leaves],
        "gradients": {name: _dense(p.grad) for name, p in module.named_parameters()},
        "layouts": {name: p.grad.layout for name, p in module.named_parameters() if p.grad is not None},
        "state": {k: v.clone() for k, v in module.state_dict().items()},
    }
    for parameter in module.parameters():
        parameter.grad = None
    return found


def _dense(grad: torch.Tensor | None) -> torch.Tensor | None:
    return None if grad is None else grad.to_dense()


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    wrong = []
    for key, value in expected.items():
        if isinstance(value, dict):
            value = {k: value[k] for k in sorted(value) if value[k] is not None}
            got = {k: found[key][k] for k in sorted(found[key]) if found[key][k] is not None}
        else:
            got = found[key]
        ours, theirs = pytree.tree_flatten(got), pytree.tree_flatten(value)
        if ours[1] != theirs[1] or not all(map(_same, ours[0], theirs[0])):
            wrong.append(f"{key}: {got} for {value}"[:400])
    return wrong


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.allclose(one, other, rtol=1e-9, atol=1e-9)
    return type(one) is type(other) and bool(one == other)


@pytest.mark.parametrize("frontend", ["export", "fx"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_graph_does_what_its_model_does(case: Case, frontend: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = made(case)
    order = (list(model.state_dict()), [name for name, _ in model.named_parameters()])
    before = (copy.deepcopy(model.state_dict()), [m.training for m in model.modules()], [list(vars(m)) for m in model.modules()])
    capfd.readouterr()
    refusal = case.refused.get(frontend)
    if refusal is not None:
        with pytest.raises(TraceError, match=refusal):
            captured(case, model, frontend)
        return
    gm = captured(case, model, frontend)
    assert capfd.readouterr() == ("", "")
    after = (model.state_dict(), [m.training for m in model.modules()], [list(vars(m)) for m in model.modules()])
    assert after[1:] == before[1:]
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    if frontend == "export":
        assert ([n for n in gm.state_dict() if n in order[0]], [n for n, _ in gm.named_parameters()]) == order
    found = []
    for mode in MODES:
        theirs, ours = copy.deepcopy(model), copy.deepcopy(gm)
        for module in (theirs, ours):
            if mode is not None:
                module.train(mode)
        for call, batch in enumerate((4, 4, 6)):
            expected = observed(theirs, theirs, case, batch)
            name = {None: "as it is", True: "in train mode", False: "in eval mode"}[mode]
            found += [f"{name}, call {call}: {text}" for text in differences(observed(ours, theirs, case, batch), expected)]
    if found and case.wrong == frontend:
        pytest.xfail(found[0])
    assert not found, "\n".join([*found[:6], gm.code])


@pytest.mark.parametrize("frontend", ["export", "fx"])
def test_operators_that_write_are_pinned_and_named(frontend: str) -> None:
    case = next(case for case in CASES if case.name == "custom operators that write")
    graph = stp_fx.analyze(captured(case, made(case), frontend))
    assert set(graph.unknown) == {"stp_fx_cases.bump.default", "stp_fx_cases.note.default"}
    assert "no rule for stp_fx_cases" in graph.explain("a.weight")
    assert not graph.groups


@pytest.mark.parametrize("training", [False, True])
def test_what_is_exported_is_pruned_as_what_is_traced(training: bool) -> None:
    """Kept modules are those of the model, and the analysis knows them."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout2d(0.1), nn.Conv2d(8, 6, 3), nn.InstanceNorm2d(6), nn.Flatten(2)
    ).train(training)
    model.append(nn.LSTM(9, 6, batch_first=True))
    groups = []
    for frontend in ("export", "fx"):
        graph = stp_fx.analyze(stp_fx.trace(model, torch.randn(4, 3, 7, 7), frontend=frontend, validate=False))
        groups.append(sorted((g.name, g.size) for g in graph.groups))
    assert groups[0] == groups[1]
    assert groups[0]
