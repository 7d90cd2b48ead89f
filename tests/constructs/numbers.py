"""Numbers that are no sizes, sizes that are numbers, reductions whose neutral element is not zero, and other things that a
rule could take for something else. What is pruned of them must be pruned right; what is not must be explained."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .catalogue import maps, rows


class Composite(nn.Module):
    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return y * (y + 1).sum(1, keepdim=True).log()


class ExpSum(nn.Module):
    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return y / y.exp().sum(1, keepdim=True)


maps("unpool", lambda y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2), "sound")
maps(
    "unpool flipped", lambda y: (lambda v, i: F.max_unpool2d(v.flip(1), i, 2))(*F.max_pool2d(y, 2, return_indices=True)), "sound"
)
maps(
    "unpool mixed",
    lambda y: (lambda v, i: F.max_unpool2d(torch.cat([v[:, 4:], v[:, :4]], 1), i, 2))(*F.max_pool2d(y, 2, return_indices=True)),
    "sound",
)
maps(
    "unpool other tensor",
    lambda y: (lambda v, i: F.max_unpool2d(F.avg_pool2d(y, 2).roll(1, 1), i, 2))(*F.max_pool2d(y, 2, return_indices=True)),
    "sound",
)
maps("full fill C", lambda y: y * torch.full((1, 1, 1, 1), y.shape[1], dtype=y.dtype), "sound")
maps("full fill C size C", lambda y: y + torch.full((y.shape[1], 1, 1), float(y.shape[1]), dtype=y.dtype), "sound")
maps("pad value C", lambda y: F.pad(y, (1, 1, 1, 1), value=y.shape[1]), "sound")
maps("pad amount C", lambda y: F.pad(y, (y.shape[1] // 4, 0)), "sound")
maps("roll C//2 on 2", lambda y: torch.roll(y, y.shape[1] // 2, 2), "sound")
maps("roll C//2 on 1", lambda y: torch.roll(y, y.shape[1] // 2, 1), "sound")
maps("index C//2 on 2", lambda y: y * y[:, :, y.shape[1] // 2 : y.shape[1] // 2 + 1], "sound")
maps("select C//2 on 2", lambda y: y * y[:, :, y.shape[1] // 2, None], "sound")
maps("bn eps 1/C", lambda y: F.batch_norm(y, None, None, training=True, eps=1 / y.shape[1]), "sound")
maps("layer scale C**-.5", lambda y: y * y.shape[1] ** -0.5, "sound")
maps("leaky relu 1/C", lambda y: F.leaky_relu(y, 1 / y.shape[1]), "sound")
maps("clamp C", lambda y: y.clamp(max=y.shape[1] / 16), "sound")
maps("pow C", lambda y: y ** (y.shape[1] // 4), "sound")
maps("two rolls", lambda y: y.roll((1, 2), (1, 1)), "sound")
maps("two rolls in turn", lambda y: y.roll(1, 1).roll(2, 1), "sound")
maps("roll two dims flat", lambda y: y.roll(3), "sound")
maps("nelement", lambda y: y / y.nelement(), "sound")
maps("nelement per row", lambda y: y * (y.nelement() / y.shape[0]), "sound")
maps("guard gt", lambda y: y * 2 if y.shape[1] > y.shape[2] else y, "sound")
maps("guard max shape", lambda y: y * max(y.shape[1:]), "sound")
maps("guard min shape", lambda y: y * min(y.shape[1:]), "sound")
maps("guard ==", lambda y: y * 2 if y.shape[1] == 8 else y, "sound")
maps("guard in", lambda y: y * 2 if y.shape[1] in (8, 16) else y, "sound")
maps("guard mod", lambda y: y * 2 if y.shape[1] % 8 == 0 else y, "sound")
maps("sorted shape", lambda y: y * sorted(y.shape[1:])[0], "sound")
maps("sum shape", lambda y: y * sum(y.shape[1:]), "sound")
maps("prod shape", lambda y: y * math.prod(y.shape[1:]), "sound")
maps("range loop C", lambda y: y + sum(y[:, k : k + 1] for k in range(y.shape[1])), "sound")
maps("dict by C", lambda y: y * {8: 2.0, 4: 3.0}.get(y.shape[1], 1.0), "sound")
maps("str by C", lambda y: y * float(f"{y.shape[1]}"), "sound")
rows("pairwise_distance", lambda y: y * F.pairwise_distance(y, y.cos()).unsqueeze(-1), "sound")
rows("pairwise_distance p1", lambda y: y * F.pairwise_distance(y, torch.zeros_like(y), p=1).unsqueeze(-1), "sound")
maps("nanmean", lambda y: y - y.nanmean(1, keepdim=True), "sound")
maps("nansum", lambda y: y - y.nansum(1, keepdim=True), "sound")
maps("mse sum", lambda y: y * F.mse_loss(y, torch.ones_like(y), reduction="sum"), "sound")
maps("l1 sum", lambda y: y * F.l1_loss(y, torch.ones_like(y), reduction="sum"), "sound")
maps("mse sum y", lambda y: y * F.mse_loss(y, y.cos(), reduction="sum"), "sound")
maps("kl sum", lambda y: y * F.kl_div(y, y.abs() + 1, reduction="sum"), "sound")
maps("bce sum", lambda y: y * F.binary_cross_entropy_with_logits(y, torch.ones_like(y), reduction="sum"), "sound")
maps("huber sum", lambda y: y * F.huber_loss(y, torch.ones_like(y), reduction="sum"), "sound")
maps("mse mean", lambda y: y * F.mse_loss(y, torch.ones_like(y)), "sound")
maps("composite", Composite(), "sound")
maps("expsum", ExpSum(), "sound")
maps("exp sum fn", lambda y: y / y.exp().sum(1, keepdim=True), "sound")
maps("cos mean", lambda y: y / (y.cos().sum(1, keepdim=True) + 9), "sound")
maps("prod", lambda y: y * y.prod(1, keepdim=True), "sound")
maps("prod+1", lambda y: y * (1 + y).prod(1, keepdim=True), "sound")
maps("logcumsumexp", lambda y: y.logcumsumexp(1), "sound")
maps("cummax", lambda y: y.cummax(1)[0], "sound")
maps("cumprod", lambda y: y.cumprod(1), "sound")
maps("var unbiased", lambda y: y * y.var(1, keepdim=True), "sound")
maps("all any", lambda y: y * (y > 0).any(1, keepdim=True), "sound")
maps("count nonzero", lambda y: y * (y > 0.3).sum(1, keepdim=True), "sound")
maps("count neg", lambda y: y * (y < 0.3).sum(1, keepdim=True), "sound")
maps("median", lambda y: y - y.median(1, keepdim=True)[0], "sound")
maps("quantile", lambda y: y - y.quantile(0.5, dim=1, keepdim=True), "sound")
maps(
    "unflatten heads",
    lambda y: y.flatten(2).transpose(1, 2).unflatten(2, (2, 4)).softmax(-1).flatten(2).transpose(1, 2).view(y.shape),
    "sound",
)
maps("unflatten batch", lambda y: y.unsqueeze(1).expand(-1, 2, -1, -1, -1).flatten(0, 1).unflatten(0, (-1, 2)).sum(1), "sound")
maps("split C by 2", lambda y: torch.cat(y.split(y.shape[1] // 2, 1)[::-1], 1), "sound")
maps("split(y.shape[1],2)", lambda y: y.split(y.shape[1], 2)[0], "sound")
maps("chunk input=", lambda y: torch.cat(torch.chunk(input=y, chunks=2, dim=1)[::-1], 1), "sound")
maps("gate repeat_interleave", lambda y: y * y.mean((2, 3), keepdim=True)[:, ::2].sigmoid().repeat_interleave(2, 1), "sound")
maps(
    "gate group repeat",
    lambda y: y * y.view(y.shape[0], 2, 4, 6, 6).mean((2, 3, 4)).sigmoid().repeat_interleave(4, 1)[:, :, None, None],
    "sound",
)
maps(
    "blur",
    lambda y: F.conv2d(y, torch.ones(1, 1, 3, 3, dtype=y.dtype).expand(y.shape[1], 1, 3, 3) / 9, padding=1, groups=y.shape[1]),
    "sound",
)
maps(
    "blur repeat",
    lambda y: F.conv2d(y, torch.ones(1, 1, 3, 3, dtype=y.dtype).repeat(y.shape[1], 1, 1, 1) / 9, padding=1, groups=y.shape[1]),
    "sound",
)
maps("cat empty", lambda y: torch.cat([y, torch.empty(y.shape[0], 0, 6, 6, dtype=y.dtype)], 1), "sound")
maps("groups then slice", lambda y: F.conv2d(y, torch.ones(8, 4, 1, 1, dtype=y.dtype), groups=2)[:, 3:7], "sound", out=4)
rows(
    "einsum lora",
    lambda y: y @ torch.einsum("ri,or->io", torch.ones(3, 8, dtype=y.dtype), torch.ones(8, 3, dtype=y.dtype)),
    "sound",
)
maps("repeat rows", lambda y: y.repeat(1, 2, 1, 1), "sound", out=16)
maps("glu", lambda y: F.glu(y, 1), "sound", out=4)
maps("fold unfold", lambda y: F.fold(F.unfold(y, 3, padding=1), (6, 6), 3, padding=1), "sound")
maps("lrn", lambda y: F.local_response_norm(y, 3), "sound")
maps("instance norm", lambda y: F.instance_norm(y), "sound")
maps("group norm 2", lambda y: F.group_norm(y, 2), "sound")
maps("group norm C", lambda y: F.group_norm(y, y.shape[1]), "sound")
maps("layer norm", lambda y: F.layer_norm(y, y.shape[1:]), "sound")
maps("rms", lambda y: y * torch.rsqrt(y.pow(2).mean(1, keepdim=True) + 1e-6), "sound")
maps("bilinear", lambda y: F.interpolate(y, scale_factor=2, mode="bilinear"), "sound")
maps("grid", lambda y: F.grid_sample(y, torch.zeros(y.shape[0], 3, 3, 2, dtype=y.dtype), align_corners=False), "sound")
maps("addcmul", lambda y: torch.addcmul(y, y, y.cos(), value=y.shape[1]), "sound")
maps("lerp", lambda y: torch.lerp(y, y.cos(), 1 / y.shape[1]), "sound")
maps("add alpha", lambda y: torch.add(y, y.cos(), alpha=y.shape[1]), "sound")
maps("arange C", lambda y: y * torch.arange(y.shape[1], dtype=y.dtype).view(-1, 1, 1), "sound")
maps("linspace C", lambda y: y * torch.linspace(0, 1, y.shape[1], dtype=y.dtype).view(-1, 1, 1), "sound")
maps("eye C", lambda y: torch.einsum("bchw,cd->bdhw", y, torch.eye(y.shape[1], dtype=y.dtype)), "sound")
maps("tril C", lambda y: torch.einsum("bchw,cd->bdhw", y, torch.ones(y.shape[1], y.shape[1], dtype=y.dtype).tril()), "sound")
maps("avg adaptive C", lambda y: F.adaptive_avg_pool2d(y, y.shape[1] // 4), "sound")
maps("view by C", lambda y: y.reshape(y.shape[0], y.shape[1], -1).mean(2)[:, :, None, None] * y, "sound")
maps("new_full", lambda y: y + y.new_full((y.shape[1], 1, 1), y.shape[1]), "sound")
maps("var one", lambda y: y / (y[:, :2].var(1, keepdim=True) + 1), "sound")
