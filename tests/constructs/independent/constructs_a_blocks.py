"""Blocks of classifiers: residuals, gates, squeezes, shuffles."""

import torch
import torch.nn.functional as F
from torch import nn

from .registry import X, case, conv


@case("residual with BN and downsample", X(2, 3, 8, 8), size=(X(2, 3, 12, 12),))
class BasicBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8)
        self.conv1, self.bn1 = conv(8, 12, stride=2, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = conv(12, 12, bias=False), nn.BatchNorm2d(12)
        self.down = nn.Sequential(nn.Conv2d(8, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12))
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        x = self.stem(x)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.down(x)
        return self.fc(F.relu(out).mean([2, 3]))


@case("squeeze-excite with sigmoid gate", X(2, 3, 8, 8), size=(X(2, 3, 6, 10),))
class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 8)
        self.fc1, self.fc2 = nn.Linear(8, 4), nn.Linear(4, 8)
        self.out = conv(8, 4)

    def forward(self, x):
        x = self.conv(x)
        b, c, _, _ = x.size()
        s = F.adaptive_avg_pool2d(x, 1).view(b, c)
        s = torch.sigmoid(self.fc2(F.relu(self.fc1(s)))).view(b, c, 1, 1)
        return self.out(x * s.expand_as(x))


@case("efficient channel attention: conv1d over the channels", X(2, 3, 8, 8))
class EcaGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.eca, self.out = conv(3, 8), nn.Conv1d(1, 1, 3, padding=1, bias=False), conv(8, 4)

    def forward(self, x):
        x = self.conv(x)
        y = x.mean((2, 3), keepdim=True)
        y = self.eca(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return self.out(x * y.sigmoid())


@case("CBAM: max and mean over channels as a spatial map", X(2, 3, 8, 8))
class Cbam(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.spatial, self.out = conv(3, 8), conv(2, 1, 7), conv(8, 4)
        self.mlp = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))

    def forward(self, x):
        x = self.conv(x)
        x = x * torch.sigmoid(self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1)))
        m = torch.cat([torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)], dim=1)
        return self.out(x * torch.sigmoid(self.spatial(m)))


@case("inverted residual: expand, depthwise, project", X(2, 3, 8, 8), size=(X(1, 3, 5, 5),))
class InvertedResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8)
        self.body = nn.Sequential(
            nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(inplace=True),
            conv(16, 16, groups=16, bias=False), nn.BatchNorm2d(16), nn.Hardswish(inplace=True),
            nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8),
        )  # fmt: skip
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.body(x))


@case("channel shuffle by view and transpose between grouped convs", X(2, 3, 8, 8))
class ChannelShuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 12), conv(12, 12, groups=3), conv(12, 12, groups=3)
        self.out = conv(12, 4)

    def forward(self, x):
        x = self.b(self.a(x))
        b, c, h, w = x.shape
        x = x.view(b, 3, c // 3, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)
        return self.out(F.relu(self.c(x)))


@case("ShuffleNet unit: chunk, one half through a branch, cat, shuffle", X(2, 3, 8, 8))
class ShuffleUnit(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.branch, self.out = conv(3, 12), nn.Sequential(nn.Conv2d(6, 6, 1), conv(6, 6, groups=6)), conv(12, 4)

    def forward(self, x):
        a, b = self.stem(x).chunk(2, dim=1)
        x = torch.cat((a, self.branch(b)), dim=1)
        return self.out(F.channel_shuffle(x, 2))


@case("Res2Net: split by width, running sums, cat", X(2, 3, 8, 8))
class Res2Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.convs, self.out = conv(3, 12), nn.ModuleList(conv(3, 3) for _ in range(3)), conv(12, 4)

    def forward(self, x):
        spx = torch.split(self.stem(x), 3, 1)
        outs = []
        for i, c in enumerate(self.convs):
            sp = spx[i] if i == 0 else sp + spx[i]  # noqa: F821
            sp = F.relu(c(sp))
            outs.append(sp)
        outs.append(spx[3])
        return self.out(torch.cat(outs, 1))


@case("selective kernel: softmax over branches of a stack", X(2, 3, 8, 8))
class SelectiveKernel(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8)
        self.paths = nn.ModuleList([conv(8, 8), conv(8, 8, 5)])
        self.fc, self.fcs, self.out = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 16, 1, bias=False), conv(8, 4)

    def forward(self, x):
        x = self.stem(x)
        x = torch.stack([k(x) for k in self.paths], dim=1)
        a = self.fcs(F.relu(self.fc(x.sum(1).mean((2, 3), keepdim=True))))
        b, c, h, w = a.shape
        a = torch.softmax(a.view(b, 2, c // 2, h, w), dim=1)
        return self.out((x * a).sum(dim=1))


@case("split attention of ResNeSt: radix softmax over reshaped groups", X(2, 3, 8, 8))
class SplitAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc1, self.fc2, self.out = conv(3, 16), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 1), conv(8, 4)

    def forward(self, x):
        x = F.relu(self.conv(x))
        b, rc, h, w = x.shape
        x = x.reshape((b, 2, rc // 2, h, w))
        gap = x.sum(dim=1).mean((2, 3), keepdim=True)
        attn = self.fc2(F.relu(self.fc1(gap))).view(b, 1, 2, -1).transpose(1, 2)
        attn = F.softmax(attn, dim=1).reshape(b, -1, 1, 1)
        return self.out((x * attn.reshape((b, 2, rc // 2, 1, 1))).sum(dim=1))


@case("ghost module: cheap depthwise features, cat, cut to a number of channels", X(2, 3, 8, 8))
class Ghost(nn.Module):
    def __init__(self):
        super().__init__()
        self.oup = 11
        self.primary, self.cheap, self.out = conv(3, 6, 1), conv(6, 6, groups=6), conv(11, 4)

    def forward(self, x):
        x1 = self.primary(x)
        out = torch.cat([x1, F.relu(self.cheap(x1))], dim=1)
        return self.out(out[:, : self.oup, :, :])


@case("dense block: growing cat through a list argument", X(2, 3, 8, 8))
class DenseBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 6)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(conv(6 + 4 * i, 4) for i in range(3))
        self.out = nn.Conv2d(18, 4, 1)

    def forward(self, x):
        features = [self.stem(x)]
        for n, c in zip(self.norms, self.convs):
            features.append(c(F.relu(n(torch.cat(features, 1)))))
        return self.out(torch.cat(features, 1))


@case("shortcut by zero padding of channels", X(2, 3, 8, 8))
class PadShortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.out = conv(3, 6), conv(6, 12, stride=2), conv(12, 4)

    def forward(self, x):
        x = self.stem(x)
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3), "constant", 0)
        return self.out(F.relu(self.conv(x) + short))


@case("stochastic depth by a per-sample mask in training", X(2, 3, 8, 8))
class DropPath(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.out, self.p = conv(3, 8), conv(8, 8), conv(8, 4), 0.3

    def drop(self, x):
        if self.p == 0.0 or not self.training:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        mask = x.new_empty(shape).bernoulli_(1 - self.p)
        mask.div_(1 - self.p)
        return x * mask

    def forward(self, x):
        x = self.stem(x)
        return self.out(x + self.drop(self.conv(x)))


@case("layer scale: gamma times branch in channels last", X(2, 3, 8, 8))
class ConvNeXtBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.dw, self.norm = conv(3, 8), conv(8, 8, 7, groups=8), nn.LayerNorm(8, eps=1e-6)
        self.pw1, self.pw2, self.gamma, self.out = nn.Linear(8, 16), nn.Linear(16, 8), nn.Parameter(torch.ones(8)), conv(8, 4)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pw2(F.gelu(self.pw1(y)))
        return self.out(x + y.permute(0, 3, 1, 2))


@case("global response norm: norm over space, mean over channels", X(2, 3, 8, 8))
class GlobalResponseNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.out = conv(3, 8), nn.Linear(8, 4)
        self.gamma, self.beta = nn.Parameter(torch.zeros(1, 1, 1, 8)), nn.Parameter(torch.zeros(1, 1, 1, 8))

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        gx = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        nx = gx / (gx.mean(dim=-1, keepdim=True) + 1e-6)
        return self.out(self.gamma * (x * nx) + self.beta + x)


@case("RepVGG: three parallel branches, the identity a BN", X(2, 3, 8, 8))
class RepVgg(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.id, self.out = conv(3, 8), nn.BatchNorm2d(8), conv(8, 4)
        self.k3, self.k1 = nn.Sequential(conv(8, 8), nn.BatchNorm2d(8)), nn.Sequential(conv(8, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x):
        x = self.stem(x)
        return self.out(F.relu(self.k3(x) + self.k1(x) + (0 if self.id is None else self.id(x))))


@case("coordinate attention: pool by row and column, cat, split back", X(2, 3, 8, 6))
class CoordAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.mid, self.ch, self.cw, self.out = conv(3, 8), conv(8, 6, 1), conv(6, 8, 1), conv(6, 8, 1), conv(8, 4)

    def forward(self, x):
        x = self.stem(x)
        _, _, h, w = x.size()
        xh, xw = x.mean(3, keepdim=True), x.mean(2, keepdim=True).permute(0, 1, 3, 2)
        y = F.hardswish(self.mid(torch.cat([xh, xw], dim=2)))
        yh, yw = torch.split(y, [h, w], dim=2)
        return self.out(x * self.ch(yh).sigmoid() * self.cw(yw.permute(0, 1, 3, 2)).sigmoid())


@case("Involution: kernels made from the features, unfold", X(2, 3, 6, 6))
class Involution(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.reduce, self.span, self.out = conv(3, 8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 9 * 2, 1), conv(8, 4)

    def forward(self, x):
        x = self.stem(x)
        w = self.span(F.relu(self.reduce(x)))
        b, c, h, wd = x.shape
        w = w.view(b, 2, 9, h, wd).unsqueeze(2)
        out = F.unfold(x, 3, padding=1).view(b, 2, c // 2, 9, h, wd)
        return self.out((w * out).sum(dim=3).view(b, c, h, wd))


@case("dynamic convolution: experts' kernels mixed by attention, batch in the groups", X(2, 3, 6, 6))
class DynamicConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.att, self.weight, self.out = (
            conv(3, 6),
            nn.Linear(6, 3),
            nn.Parameter(torch.randn(3, 8, 6, 3, 3)),
            conv(8, 4),
        )

    def forward(self, x):
        x = self.stem(x)
        b, c, h, w = x.shape
        a = F.softmax(self.att(x.mean((2, 3))), dim=1)
        weight = torch.mm(a, self.weight.view(3, -1)).view(b * 8, c, 3, 3)
        out = F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b)
        return self.out(F.relu(out.view(b, 8, h, w)))


@case("maxout over channel pairs", X(2, 3, 8, 8))
class Maxout(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = conv(3, 16), conv(8, 4)

    def forward(self, x):
        x = self.a(x)
        n, c, h, w = x.shape
        return self.out(x.view(n, c // 2, 2, h, w).max(2)[0])


@case("MFM of LightCNN: max of two halves by split with a number", X(2, 3, 8, 8))
class MaxFeatureMap(nn.Module):
    def __init__(self):
        super().__init__()
        self.n, self.a, self.out = 8, conv(3, 16), conv(8, 4)

    def forward(self, x):
        a, b = torch.split(self.a(x), self.n, 1)
        return self.out(torch.max(a, b))


@case("CReLU: cat of x and -x", X(2, 3, 8, 8))
class CRelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.out = conv(3, 6), nn.BatchNorm2d(12), conv(12, 4)

    def forward(self, x):
        x = self.a(x)
        return self.out(F.relu(self.bn(torch.cat((x, -x), 1))))


@case("pooling by strided slices and cat: Focus of YOLOv5", X(2, 3, 8, 8))
class Focus(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.out = conv(3, 4), conv(16, 8), conv(8, 4)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        return self.out(F.silu(self.conv(x)))
