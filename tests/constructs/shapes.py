"""Views, permutations and what tensors call them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .catalogue import conv, image, maps, network, rows

maps("flatten and unflatten", lambda y: y.flatten(2).unflatten(2, (6, 6)), "exact")
maps("flatten with channels, and back", lambda y: y.flatten(1).unflatten(1, (8, 6, 6)), "exact")
maps("view with -1", lambda y: y.view(y.size(0), 8, -1).cos().view(y.size(0), -1, 6, 6), "exact")
maps("view by the shape's items", lambda y: y.view(y.shape[0], y.shape[1], y.shape[2] * y.shape[3]).view(y.shape), "exact")
maps("reshape to halves", lambda y: y.reshape(y.shape[0], 2, y.shape[1] // 2, *y.shape[2:]).sum(1), "exact", out=4)
maps("reshape to pairs", lambda y: y.reshape(-1, 4, 2, 6, 6).sum(2), "exact", out=4)
maps("squeeze and unsqueeze", lambda y: y.unsqueeze(1).squeeze(1).unsqueeze(-1).squeeze(), "exact")
maps("permute", lambda y: y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), "exact")
maps("movedim", lambda y: y.movedim(1, -1).cos().movedim((3,), (1,)), "exact")
maps("swapaxes", lambda y: y.swapaxes(1, 3).swapaxes(1, -1), "exact")
maps("contiguous memory format", lambda y: y.contiguous(memory_format=torch.channels_last), "exact")
maps("view_as and reshape_as", lambda y: y.flatten(2).view_as(y).reshape_as(y), "exact")
maps("expand_as", lambda y: y * y.mean((2, 3), keepdim=True).expand_as(y), "exact")
maps("ravel per image", lambda y: y.reshape(y.shape[0] * 8, 1, 6, 6).cos().reshape(-1, 8, 6, 6), "exact")
maps("type casts", lambda y: y.float().to(y.dtype).type_as(y), "exact")
maps("fold of unfold", lambda y: F.fold(F.unfold(y, 2, stride=2), (6, 6), 2, stride=2), "exact")
maps("unfold as channels", lambda y: F.unfold(y, 2, stride=2).unflatten(2, (3, 3)), "exact", out=32)
maps("tensor unfold over channels", lambda y: y.unfold(1, 4, 2).sum(1).movedim(-1, 1), "pinned", "unfold", out=4)
maps("pooled and interpolated", lambda y: F.interpolate(F.max_pool2d(y, 2), size=y.shape[-2:], mode="bilinear"), "exact")
maps("adaptive pool and broadcast", lambda y: y + F.adaptive_max_pool2d(y, 1), "exact")
maps("local response norm", lambda y: F.local_response_norm(y, 3), "pinned", "local_response_norm")
maps("space to depth by slices", lambda y: torch.cat([y[..., ::2, ::2], y[..., 1::2, 1::2]], 1), "exact", out=16)
maps("divided by the number of elements", lambda y: y / y.numel(), "exact")
maps("times batch and channels", lambda y: y * (y.shape[0] * y.shape[1]), "exact")
maps("times the sum of batch and channels", lambda y: y * (y.size(0) + y.size(1)), "exact")
maps("divided by what is merged", lambda y: y / y.flatten(0, 1).shape[0], "exact")
maps("view by a computed tuple", lambda y: y.view(y.size()[:1] + (8 * 6,) + y.size()[3:]).view(y.shape), "exact")  # noqa: RUF005
maps("view by a tuple with the batch in it", lambda y: y.view((y.size(0) * 8, *y.size()[2:])).cos().view(y.shape), "exact")
rows("mT twice", lambda y: y.mT.cos().mT, "exact")
rows("transpose", lambda y: y.transpose(1, 2).sigmoid().transpose(-1, -2), "exact")
rows("heads split and joined", lambda y: y.unflatten(-1, (2, 4)).transpose(1, 2).transpose(1, 2).flatten(2), "exact")
rows("rows merged into the batch", lambda y: y.reshape(-1, 8).cos().view(-1, 5, 8), "exact")


@network("flatten before a linear", "exact", image(4, 4))
class FlattenLinear(nn.Module):
    """A channel is 16 columns of the linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = conv(3, 8), nn.BatchNorm2d(8), nn.Linear(8 * 16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.flatten(F.relu(self.norm(self.a(x))), 1))


@network("flatten of channels-last before a linear", "exact", image(4, 4))
class FlattenLast(FlattenLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.a(x)).permute(0, 2, 3, 1).reshape(x.shape[0], -1))


@network("matrix transposed with .T", "exact", lambda batch=4: (torch.randn(batch, 4),))
class MatrixT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.t(self.a(x).T.cos()))


@network("batch norm of a matrix", "exact", lambda batch=4: (torch.randn(batch, 4),))
class Norm1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.a(x)).relu())


@network("several outputs in a dict", "pinned", axis="b.weight:0", reason="output")
class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 6), conv(6, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.b(torch.sigmoid(self.a(x)))
        return {"features": features, "out": self.c(features)}


@network("several outputs in a tuple", "pinned", axis="b.weight:0", reason="output")
class TupleOutput(DictOutput):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        features = self.b(torch.sigmoid(self.a(x)))
        return self.c(features), [features, features.mean((2, 3))]


@network("two inputs", "exact", lambda batch=2: (torch.randn(batch, 3, 6, 6), torch.randn(batch, 3, 6, 6)))
class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(3, 8), conv(8, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.c(self.a(x) * self.b(y).sigmoid())


@network(
    "an input added to channels",
    "pinned",
    lambda batch=2: (torch.randn(batch, 3, 6, 6), torch.randn(batch, 8, 6, 6)),
    reason="input",
)
class InputAdded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 6), conv(6, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x) + y))
