"""Where pruned graphs go: compilers, exchange formats, other number formats. Each route gives the graph's own outputs."""

from __future__ import annotations

import copy
import functools
import io
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import fx, nn
from torchvision.models import mobilenetv3

import stp_fx
from stp_fx.testing.recipe import randomise

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler, and g++ is not there")


def _mobilenet() -> nn.Module:
    """Depthwise convolutions, gates and both activations of MobileNetV3, in four blocks."""
    block = functools.partial(mobilenetv3.InvertedResidualConfig, dilation=1, width_mult=1.0)
    blocks = [
        block(16, 3, 16, 16, True, "RE", 2),
        block(16, 3, 48, 24, False, "RE", 2),
        block(24, 5, 64, 40, True, "HS", 2),
        block(40, 5, 96, 40, True, "HS", 1),
    ]
    return mobilenetv3.MobileNetV3(blocks, last_channel=64, num_classes=5)


def _convnext() -> nn.Module:
    block = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([block(8, 16, 2), block(16, None, 2)], num_classes=5)


NETWORKS: dict[str, Any] = {
    "mobilenet": _mobilenet,
    "vit": lambda: torchvision.models.VisionTransformer(64, 16, 2, 4, 32, 64, num_classes=5),
    "convnext": _convnext,
}


LARGEST_BATCH = 1 << 20
"""torch 2.6 asks for a bound: it takes the largest integer out of any that has none, and then finds that it is missing."""
CAPTURED = [("mobilenet", "fx"), ("vit", "fx"), ("vit", "export"), ("convnext", "fx")]


@pytest.fixture(scope="module", params=CAPTURED, ids="-".join)
def captured(request: pytest.FixtureRequest) -> fx.GraphModule:
    name, frontend = request.param
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NETWORKS[name]().eval()
        randomise(model)
    return stp_fx.prune_graph(stp_fx.trace(model, X, frontend=frontend), ratio=0.5)


@pytest.fixture
def pruned(captured: fx.GraphModule) -> fx.GraphModule:
    return copy.deepcopy(captured)


def outputs(gm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return gm(x)


@pytest.mark.slow
@needs_compiler
def test_inductor(pruned: fx.GraphModule) -> None:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor warns of what it deprecates in itself
        compiled = torch.compile(pruned)
        for x in (X, OTHER):
            torch.testing.assert_close(outputs(compiled, x), outputs(pruned, x), rtol=1e-3, atol=1e-4)
        pruned.train()
        compiled(X).square().sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch.export.load, of what it reads itself
def test_exported_programs_are_saved_and_loaded(pruned: fx.GraphModule) -> None:
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    program = torch.export.export(pruned, (X,), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    for x in (X, OTHER):
        torch.testing.assert_close(outputs(again, x), outputs(pruned, x))


def test_onnx(pruned: fx.GraphModule, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `ship` is not installed")
    pytest.importorskip("onnxscript", reason="the extra `ship` is not installed")
    if torch.__version__.startswith("2.6.") and any(isinstance(module, nn.BatchNorm2d) for module in pruned.modules()):
        pytest.skip("the exporter of torch 2.6 fails on batch norm, of networks that are not pruned too")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of what it deprecates in itself
        batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
        program = torch.onnx.export(pruned, (X,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    path = tmp_path / "pruned.onnx"
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for x in (X, OTHER, X[:1]):
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), outputs(pruned, x), rtol=1e-4, atol=1e-4)


def test_int8_weights(pruned: fx.GraphModule) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao warns of what it deprecates in itself
        quantization = pytest.importorskip("torchao.quantization", reason="the extra `ship` is not installed")
        quantized = copy.deepcopy(pruned)
        quantization.quantize_(quantized, quantization.Int8WeightOnlyConfig())
        expected, found = outputs(pruned, X), outputs(quantized, X)
    changed = [name for name, p in quantized.named_parameters() if type(p.data) is not torch.Tensor and p.dim() == 2]
    if any(isinstance(module, nn.Linear) for module in pruned.modules()):
        assert changed
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 0.1


def test_bfloat16_and_channels_last(pruned: fx.GraphModule) -> None:
    expected = outputs(pruned, X)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(pruned, X).float()
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 0.1
    channels_last = copy.deepcopy(pruned).to(memory_format=torch.channels_last)
    torch.testing.assert_close(outputs(channels_last, X.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-4)
    half = copy.deepcopy(pruned).to(torch.bfloat16)
    assert outputs(half, X.bfloat16()).dtype == torch.bfloat16
