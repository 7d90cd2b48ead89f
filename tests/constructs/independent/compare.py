"""Calling modules and comparing what they give."""

import copy
import dataclasses

import torch
from torch.utils import _pytree as pytree


def leaves(value):
    """The leaves of nested outputs, dataclasses and objects of attributes included."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    out = []
    for leaf in pytree.tree_leaves(value):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            out.extend(leaves(leaf))
        else:
            out.append(leaf)
    return out


def tensors_of(value):
    """The tensors among the leaves."""
    return [t for t in leaves(value) if isinstance(t, torch.Tensor)]


def difference(a, b, tol=1e-9):
    """Why two outputs are not the same; empty if they are."""
    a, b = leaves(a), leaves(b)
    if len(a) != len(b):
        return f"{len(a)} outputs against {len(b)}"
    for i, (x, y) in enumerate(zip(a, b)):
        if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
            if isinstance(x, (int, float, bool, str)) and isinstance(y, (int, float, bool, str)) and x != y:
                return f"output {i}: {x!r} against {y!r}"
            continue
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"output {i}: {tuple(x.shape)} {x.dtype} against {tuple(y.shape)} {y.dtype}"
        if x.dtype == torch.bool or not (x.is_floating_point() or x.is_complex()):
            if not torch.equal(x, y):
                return f"output {i}: other integers"
            continue
        near = max(tol, 2 * torch.finfo(x.dtype).eps)  # complex parameters stay in single precision
        if not torch.allclose(
            x, y, rtol=near, atol=near * (1 + float(y.abs().nan_to_num().max() if y.numel() else 0)), equal_nan=True
        ):
            off, size = float((x - y).abs().nan_to_num(9e9).max()), float(y.abs().nan_to_num().max())
            return f"output {i}: differs by {off:.3g} of {size:.3g}"
    return ""


def fresh(graph):
    """A copy of a graph; the graph itself where torch cannot copy it."""
    try:
        copied = copy.deepcopy(graph)
        for p, q in zip(graph.parameters(), copied.parameters()):
            q._backward_hooks = p._backward_hooks  # torch does not copy these
        return copied
    except RuntimeError as e:
        if "deepcopy protocol" not in str(e):
            raise
        return graph


class Copies:
    """Copies of a graph to call: one and the same as long as no call leaves anything behind on it, since copies are slow."""

    def __init__(self, graph):
        self.graph, self.copy, self.state = graph, None, None

    def take(self):
        """A graph as the one given was."""
        if self.copy is None or not self._as_it_was():
            self.copy = fresh(self.graph)
            self.state = _state(self.copy)
        return self.copy

    def _as_it_was(self):
        (tensors, plain), (now, plain_now) = self.state, _state(self.copy)
        if plain != plain_now or tensors.keys() != now.keys():
            return False
        return all(t.dtype == now[n].dtype and torch.equal(t, now[n]) for n, t in tensors.items())


def _state(module):
    """All that a module stores, tensors as copies, but its mode and gradients."""
    stored = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    tensors = {n: t.detach().clone() for n, t in stored}
    plain = {}
    for n, m in module.named_modules():
        for k, v in m.__dict__.items():
            if isinstance(v, torch.Tensor):
                tensors[f"{n}!{k}"] = v.detach().clone()
            elif not k.startswith("_") and k not in ("training", "meta"):
                plain[n, k] = repr(v) if isinstance(v, (int, float, str, list, dict, tuple, set)) else id(v)
    return tensors, plain


def call(model, inputs, train=False, grads=False, repeat=1, aliases=True):
    """Outputs, gradients by name, buffers after, of the last of `repeat` seeded calls on copies of the inputs."""
    model.train(train)
    torch.manual_seed(7)
    for p in model.parameters():
        p.grad = None
    for _ in range(repeat - 1):
        args, kwargs = copy.deepcopy(inputs)
        model(*args, **kwargs)
    args, kwargs = copy.deepcopy(inputs)
    out = model(*args, **kwargs)
    got = {}
    if grads:
        gen = torch.Generator().manual_seed(5)
        loss = 0.0
        for leaf in leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                real = torch.view_as_real(leaf) if leaf.is_complex() else leaf
                loss = loss + (real * torch.randn(real.shape, generator=gen, dtype=torch.float64).to(real.dtype)).sum()
        if isinstance(loss, torch.Tensor):
            loss.backward()
            got = {n: p.grad.clone() for n, p in model.named_parameters(remove_duplicate=aliases) if p.grad is not None}
    detached = pytree.tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, leaves(out))
    return {"out": detached, "in": (args, kwargs), "grads": got, "buffers": {n: b.clone() for n, b in model.named_buffers()}}


def snapshot(model):
    """What of a module must not change when it is traced."""
    state = {n: t.clone() for n, t in model.state_dict(keep_vars=False).items() if isinstance(t, torch.Tensor)}
    shape = {}
    for n, m in model.named_modules():
        plain = {
            k: repr(v)
            for k, v in m.__dict__.items()
            if isinstance(v, (int, float, str, bool, list, dict, tuple)) and not k.startswith("_")
        }
        hooks = [len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)]
        shape[n] = (m.training, sorted(m.__dict__), plain, hooks, type(m).__name__)
    flags = {n: (p.requires_grad, p.grad is None, id(p)) for n, p in model.named_parameters()}
    return state, shape, flags, torch.get_rng_state()


def unchanged(before, after):
    """What differs between two snapshots, in words."""
    problems = [f"state {n}" for n in before[0] if n not in after[0] or not torch.equal(before[0][n], after[0][n])]
    problems += [f"new state {n}" for n in after[0] if n not in before[0]]
    problems += [
        f"module {n!r}: {before[1].get(n)} -> {after[1].get(n)}"[:300] for n in after[1] if before[1].get(n) != after[1][n]
    ]
    problems += [f"parameter {n}" for n in after[2] if before[2].get(n) != after[2][n]]
    if not torch.equal(before[3], after[3]):
        problems.append("random state")
    return problems
