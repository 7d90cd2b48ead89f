"""Tracing patches torch and the user's modules for a while: no other thread notices, and nothing stays."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import _symbolic_trace

import stp_fx
from stp_fx.errors import TraceError

_FUNCTIONS = ("arange", "zeros", "ones", "full", "empty", "rand", "randn", "tensor", "finfo", "iinfo", "is_tensor")
_METHODS = ("view", "expand", "reshape", "repeat", "new_zeros", "narrow", "tile")


def patched_state() -> list[Any]:
    """All that tracing may patch, to be compared by identity."""
    return [
        *(getattr(torch, name) for name in _FUNCTIONS),
        *(getattr(torch.Tensor, name) for name in _METHODS),
        *(name in vars(torch.Tensor) for name in _METHODS),
        vars(torch.autograd.Function).get("apply"),
        vars(nn.Module)["__call__"],
        vars(nn.Module)["__getattr__"],
        math.sqrt,
        type(torch),
        type(math),
        isinstance,
        *(globals().get(name) for name in ("isinstance", "type", "int", "float")),
        sys.modules["importlib._bootstrap"]._find_and_load,
        _symbolic_trace.is_fx_tracing(),
    ]


def same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(a is b or a == b for a, b in zip(first, second, strict=True))


_INNER: list[Any] = []


class Positions(nn.Module):
    """Uses most of what is patched: factories, sizes in methods of new tensors, limits of dtypes, ``math``, ``isinstance``."""

    def __init__(self, during: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.line, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.during = during

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.during()
        assert isinstance(x, torch.Tensor)
        b, n, _ = x.shape
        y = self.line(x) / math.sqrt(n)
        y = y + torch.zeros(b, n, 8, dtype=y.dtype) + torch.ones(1, 1, 8).expand(b, n, 8)
        y = y.masked_fill(y < torch.finfo(y.dtype).min, 0)
        return self.head(y)


class Fails(Positions):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum() > 0 else x


def test_nothing_stays_patched() -> None:
    before = patched_state()
    gm = stp_fx.trace(Positions(), torch.randn(2, 5, 6))
    assert same(patched_state(), before)
    with pytest.raises(TraceError):
        stp_fx.trace(Fails(), torch.randn(2, 5, 6))
    assert same(patched_state(), before)
    buffer = io.BytesIO()
    torch.save(gm, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=False)
    assert same(patched_state(), before)


def test_a_trace_within_a_trace() -> None:
    before, x = patched_state(), torch.randn(2, 5, 6)
    outer = stp_fx.trace(Positions(lambda: _INNER.append(stp_fx.trace(Positions(), x))), x)
    assert _INNER.pop().code == stp_fx.trace(Positions(), x).code == outer.code
    assert same(patched_state(), before)
    _INNER.clear()


def test_other_threads_see_torch_as_it_is() -> None:
    """While one thread is in the middle of a trace, another reads and runs everything that is patched."""
    before, seen, traced = patched_state(), [], []
    inside, go = threading.Event(), threading.Event()
    net, x = Positions().eval(), torch.randn(2, 5, 6)
    expected = net(x)

    def pause() -> None:
        inside.set()
        assert go.wait(60)

    thread = threading.Thread(target=lambda: traced.append(stp_fx.trace(Positions(pause), x)))
    thread.start()
    try:
        assert inside.wait(60)
        seen = [*(getattr(torch, name) for name in _FUNCTIONS), *(getattr(torch.Tensor, name) for name in _METHODS)]
        assert seen == before[: len(seen)]
        assert isinstance(torch.finfo(torch.float32), torch.finfo)
        assert torch.equal(net(x), expected)
        assert torch.zeros(3).view(3, 1).expand(3, 2).shape == (3, 2)
        assert math.sqrt(4) == 2
        assert not _symbolic_trace.is_fx_tracing()
    finally:
        go.set()
        thread.join()
    assert traced[0].code == stp_fx.trace(Positions(), x).code
    assert same(patched_state(), before)


@pytest.mark.parametrize("shared", [False, True])
def test_threads_trace_at_once(shared: bool) -> None:
    before, x = patched_state(), torch.randn(2, 5, 6)
    model = Positions()
    expected, found, failed = stp_fx.trace(model, x), [], []
    buffer = io.BytesIO()
    torch.save(expected, buffer)
    start = threading.Barrier(4)

    def work(k: int) -> None:
        try:
            start.wait(60)
            for _ in range(3):
                if k == 3:
                    found.append(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False))
                    continue
                if k == 2:
                    with pytest.raises(TraceError):
                        stp_fx.trace(Fails(), x)
                found.append(stp_fx.trace(model if shared else Positions(), x))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(found) == 12
    assert {gm.code for gm in found} == {expected.code}
    assert same(patched_state(), before)


def in_a_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_torch_compile_works_after_a_trace() -> None:
    """``torch._dynamo`` is imported on demand, maybe during a trace, and keeps what it then reads of ``torch``."""
    out = in_a_process("""
        import sys, torch
        from torch import nn
        import stp_fx
        assert "torchvision" not in sys.modules
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), head).eval()
        x = torch.randn(2, 3, 8, 8)
        pruned = stp_fx.prune_graph(stp_fx.trace(net, x), ratio=0.5)
        import torch._dynamo.utils
        assert all(isinstance(kind, type) for kind in torch._dynamo.utils.common_constant_types)
        for model in (net, pruned):
            assert torch.allclose(torch.compile(model, backend="eager")(x), model(x), atol=1e-5)
        print("compiled")
    """)
    assert out == "compiled\n"


def test_what_a_forward_imports_reads_torch_as_it_is(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = patched_state()
    (tmp_path / "stp_fx_reads_torch.py").write_text(
        "import math, torch\nfrom torch import zeros\n"
        "KEPT = [zeros, torch.finfo, torch.Tensor.view, math.sqrt, torch.nn.Module.__call__]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def imports() -> None:
        import stp_fx_reads_torch  # noqa: F401

    stp_fx.trace(Positions(imports), torch.randn(2, 5, 6))
    kept = sys.modules.pop("stp_fx_reads_torch").KEPT
    assert kept == [torch.zeros, torch.finfo, torch.Tensor.view, math.sqrt, nn.Module.__call__]
    assert same(patched_state(), before)
