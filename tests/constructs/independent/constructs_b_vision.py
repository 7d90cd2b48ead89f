"""Segmentation heads, detection necks, U-Nets, generators."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .registry import X, case, conv


@case("U-Net: pad the upsampled map to the skip's size", X(2, 3, 10, 10), size=(X(2, 3, 13, 13),))
class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.d1, self.d2, self.up, self.u1, self.out = (
            conv(3, 6),
            conv(6, 8),
            nn.ConvTranspose2d(8, 6, 2, stride=2),
            conv(12, 6),
            conv(6, 2),
        )

    def forward(self, x):
        a = F.relu(self.d1(x))
        b = self.up(F.relu(self.d2(F.max_pool2d(a, 2))))
        dy, dx = a.size()[2] - b.size()[2], a.size()[3] - b.size()[3]
        b = F.pad(b, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.out(F.relu(self.u1(torch.cat([a, b], dim=1))))


@case("attention U-Net gate: one-channel map times skip", X(2, 3, 8, 8))
class AttentionGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.down = conv(3, 8), conv(8, 12, stride=2)
        self.wg, self.wx, self.psi, self.out = conv(12, 6, 1), conv(8, 6, 1), conv(6, 1, 1), conv(20, 2)

    def forward(self, x):
        x = self.stem(x)
        g = F.interpolate(self.down(x), scale_factor=2, mode="bilinear", align_corners=True)
        a = torch.sigmoid(self.psi(F.relu(self.wg(g) + self.wx(x))))
        return self.out(torch.cat((x * a, g), 1))


@case("feature pyramid: lateral sums, dict outputs", X(2, 3, 16, 16), size=(X(1, 3, 8, 8),))
class Fpn(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.ModuleList([conv(3, 6, stride=2), conv(6, 8, stride=2), conv(8, 10, stride=2)])
        self.lat = nn.ModuleList([nn.Conv2d(i, 8, 1) for i in (6, 8, 10)])
        self.smooth = nn.ModuleList([conv(8, 4) for _ in range(3)])

    def forward(self, x):
        feats = []
        for c in self.c:
            x = F.relu(c(x))
            feats.append(x)
        last = self.lat[-1](feats[-1])
        outs = {"p2": self.smooth[-1](last)}
        for i in range(1, -1, -1):
            lat = self.lat[i](feats[i])
            last = lat + F.interpolate(last, size=lat.shape[-2:], mode="nearest")
            outs[f"p{i}"] = self.smooth[i](last)
        return outs


@case("BiFPN: normalised relu weights of a parameter", X(2, 3, 8, 8))
class BiFpnNode(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.w, self.out = conv(3, 8), conv(3, 8, stride=2), nn.Parameter(torch.ones(2)), conv(8, 4)

    def forward(self, x):
        w = F.relu(self.w)
        w = w / (w.sum(dim=0) + 1e-4)
        return self.out(F.silu(w[0] * self.a(x) + w[1] * F.interpolate(self.b(x), scale_factor=2)))


@case("ASPP with image pooling, list of modules in a loop", X(2, 3, 8, 8), size=(X(2, 3, 6, 6),))
class Aspp(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8)
        self.convs = nn.ModuleList([nn.Conv2d(8, 4, 3, padding=d, dilation=d) for d in (1, 2, 3)])
        self.pool, self.project = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1)), nn.Conv2d(16, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        res = [F.relu(c(x)) for c in self.convs]
        res.append(F.interpolate(self.pool(x), size=x.shape[-2:], mode="bilinear", align_corners=False))
        return self.project(torch.cat(res, dim=1))


@case("pyramid pooling of PSPNet", X(2, 3, 12, 12))
class Ppm(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.out = conv(3, 8), conv(16, 3)
        self.stages = nn.ModuleList([nn.Sequential(nn.AdaptiveAvgPool2d(s), nn.Conv2d(8, 4, 1)) for s in (1, 3)])

    def forward(self, x):
        x = self.stem(x)
        h, w = x.size(2), x.size(3)
        priors = [F.interpolate(s(x), (h, w), mode="bilinear") for s in self.stages] + [x]
        return self.out(torch.cat(priors, 1))


@case("aux head in training: other structure of outputs", X(2, 3, 8, 8))
class AuxHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.aux, self.fc = conv(3, 8), conv(8, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        y = self.fc(self.b(x).mean((2, 3)))
        if self.training:
            return y, self.aux(x.mean((2, 3)))
        return y


@case("SSD head: permute, view, cat over levels", X(2, 3, 8, 8), size=(X(1, 3, 12, 8),))
class SsdHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.cls = conv(3, 8), conv(8, 8, stride=2), nn.ModuleList([conv(8, 2 * 3), conv(8, 2 * 3)])

    def forward(self, x):
        a = F.relu(self.a(x))
        out = []
        for f, head in zip([a, F.relu(self.b(a))], self.cls):
            y = head(f)
            n, _, h, w = y.shape
            out.append(y.view(n, -1, 3, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, 3))
        return torch.cat(out, dim=1)


@case("YOLO decode: grid made in forward, in-place slices", X(2, 3, 6, 6))
class YoloDecode(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.det, self.na, self.no = conv(3, 8), nn.Conv2d(8, 2 * 7, 1), 2, 7

    def forward(self, x):
        x = self.det(F.silu(self.a(x)))
        bs, _, ny, nx = x.shape
        x = x.view(bs, self.na, self.no, ny, nx).permute(0, 1, 3, 4, 2).contiguous()
        yv, xv = torch.meshgrid([torch.arange(ny), torch.arange(nx)], indexing="ij")
        grid = torch.stack((xv, yv), 2).view((1, 1, ny, nx, 2)).to(x.dtype)
        y = x.sigmoid().clone()
        y[..., 0:2] = (y[..., 0:2] * 2.0 - 0.5 + grid) * 8
        y[..., 2:4] = (y[..., 2:4] * 2) ** 2
        return y.view(bs, -1, self.no)


@case("FCOS scale: learnable scalar modules and exp", X(2, 3, 8, 8))
class FcosScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.gn, self.box, self.scale = conv(3, 8), nn.GroupNorm(2, 8), conv(8, 4), nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return torch.exp(self.scale * self.box(F.relu(self.gn(self.a(x)))))


@case("CSP stage: two 1x1 paths from one map, bottlenecks, cat", X(2, 3, 8, 8))
class CspStage(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.c1, self.c2, self.m, self.c3 = conv(3, 8), conv(8, 6, 1), conv(8, 6, 1), conv(6, 6), conv(12, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        y = F.silu(self.c1(x))
        return self.c3(torch.cat((y + self.m(y), F.silu(self.c2(x))), 1))


@case("C2f: list(chunk) extended by a generator", X(2, 3, 8, 8))
class C2f(nn.Module):
    def __init__(self):
        super().__init__()
        self.cv1, self.cv2, self.m = conv(3, 8, 1), conv(16, 4, 1), nn.ModuleList(conv(4, 4) for _ in range(2))

    def forward(self, x):
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


@case("SPP: max pools of several sizes", X(2, 3, 8, 8))
class Spp(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.m = conv(3, 4, 1), conv(16, 4, 1), nn.ModuleList([nn.MaxPool2d(k, 1, k // 2) for k in (3, 5, 7)])

    def forward(self, x):
        x = self.a(x)
        return self.b(torch.cat([x] + [m(x) for m in self.m], 1))


@case("SegNet: max pool with indices, unpool", X(2, 3, 8, 8))
class SegNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = conv(3, 8), conv(8, 8), conv(8, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        size = x.size()
        x, idx = F.max_pool2d(x, 2, 2, return_indices=True)
        return self.out(F.max_unpool2d(self.b(x), idx, 2, 2, output_size=size))


@case("sub-pixel upsampling: PixelShuffle after a conv", X(2, 3, 6, 6))
class PixelShuffleUp(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.up, self.act, self.out = conv(3, 8), conv(8, 24), nn.PReLU(6), conv(6, 3)

    def forward(self, x):
        return self.out(self.act(F.pixel_shuffle(self.up(F.relu(self.a(x))), 2)))


@case("space to depth: PixelUnshuffle before a conv", X(2, 3, 8, 8))
class PixelUnshuffleDown(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = conv(3, 4), conv(16, 8), conv(8, 3)

    def forward(self, x):
        return self.out(F.leaky_relu(self.b(F.pixel_unshuffle(self.a(x), 2)), 0.1))


@case("deformable-like: grid_sample with a predicted offset", X(2, 3, 6, 6))
class GridSample(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.off, self.out = conv(3, 8), conv(8, 2), conv(8, 3)

    def forward(self, x):
        x = self.a(x)
        theta = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]], dtype=x.dtype, device=x.device).expand(x.size(0), 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        grid = grid + torch.tanh(self.off(x)).permute(0, 2, 3, 1)
        return self.out(F.grid_sample(x, grid, align_corners=False))


@case("spatial transformer: localisation to theta with a flatten", X(2, 3, 8, 8))
class Stn(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc, self.fc, self.a, self.out = conv(3, 4), nn.Linear(4 * 16, 6), conv(3, 8), conv(8, 2)

    def forward(self, x):
        t = F.max_pool2d(F.relu(self.loc(x)), 2)
        theta = self.fc(t.view(-1, 4 * 16)).view(-1, 2, 3)
        x = F.grid_sample(x, F.affine_grid(theta, x.size(), align_corners=True), align_corners=True)
        return self.out(self.a(x).relu_())


@case("StyleGAN2 modulated conv: weight times style, demodulated, batch in groups", X(2, 4, 6, 6), X(2, 5))
class ModulatedConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.style = conv(4, 6), nn.Linear(5, 6)
        self.weight, self.out = nn.Parameter(torch.randn(1, 8, 6, 3, 3)), conv(8, 3)

    def forward(self, x, z):
        x = self.stem(x)
        b, c, h, w = x.shape
        weight = self.weight * self.style(z).view(b, 1, c, 1, 1) / math.sqrt(c * 9)
        demod = torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8)
        weight = (weight * demod.view(b, 8, 1, 1, 1)).view(b * 8, c, 3, 3)
        out = F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b)
        return self.out(F.leaky_relu(out.view(b, 8, h, w), 0.2))


@case("AdaIN: instance norm, scale and shift from a chunk of a linear", X(2, 3, 6, 6), X(2, 5))
class AdaIn(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.fc, self.out = conv(3, 8), nn.InstanceNorm2d(8), nn.Linear(5, 16), conv(8, 3)

    def forward(self, x, s):
        h = self.fc(s)
        gamma, beta = torch.chunk(h.view(h.size(0), h.size(1), 1, 1), chunks=2, dim=1)
        return self.out((1 + gamma) * self.norm(self.a(x)) + beta)


@case("SPADE: per-pixel scale and shift from a segmentation map", X(2, 3, 6, 6), X(2, 2, 3, 3))
class Spade(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.sh, self.out = conv(3, 8), nn.BatchNorm2d(8, affine=False), conv(2, 6), conv(8, 3)
        self.gamma, self.beta = conv(6, 8), conv(6, 8)

    def forward(self, x, seg):
        x = self.bn(self.a(x))
        s = F.relu(self.sh(F.interpolate(seg, size=x.size()[2:], mode="nearest")))
        return self.out(x * (1 + self.gamma(s)) + self.beta(s))


@case("minibatch stddev of a discriminator", X(4, 3, 6, 6), batch=False)
class MinibatchStd(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = conv(3, 8), conv(9, 3)

    def forward(self, x):
        x = self.a(x)
        y = x - x.mean(0, keepdim=True)
        y = torch.sqrt(y.pow(2).mean(0) + 1e-8).mean().view(1, 1, 1, 1)
        return self.out(torch.cat([x, y.expand(x.shape[0], 1, *x.shape[2:])], 1))


@case("pixel norm over channels", X(2, 3, 6, 6))
class PixelNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = conv(3, 8), conv(8, 3)

    def forward(self, x):
        x = self.a(x)
        return self.out(x * torch.rsqrt(torch.mean(x**2, dim=1, keepdim=True) + 1e-8))


@case("DCGAN generator: view of the latent, transposed convs", X(2, 6))
class DcGan(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.bn = nn.Linear(6, 8 * 4), nn.BatchNorm2d(8)
        self.t1, self.t2 = nn.ConvTranspose2d(8, 6, 4, 2, 1, bias=False), nn.ConvTranspose2d(6, 3, 4, 2, 1)

    def forward(self, z):
        x = self.fc(z).view(z.size(0), 8, 2, 2)
        return torch.tanh(self.t2(F.relu(self.t1(F.relu(self.bn(x))))))


@case("VAE: chunk into mu and logvar, reparametrise in training", X(2, 3, 4, 4))
class Vae(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.fc, self.dec = conv(3, 6), nn.Linear(96, 12), nn.Linear(6, 48)

    def forward(self, x):
        mu, logvar = self.fc(F.relu(self.enc(x)).flatten(1)).chunk(2, dim=1)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar) if self.training else mu
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return self.dec(z).view_as(x), kl


@case("VQ-VAE: cdist to a codebook, argmin, embedding, straight through", X(2, 3, 4, 4))
class VectorQuantizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.codebook, self.dec = conv(3, 6), nn.Embedding(5, 6), conv(6, 3)

    def forward(self, x):
        z = self.enc(x).permute(0, 2, 3, 1).contiguous()
        flat = z.view(-1, 6)
        d = flat.pow(2).sum(1, keepdim=True) + self.codebook.weight.pow(2).sum(1) - 2 * flat @ self.codebook.weight.t()
        q = self.codebook(d.argmin(1)).view(z.shape)
        loss = F.mse_loss(q.detach(), z) + 0.25 * F.mse_loss(q, z.detach())
        q = z + (q - z).detach()
        return self.dec(q.permute(0, 3, 1, 2)), loss


@case("affine coupling of a flow: split, scale, cat, log-determinant", X(2, 8))
class Coupling(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.net, self.out = (
            nn.Linear(8, 8),
            nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 8)),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        x = self.inp(x)
        a, b = x[:, :4], x[:, 4:]
        s, t = self.net(a).chunk(2, 1)
        s = torch.tanh(s)
        x = torch.cat([a, b * s.exp() + t], 1)
        return self.out(x.flip(1)), s.sum(1)
