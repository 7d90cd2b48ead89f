"""The target "memory" with the keys and values that a generating loop keeps, against the caches that transformers makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import stp_fx
from stp_fx.analysis.attentions import find_attentions
from stp_fx.analysis.build import analyze
from stp_fx.errors import InputError
from stp_fx.passes import memory_model

transformers = pytest.importorskip("transformers")
WORDS = 40
COMMON = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "max_position_embeddings": 64}


def llama(**options: Any) -> nn.Module:
    config = transformers.LlamaConfig(**COMMON, num_attention_heads=8, num_key_value_heads=4, **options)
    return transformers.LlamaForCausalLM(config)


def qwen3(**options: Any) -> nn.Module:
    config = transformers.Qwen3Config(**COMMON, num_attention_heads=4, num_key_value_heads=2, head_dim=6, **options)
    return transformers.Qwen3ForCausalLM(config)


def gpt2(**options: Any) -> nn.Module:
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    config = transformers.GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=1, n_head=4, n_positions=64, **ends, **options)
    return transformers.GPT2LMHeadModel(config)


def kept_by(model: nn.Module, batch: int, tokens: int) -> int:
    """Bytes of the cache that a forward of transformers' own class fills."""
    with torch.no_grad():
        cache = model(torch.zeros(batch, tokens, dtype=torch.long), use_cache=True).past_key_values
    assert isinstance(cache, transformers.DynamicCache)
    tensors = [each for layer in cache.layers for each in (layer.keys, layer.values)]
    assert len(tensors) == 2
    return sum(each.numel() * each.element_size() for each in tensors)


def counted(gm: fx.GraphModule, plan: Any = None, **options: int) -> int:
    return memory_model(gm, **options).cache_bytes(analyze(gm).survivors(plan))


@pytest.mark.parametrize(
    ("make", "attention", "dtype"),
    [
        (llama, "sdpa", torch.float32),
        pytest.param(llama, "eager", torch.bfloat16, marks=pytest.mark.slow),
        (qwen3, "sdpa", torch.bfloat16),
        pytest.param(gpt2, "sdpa", torch.float32, marks=pytest.mark.slow),
        (gpt2, "eager", torch.float32),
    ],
)
def test_bytes_are_those_of_the_cache_before_and_after(make: Callable[..., nn.Module], attention: str, dtype: Any) -> None:
    torch.manual_seed(0)
    model = make(attn_implementation=attention).to(dtype).eval()
    ids = torch.randint(0, WORDS, (2, 7))
    gm = stp_fx.trace(model, ids, validate=False)
    before = kept_by(model, 3, 11)
    assert counted(gm, cache_tokens=11, cache_batch=3) == before
    assert counted(gm) == 0

    pruned = stp_fx.prune_graph(gm, "magnitude", 0.5, uniform=True, validate=False)
    smaller = stp_fx.write_back(pruned, model)
    after = kept_by(smaller, 3, 11)
    assert after == before // 2, "half of the heads are left"
    assert counted(pruned, cache_tokens=11, cache_batch=3) == after
    assert counted(gm, stp_fx.plan_of(pruned), cache_tokens=11, cache_batch=3) == after  # foreseen
    again = stp_fx.trace(smaller, ids, validate=False)
    assert counted(again, cache_tokens=11, cache_batch=3) == after


def test_head_dimensions_count_as_well() -> None:
    """Half of the positions of every head: no class has them, so the shapes are counted by hand."""
    torch.manual_seed(0)
    gm = stp_fx.trace(llama().eval(), torch.randint(0, WORDS, (2, 7)), validate=False)
    pruned = stp_fx.prune_graph(gm, "magnitude", 0.5, products="inner", ignore=["lm_head", "*norm*"], validate=False)
    sizes = {name: tuple(p.shape) for name, p in pruned.named_parameters()}
    by_hand = sum(4 * 5 * sizes[f"model.layers.0.self_attn.{which}_proj.weight"][0] for which in "kv")
    assert by_hand < 2 * 4 * 5 * 16, "no head has lost a dimension"
    assert counted(pruned, cache_tokens=5) == by_hand
    assert counted(gm, stp_fx.plan_of(pruned), cache_tokens=5) == by_hand


class Decoder(nn.Module):
    """A causal attention as ``form`` writes it, whose keys and values serve ``share`` query heads each."""

    def __init__(self, form: str, share: int = 2) -> None:
        super().__init__()
        self.form, self.share = form, share
        self.q, self.k, self.v, self.o = (nn.Linear(8, size) for size in (16, 16 // share, 12 // share, 8))
        self.o = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            part(x).view(batch, tokens, -1, size).transpose(1, 2) for part, size in zip((self.q, self.k, self.v), (4, 4, 3))
        )
        if self.form == "flag":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return self.o(y.transpose(1, 2).flatten(2))
        k, v = (each.repeat_interleave(self.share, 1) for each in (k, v))
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        if self.form == "einsum":
            scores = torch.einsum("bhsd,bhtd->bhst", q, k) / 2
            y = torch.einsum("bhst,bhtv->bhsv", scores.masked_fill(hidden, -1e9).softmax(-1), v)
        elif self.form == "keys first":
            scores = torch.einsum("bhtd,bhsd->bhst", k, q) / 2
            y = torch.softmax(torch.where(hidden, -1e9, scores), -1).to(v.dtype) @ v
        elif self.form == "baddbmm":  # heads lie in the batch, as in Bloom
            q, k, v = (each.reshape(batch * 4, tokens, -1) for each in (q, k, v))
            scores = torch.zeros(1, tokens, tokens, dtype=x.dtype, device=x.device).masked_fill(hidden, -1e9)
            scores = torch.baddbmm(scores.expand(batch * 4, -1, -1), batch1=q, batch2=k.mT, alpha=0.5).view(
                batch, 4, tokens, tokens
            )
            y = torch.bmm(F.softmax(scores, -1).view(batch * 4, tokens, tokens), v).view(batch, 4, tokens, 3)
        elif self.form == "added":
            scores = q @ k.mT * 0.5 + torch.zeros(1, 1, tokens, tokens, device=x.device).masked_fill(hidden, -1e9)
            y = F.dropout(F.softmax(scores, dim=3), 0.1, self.training).matmul(v)
        else:
            y = F.softmax(torch.matmul(q, k.transpose(2, 3)), -1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """An attention, and a layer in between whose weights are so small that they go first."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.up, self.down = Decoder("flag"), nn.Linear(8, 400), nn.Linear(400, 8)
        with torch.no_grad():
            self.up.weight.mul_(1e-4)
            self.down.weight.mul_(1e-4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.down(F.relu(self.up(x)))


@pytest.mark.parametrize("options", [{}, {"cache_tokens": 2048}, {"cache_tokens": 256, "cache_batch": 16}])
def test_the_target_is_met_and_the_cache_shifts_what_is_removed(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    gm = stp_fx.trace(Block().eval(), torch.randn(2, 5, 8), validate=False)
    pruned = stp_fx.prune_graph(gm, "magnitude", 0.4, target="memory", scope="global", validate=False, **options)
    before, after = (memory_model(each, **options).predict(analyze(each).survivors()) for each in (gm, pruned))
    assert 0.3 * before < after <= 0.6 * before
    whole, left = (counted(each, cache_tokens=1) for each in (gm, pruned))
    assert whole == 4 * 14
    if options:  # 115 KB and 229 KB of cache beside 30 KB of weights
        assert left < whole
    else:
        assert left == whole


FORMS = ["flag", "einsum", "keys first", "baddbmm", "added"]


@pytest.mark.parametrize("form", FORMS)
def test_keys_and_values_are_found_however_attention_is_written(form: str) -> None:
    gm = stp_fx.trace(Decoder(form).double().eval(), torch.randn(3, 5, 8, dtype=torch.float64), validate=False)
    (found,) = find_attentions(gm)
    assert (found.batch, found.tokens, found.masked, found.decodes) == (3, 5, True, True)
    # Keys of 2 heads x 4, values of 2 heads x 3: once for the two queries that share them.
    assert counted(gm, cache_tokens=7, cache_batch=2) == 8 * 7 * 2 * (2 * 4 + 2 * 3)
    plan = stp_fx.analyze(gm).plan_for({"v": [0, 3]})  # one position of every head
    assert counted(gm, plan, cache_tokens=7, cache_batch=2) == 8 * 7 * 2 * (2 * 4 + 2 * 2)
    pruned = stp_fx.apply_plan(gm, plan)
    assert counted(pruned, cache_tokens=7, cache_batch=2) == 8 * 7 * 2 * (2 * 4 + 2 * 2)


class Twice(nn.Module):
    """Two queries, one after the other, that read the same keys and values, with a mask among the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.r, self.kv = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        k, v = self.kv(x).view(*x.shape[:2], 2, 2, 4).permute(2, 0, 3, 1, 4)
        for part in (self.q, self.r):
            q = part(x).view(*x.shape[:2], 2, 4).transpose(1, 2)
            x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return x


class Translator(nn.Module):
    """Two layers of an encoder with a bias, as T5 has, and two of a decoder that reads it: all through one function."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.own, self.cross = (nn.ModuleList(nn.Linear(8, 24) for _ in range(2)) for _ in range(3))
        self.bias = nn.Parameter(torch.zeros(2, 1, 1))

    def attend(self, x: Tensor, read: Tensor, layer: nn.Module, mask: Tensor | None) -> Tensor:
        split = [part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (layer(x)[..., :8], *layer(read)[..., 8:].chunk(2, -1))]
        return x + F.scaled_dot_product_attention(*split, attn_mask=mask).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.encoder:
            x = self.attend(x, x, layer, self.bias.expand(2, x.shape[1], x.shape[1]))
        hidden = torch.ones(y.shape[1], y.shape[1], dtype=torch.bool, device=y.device).tril()
        for own, cross in zip(self.own, self.cross, strict=True):
            y = self.attend(y, y, own, hidden)
            y = self.attend(y, x, cross, self.bias.expand(2, y.shape[1], x.shape[1]))
        return y


def test_of_an_encoder_and_a_decoder_the_decoder_keeps_its_own() -> None:
    gm = stp_fx.trace(Translator().eval(), (torch.randn(2, 6, 8), torch.randn(2, 5, 8)), validate=False)
    found = find_attentions(gm)
    assert [each.tokens for each in found] == [6, 6, 5, 6, 5, 6]
    assert all(each.masked for each in found)
    assert [each.decodes for each in found] == [False, False, True, False, True, False]
    assert counted(gm, cache_tokens=3, cache_batch=2) == 2 * 3 * 2 * 4 * 16


def test_what_two_attentions_read_is_kept_once() -> None:
    gm = stp_fx.trace(Twice().eval(), (torch.randn(2, 5, 8), torch.zeros(2, 1, 5, 5)), validate=False)
    assert len(find_attentions(gm)) == 2
    assert counted(gm, cache_tokens=1) == 4 * 16


def test_what_keeps_nothing_is_refused_before_data_are_read() -> None:
    gm = stp_fx.trace(Decoder("bidirectional").eval(), torch.randn(3, 5, 8), validate=False)
    assert [each.decodes for each in find_attentions(gm)] == [False]
    with pytest.raises(InputError, match="no self-attention of the graph is causal or has a mask"):
        memory_model(gm, cache_tokens=1)

    def never() -> Any:
        raise AssertionError("a batch was read")
        yield

    with pytest.raises(InputError, match="no self-attention of the graph is causal or has a mask"):
        stp_fx.prune_graph(gm, "variance", 0.2, target="memory", cache_tokens=8, calibration=never())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_tokens": 8}, "give target='memory' with it, or leave it out for 'channels'"),
        ({"cache_tokens": 8, "target": "macs"}, "or leave it out for 'macs'"),
        ({"cache_tokens": -1, "target": "memory"}, "`cache_tokens` is a whole number of tokens"),
        ({"cache_tokens": 1.5, "target": "memory"}, "`cache_tokens` is a whole number of tokens"),
        ({"cache_tokens": True, "target": "memory"}, "`cache_tokens` is a whole number of tokens"),
        ({"cache_tokens": 8, "cache_batch": 0, "target": "memory"}, "`cache_batch` is a whole number of sequences"),
        ({"cache_batch": 2, "target": "memory"}, "give that as well"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        stp_fx.Selection(0.5, **options)


def test_the_default_counts_no_cache() -> None:
    selection = stp_fx.Selection(0.5, target="memory")
    assert (selection.cache_tokens, selection.cache_batch) == (0, 1)
    told = dataclasses.replace(selection, cache_tokens=64, cache_batch=2)
    assert repr(told) == "Selection(0.5, target='memory', cache_tokens=64, cache_batch=2)"
