"""What models ask of their tensors while they are traced: checks, devices, lengths, shapes; and the functions they take."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stp_fx
from stp_fx.errors import TraceError
from stp_fx.ir import provenance_of
from stp_fx.ir.fx_frontend import OWN_BATCH
from stp_fx.ir.train_eval import ALONE

X = torch.randn(2, 6, 8)
Body = Callable[[Tensor], Any]


class Between(nn.Module):
    """Two linears, and what ``body`` does between them."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.a, self.b, self.body = nn.Linear(8, 12), nn.Linear(12, 5), body

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.body(self.a(x)))


def checked(model: nn.Module, *inputs: Tensor) -> torch.fx.GraphModule:
    """Captured by fx with its batch free, pruned by half and checked in full; the pruned graph."""
    inputs = inputs or (X,)
    gm = stp_fx.trace(model.eval(), inputs, frontend="fx")
    assert OWN_BATCH not in provenance_of(gm).notes
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    assert {"eval", "masked = removed"} <= set(provenance_of(pruned).validation.ran), provenance_of(pruned).validation
    return pruned


def value_or_call(y: Tensor) -> Tensor:
    return y() if callable(y) else y


def size_checked(y: Tensor) -> Tensor:
    torch._check(y.shape[1] > 1, lambda: "too short")
    torch._check_value(y.shape[-1] == 12)
    return y


def data_checked(y: Tensor) -> Tensor:
    torch._check_tensor_all(y.abs().sum(-1) < 1e6, lambda: "too large")
    return y


def without_autocast(y: Tensor) -> Tensor:
    with torch.autocast(y.device.type, enabled=False), torch.amp.autocast(device_type=y.device.type, enabled=False):
        return y.float()


def by_device(y: Tensor) -> Tensor:
    return y.relu() if y.device.type in ("cpu", "mps") else y.relu() * 1.0


def table_of_sizes(y: Tensor) -> Tensor:
    sizes = torch.as_tensor([(y.shape[1], 2)], dtype=torch.long, device=y.device)
    scale = torch.tensor([[y.shape[1], 1.0]], device=y.device)
    return y * (sizes[..., 0, None] / scale[..., :1])


def reshaped(y: Tensor) -> Tensor:
    batch, length, width = y.shape
    return torch.reshape(y, (batch, length * width)).view(y.shape)


def shape_compared(y: Tensor) -> Tensor:
    flat = y.reshape(y.shape[0] * 2, 3, y.shape[2])
    if flat.size() != (y.shape[0] * 2, 3, 12) or flat.shape == (y.shape[0] * 2, 4, 12):
        raise ValueError(f"{flat.size()}")
    return flat.reshape(y.shape)


def clamped_if_infinite(y: Tensor) -> Tensor:
    if torch.isinf(y).any() or torch.isnan(y).any() or not torch.isfinite(y).all():
        y = torch.clamp(y, min=-1000, max=1000)
    return y


BODIES = [
    clamped_if_infinite,
    value_or_call,
    size_checked,
    data_checked,
    without_autocast,
    by_device,
    table_of_sizes,
    reshaped,
    shape_compared,
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_what_is_asked(body: Body) -> None:
    assert checked(Between(body)).get_parameter("a.weight").shape[0] == 6


def test_checks_of_data_stay_in_the_graph() -> None:
    gm = stp_fx.trace(Between(data_checked).eval(), X, frontend="fx")
    with pytest.raises(RuntimeError, match="too large"):
        gm(X * 1e9)


def test_numbers_that_were_taken_for_finite_have_to_be() -> None:
    gm = stp_fx.trace(Between(clamped_if_infinite).eval(), X, frontend="fx")
    with pytest.raises(RuntimeError, match="not all numbers are finite"):
        gm(X * float("inf"))


def test_what_a_number_follows_from_is_looked_at_once() -> None:
    """After 300 residual blocks there are 2^300 ways back, and the longest is 900 nodes long."""

    def residual(y: Tensor) -> Tensor:
        for _ in range(300):
            y = y + y.relu() * 0.001
        return y

    assert checked(Between(lambda y: clamped_if_infinite(residual(y)))).get_parameter("a.weight").shape[0] == 6
    model = Between(lambda y: y if residual(model.steps).max() > 0 else -y)
    model.register_buffer("steps", torch.ones(3))
    assert checked(model).get_parameter("a.weight").shape[0] == 6


def test_a_check_of_sizes_that_fails_is_the_models_error() -> None:
    def never(y: Tensor) -> Tensor:
        torch._check(y.shape[1] > 100, lambda: "too short")
        return y

    with pytest.raises(Exception, match="too short"):
        stp_fx.trace(Between(never).eval(), X, frontend="fx")


# -- numbers of inputs ---------------------------------------------------------------------------------------------------


class Padded(Between):
    def __init__(self) -> None:
        super().__init__(lambda y: y)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        longest = int(torch.max(lengths).item())
        padding = torch.arange(longest, device=lengths.device).expand(x.shape[0], longest) >= lengths.unsqueeze(1)
        return self.b(self.a(x).masked_fill(padding.unsqueeze(-1), 0.0))


LENGTHS = torch.tensor([6, 4])


def test_lengths_among_the_inputs(caplog: pytest.LogCaptureFixture) -> None:
    model = Padded().eval()
    with caplog.at_level(logging.WARNING):
        pruned = checked(model, X, LENGTHS)
    assert "the graph holds for the numbers that the forward reads of 'lengths'" in caplog.text
    gm = stp_fx.trace(model, (X, LENGTHS))
    more = torch.cat([X, X]), torch.tensor([1, 6, 2, 3])
    torch.testing.assert_close(gm(*more), model(*more))
    for graph in (gm, pruned, copy.deepcopy(pruned)):
        with pytest.raises(RuntimeError, match="holds for inputs that give 6"):
            graph(X, torch.tensor([5, 4]))


def test_lengths_are_recorded_for_another_process(tmp_path: Any) -> None:
    model = Padded().eval()
    pruned = stp_fx.prune_graph(model, ratio=0.5, example_inputs=(X, LENGTHS))
    stp_fx.save(pruned, tmp_path / "pruned")
    torch.testing.assert_close(stp_fx.load(tmp_path / "pruned", model)(X, LENGTHS), pruned(X, LENGTHS))


def test_branches_on_inputs_are_refused() -> None:
    class Branching(Padded):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.b(self.a(x)) if lengths.max() > 3 else self.b(self.a(x).relu())

    with pytest.raises(TraceError, match=r"bool\(\) of a tensor whose value depends on the data"):
        stp_fx.trace(Branching().eval(), (X, LENGTHS), frontend="fx")


def test_arrays_beside_tensors_are_refused_with_what_to_do() -> None:
    def masked(y: Tensor) -> Tensor:
        return y * torch.tensor(numpy.ones(12, dtype=bool), device=y.device)

    with pytest.raises(TraceError, match=r"takes a numpy array beside traced tensors, at .*give it torch\.from_numpy of it\."):
        stp_fx.trace(Between(masked).eval(), X, frontend="fx")


class MasksInTraining(Between):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y * torch.tensor(numpy.random.rand(12) > 0.3, device=y.device) if self.training else y)


def test_masks_that_numpy_draws_leave_training_out() -> None:
    gm = stp_fx.trace(MasksInTraining(lambda y: y).eval(), X)
    (note,) = (n for n in provenance_of(gm).notes if n.startswith(ALONE))
    assert re.search(r"random numbers in Python \(numpy\.random\).* one draw: draw them with torch", note), note


class PaddedByBuffers(Between):
    """Numbers of buffers and sizes among sizes, as tensors."""

    def __init__(self) -> None:
        super().__init__(lambda y: y)
        self.register_buffer("width", torch.tensor(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        extra = (self.width - y.shape[1] % self.width) % self.width
        padded = F.pad(y, (0, 0, self.width // 2, extra))
        return self.b(padded[:, : padded.shape[1] - extra])


def test_numbers_of_buffers_and_sizes() -> None:
    assert checked(PaddedByBuffers()).get_parameter("a.weight").shape[0] == 6


# -- functions -----------------------------------------------------------------------------------------------------------


class Spectral(nn.Module):
    """Convolutions between a Fourier transform of frames and its inverse."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 2, 3, padding=1)
        self.options = options
        self.register_buffer("window", torch.hann_window(12))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.stft(x, 16, 4, win_length=12, window=self.window, return_complex=True)
        y = self.b(self.a(torch.view_as_real(z).permute(0, 3, 1, 2)).relu()).permute(0, 2, 3, 1).contiguous()
        return torch.istft(torch.view_as_complex(y), 16, 4, win_length=12, window=self.window, **self.options)


@pytest.mark.parametrize("options", [{}, {"length": 60}, {"length": 70}, {"normalized": True}, {"onesided": True}])
@pytest.mark.filterwarnings("ignore:The length of signal is shorter")
def test_istft(options: dict[str, Any]) -> None:
    model, x = Spectral(**options), torch.randn(2, 64)
    pruned = checked(model, x)
    assert pruned.get_parameter("a.weight").shape[0] == 3
    gm = stp_fx.trace(model, x, frontend="fx", validate=False)
    torch.testing.assert_close(gm(torch.cat([x, x])), model(torch.cat([x, x])))


class BothSides(nn.Module):
    """A spectrum that is no real signal's: its second half is not the mirror image of the first."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.mix, self.options = nn.Linear(20, 20), options
        self.register_buffer("window", torch.hann_window(12) + 0.1)

    def forward(self, real: Tensor, imaginary: Tensor) -> Tensor:
        z = torch.complex(self.mix(real), self.mix(imaginary))
        return torch.istft(z, 16, 4, win_length=12, window=self.window, onesided=False, **self.options)


@pytest.mark.parametrize("options", [{}, {"length": 50}, {"normalized": True}])
def test_istft_of_both_sides(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = BothSides(**options).double().eval(), torch.randn(2, 2, 16, 20, dtype=torch.float64)
    gm = stp_fx.trace(model, tuple(x), frontend="fx", validate=False)
    for given in (x, torch.cat([x, x], 1)):
        torch.testing.assert_close(gm(*given), model(*given))
