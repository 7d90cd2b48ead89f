"""Hugging Face: what is written back generates, encodes, saves, and loads in a fresh process."""

from __future__ import annotations

import functools
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import stp_fx
from stp_fx.errors import WriteBackError

transformers = pytest.importorskip("transformers", exc_type=ImportError)

IDS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
COMMON = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 64}


@functools.cache
def captured(name: str) -> tuple[Any, fx.GraphModule]:
    """A network with weights that make attention anything but uniform, and its graph."""
    torch.manual_seed(0)
    if name == "llama":
        config = transformers.LlamaConfig(**COMMON, num_attention_heads=8, num_key_value_heads=2, initializer_range=0.2)
        model, more = transformers.LlamaForCausalLM(config), {"use_cache": False}
    elif name == "tied":
        config = transformers.LlamaConfig(**COMMON, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True)
        model, more = transformers.LlamaForCausalLM(config), {"use_cache": False}
    elif name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
        )
        model, more = transformers.GPT2LMHeadModel(config), {"use_cache": False}
    else:
        config = transformers.BertConfig(**COMMON, num_attention_heads=4, initializer_range=0.2)
        kind = transformers.BertModel if name == "bert" else transformers.BertForMaskedLM
        model, more = kind(config), {}
    model = model.eval()
    arguments = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), **more}
    return model, stp_fx.trace(model, (), kwargs=arguments)


def graph_output(graph: fx.GraphModule, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
    with torch.no_grad():
        return next(iter(graph(**given).values()))


def greedy(graph: fx.GraphModule, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """Generation by the graph alone, one token at a time."""
    for _ in range(steps):
        ids = torch.cat([ids, graph_output(graph, ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


FRESH = """
import sys, torch, transformers
given = torch.load("given.pt")
out = {}
for kind in sys.argv[1:]:
    model = getattr(transformers, kind).from_pretrained(kind).eval()
    with torch.no_grad():
        out[kind] = model(**given)[0]
        if model.can_generate():
            out["tokens"] = model.generate(**given, max_new_tokens=6, do_sample=False)
torch.save((out, [name for name in sys.modules if name.startswith("stp_fx")]), "out.pt")
"""


def test_saved_and_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    torch.save(given, tmp_path / "given.pt")
    graphs = {}
    for name, options in (("llama", {"products": "outer"}), ("bert", {"products": "none"}), ("masked", {"products": "outer"})):
        model, graph = captured(name)
        pruned = stp_fx.prune_graph(graph, **options)
        kind = type(model).__name__
        stp_fx.write_back(pruned, model).save_pretrained(tmp_path / kind)
        graphs[kind] = pruned
    subprocess.run([sys.executable, "-c", FRESH, *graphs], check=True, capture_output=True, cwd=tmp_path)
    found, ours = torch.load(tmp_path / "out.pt")
    assert not ours
    for kind, pruned in graphs.items():
        torch.testing.assert_close(found[kind], graph_output(pruned, IDS), rtol=1e-4, atol=1e-4)
    assert torch.equal(found["tokens"], greedy(graphs["LlamaForCausalLM"], IDS, 6))


def test_llama_with_grouped_queries_generates_as_its_graph_does() -> None:
    model, graph = captured("llama")
    pruned = stp_fx.prune_graph(graph, products="outer")
    result = stp_fx.write_back(pruned, model)
    assert type(result) is type(model)
    config = result.config
    found = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    assert found == (32, 48, 4, 1, 8)
    assert (model.config.hidden_size, model.config.num_attention_heads, model.config.intermediate_size) == (64, 8, 96)
    assert result.model.layers[0].self_attn.config is config
    assert (result.model.layers[0].self_attn.num_key_value_groups, result.model.layers[1].mlp.intermediate_size) == (4, 48)

    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    with torch.no_grad():
        torch.testing.assert_close(result(IDS, mask).logits[1], graph_output(pruned, IDS, mask)[1])
        hidden = result(IDS, output_hidden_states=True).hidden_states
    assert [h.shape[-1] for h in hidden] == [32, 32, 32]
    # with and without a cache of keys and values, whose sizes follow from the config too
    expected = greedy(pruned, IDS, 6)
    for cached in (True, False):
        tokens = result.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False, use_cache=cached)
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize(
    ("name", "options", "fields"),
    [
        ("bert", {"products": "none"}, (64, 48, 4)),
        ("masked", {"products": "outer"}, (32, 48, 2)),
        ("masked", {"products": "none", "ratio": 0.25, "round_to": 4}, None),
    ],
)
def test_bert_encodes_as_its_graph_does(name: str, options: dict[str, Any], fields: Any) -> None:
    model, graph = captured(name)
    pruned = stp_fx.prune_graph(graph, **options)
    if fields is None:  # a hidden size of 48 makes heads of 12, while the heads are still 16 wide
        with pytest.raises(WriteBackError, match=r"config\.hidden_size = 64"):
            stp_fx.write_back(pruned, model)
        return
    result = stp_fx.write_back(pruned, model)
    config = result.config
    assert (config.hidden_size, config.intermediate_size, config.num_attention_heads) == fields
    assert config.max_position_embeddings == 64
    for ids in (IDS, IDS[:, :5].repeat(2, 1)):
        with torch.no_grad():
            torch.testing.assert_close(result(ids)[0], graph_output(pruned, ids), rtol=1e-4, atol=1e-4)


def test_a_field_that_says_nothing_is_filled_and_ties_stay() -> None:
    """GPT-2's inner size is None for four times the width; its output layer is its embedding."""
    model, graph = captured("gpt2")
    pruned = stp_fx.prune_graph(
        graph, products="outer", ratio=0.5, ratios={f"transformer.h.{k}.mlp.c_fc": 0.25 for k in range(2)}
    )
    result = stp_fx.write_back(pruned, model)
    assert (model.config.n_inner, result.config.n_inner) == (None, 192)
    assert (result.config.n_embd, result.config.n_head) == (32, 2)
    assert result.lm_head.weight is result.transformer.wte.weight
    model, graph = captured("tied")
    result = stp_fx.write_back(stp_fx.prune_graph(graph, products="outer"), model)
    assert result.lm_head.weight is result.model.embed_tokens.weight
    assert result.config.num_key_value_heads == result.config.num_attention_heads == 2


def test_what_a_config_cannot_say_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    model, graph = captured("bert")
    before = model.config.to_dict()
    scales = hasattr(model.encoder.layer[0].attention.self, "scaling")  # before transformers 5 code computes it at each call
    if not scales:
        with pytest.raises(WriteBackError, match=r"Constants in the way: the scale 0.25"):
            stp_fx.write_back(stp_fx.prune_graph(graph, products="inner"), model)
    for products in ("outer", "inner") if scales else ("outer",):
        pruned = stp_fx.prune_graph(graph, products=products)
        with pytest.raises(
            WriteBackError, match=r"query.weight is built as \[64, 64\], \[32, 64\] is needed.*hidden_size"
        ) as refusal:
            stp_fx.write_back(pruned, model)
        assert refusal.value.constants[0].startswith("config.hidden_size = 64")
        with caplog.at_level(logging.WARNING, "stp_fx"):
            result = stp_fx.write_back(pruned, model, strict_config=False)
        assert "from_pretrained will not work" in caplog.text
        with torch.no_grad():
            torch.testing.assert_close(result(IDS)[0], graph_output(pruned, IDS), rtol=1e-4, atol=1e-4)
        assert result.encoder.layer[0].attention.self.attention_head_size == (16 if products == "outer" else 8)
    assert model.config.to_dict() == before

    # head sizes and the width in proportion: shapes that the config can say, but it scales attention anew
    model, graph = captured("masked")
    reason = r"self.scaling is computed as 0.353553, 0.25 is needed" if scales else "the scale 0.25"
    with pytest.raises(WriteBackError, match=reason):
        stp_fx.write_back(stp_fx.prune_graph(graph, products="inner"), model)


def test_rotations_and_layers_that_disagree_are_refused() -> None:
    model, graph = captured("llama")
    with pytest.raises(WriteBackError, match="inv_freq is not saved but computed") as refusal:
        stp_fx.write_back(stp_fx.prune_graph(graph, products="inner"), model)
    assert any("head_dim" in each for each in refusal.value.constants)
    pruned = stp_fx.prune_graph(graph, products="none", ratios={"model.layers.1.mlp.up_proj": 0.25})
    with pytest.raises(WriteBackError, match=r"config\.intermediate_size = 96 \(tried 48, 72\)"):
        stp_fx.write_back(pruned, model)
    result = stp_fx.write_back(pruned, model, strict_config=False)
    assert [layer.mlp.up_proj.out_features for layer in result.model.layers] == [48, 72]
    tokens = result.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, greedy(pruned, IDS, 4))
