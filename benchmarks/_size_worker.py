"""One large network on the meta device: ``python _size_worker.py KIND LAYERS`` prints one line of JSON."""

from __future__ import annotations

import json
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stp_fx


class GroupedQueries(nn.Module):
    """Attention with rotary positions and fewer key/value heads than query heads."""

    def __init__(self, width: int, heads: int, shared: int) -> None:
        super().__init__()
        self.heads, self.shared, self.size = heads, shared, width // heads
        self.query, self.output = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(width, shared * self.size, bias=False) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = (
            layer(x).view(batch, length, -1, self.size).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        query, key = (y * cos + _half_turned(y) * sin for y in (query, key))
        key, value = (self._repeated(y, batch, length) for y in (key, value))
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(y.transpose(1, 2).reshape(batch, length, -1))

    def _repeated(self, x: Tensor, batch: int, length: int) -> Tensor:
        wide = x[:, :, None].expand(batch, self.shared, self.heads // self.shared, length, self.size)
        return wide.reshape(batch, self.heads, length, self.size)


def _half_turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


class LlamaBlock(nn.Module):
    def __init__(self, width: int, heads: int, shared: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = GroupedQueries(width, heads, shared)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """The shape of Llama 3 70B (Grattafiori et al. 2024, table 3)."""

    def __init__(self, layers: int = 80, width: int = 8192, heads: int = 64, shared: int = 8, hidden: int = 28672,
                 vocabulary: int = 128256) -> None:  # fmt: skip
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads, shared, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.zeros(4096, width // heads))

    def forward(self, tokens: Tensor) -> Tensor:
        x, cos, sin = self.embedding(tokens), self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


class ViTBlock(nn.Module):
    """Attention and MLP side by side, queries and keys normalised."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.norm, self.qkv = heads, nn.LayerNorm(width), nn.Linear(width, 3 * width, bias=False)
        self.query_norm, self.key_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.output, self.up, self.down = nn.Linear(width, width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        y = self.norm(x)
        query, key, value = self.qkv(y).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(self.query_norm(query), self.key_norm(key), value)
        return x + self.output(attended.transpose(1, 2).reshape(batch, length, width)) + self.down(F.gelu(self.up(y)))


class ViT(nn.Module):
    """The shape of ViT-22B (Dehghani et al. 2023, table 1)."""

    def __init__(self, layers: int = 48, width: int = 6144, heads: int = 48, hidden: int = 24576) -> None:
        super().__init__()
        self.patches, self.positions = nn.Conv2d(3, width, 14, 14), nn.Parameter(torch.zeros(1, 256, width))
        self.blocks = nn.ModuleList(ViTBlock(width, heads, hidden) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            y = block(y)
        return self.head(self.norm(y).mean(1))


def hugging_face(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=8192, num_hidden_layers=layers, num_attention_heads=64, num_key_value_heads=8,
        intermediate_size=28672, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


TOKENS, IMAGES = (torch.int64, (2, 16)), (torch.bfloat16, (2, 3, 224, 224))
KINDS = {"llama": (Llama, TOKENS), "vit": (ViT, IMAGES), "hf-llama": (hugging_face, TOKENS)}


def main(kind: str, layers: int) -> None:
    torch.set_num_threads(1)
    factory, (dtype, shape) = KINDS[kind]
    with torch.device("meta"):
        model = factory(layers).to(torch.bfloat16).eval()
        example = torch.zeros(shape, dtype=dtype)
    marks = [time.perf_counter()]
    seconds: dict[str, float] = {}

    def done(phase: str) -> None:
        marks.append(time.perf_counter())
        seconds[phase] = marks[-1] - marks[-2]

    gm = stp_fx.trace(model, example, validate=False)
    done("trace")
    graph = stp_fx.analyze(gm)
    done("analyse")
    before = stp_fx.cost(gm)
    done("cost")
    pruned = stp_fx.prune_graph(gm, "random", 0.5, validate=False)
    done("plan and rewrite")
    plan = stp_fx.plan_of(pruned).to_json()
    done("plan as JSON")
    after = stp_fx.cost(pruned)
    assert all(p.is_meta for p in pruned.parameters())
    facts = {
        "seconds": seconds, "total": marks[-1] - marks[0], "groups": len(graph.groups), "units": graph.units,
        "params_before": before.params, "params_after": after.params, "macs_before": before.macs, "macs_after": after.macs,
        "plan_bytes": len(plan),
    }  # fmt: skip
    print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
