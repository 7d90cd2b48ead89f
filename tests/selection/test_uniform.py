"""``uniform=True``: one fraction for all groups, which the configuration of a model can say."""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

import stp_fx
from stp_fx.errors import InputError, TargetError
from stp_fx.selection import Shortfall
from stp_fx.selection import select_units as select


def kept(groups: Any, found: Any) -> list[Fraction]:
    return [Fraction(int((~found.removed[g.units]).sum()), g.size) for g in groups]


@given(
    st.integers(2, 12),
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.floats(0.0, 0.95),
    st.sampled_from(["channels", "macs"]),
    st.sampled_from([1, 2, 4]),
)
def test_every_group_keeps_the_same_fraction(
    make_groups: Any, divisor: int, times: list[int], ratio: float, target: str, round_to: int
) -> None:
    sizes = [divisor * each for each in times]
    groups = make_groups(sizes)
    total = sum(sizes)
    rng = np.random.default_rng(0)
    cost = None if target == "channels" else lambda removed: float(np.prod([(~removed[g.units]).sum() for g in groups]))
    scores = [rng.random(size) for size in sizes]

    def run() -> Any:
        return select(groups, scores, total=total, ratio=ratio, target=target, cost=cost, round_to=round_to, uniform=True)

    try:
        found = run()
    except (InputError, TargetError):  # constraints that leave no room, which the tests below hold to their words
        assert round_to > 1 or target == "macs"
        return
    shares = kept(groups, found)
    assert len(set(shares)) == 1
    for group, values in zip(groups, scores, strict=True):  # the lowest scores go
        flags = found.removed[group.units]
        assert not flags.any() or values[flags].max() <= values[~flags].min()
        assert flags.sum() == 0 or (~flags).sum() % round_to == 0
    if target == "channels":
        assert 1 - shares[0] <= ratio + 1e-9
        step = Fraction(1, int(np.gcd.reduce(sizes)))
        assert round_to > 1 or ratio - (1 - shares[0]) < step or shares[0] == step
    else:
        assert cost is not None
        assert cost(found.removed) <= (1 - ratio) * cost(np.zeros(total, dtype=bool)) * (1 + 1e-9)


def test_what_is_missed_is_said(make_groups: Any) -> None:
    groups = make_groups([12, 4])
    found = select(groups, [np.arange(12.0), np.arange(4.0)], total=16, ratio=0.6, uniform=True)
    assert kept(groups, found) == [Fraction(1, 2)] * 2
    assert found.shortfalls == (Shortfall(None, 0.6, 0.5, 1.0, ("uniform",)),)
    assert found.notes == (
        "uniform: asked to remove 0.6 of the channels, the plan removes 0.5; the fractions that divide all groups are "
        "0, 0.25, 0.5, 0.75",
    )
    assert not select(groups, [np.arange(12.0), np.arange(4.0)], total=16, ratio=0.5, uniform=True).notes


def test_what_it_cannot_do_is_refused(make_groups: Any) -> None:
    groups = make_groups([7, 4])
    scores = [np.arange(7.0), np.arange(4.0)]
    with pytest.raises(InputError, match=r"sizes share no divisor \(the smallest is 'g1' of 4 units, the largest has 7\)"):
        select(groups, scores, total=11, ratio=0.5, uniform=True)
    found = select(groups, scores, total=11, ratio=0.5, ratios={groups[0].index: 0.3}, uniform=True)
    assert kept(groups, found) == [Fraction(5, 7), Fraction(1, 2)]
    several = make_groups([8, 4])
    exponents = {group.index: 2 for group in several}
    with pytest.raises(InputError, match="removes one factor of a product"):
        select(several, [np.arange(8.0), np.arange(4.0)], total=12, ratio=0.5, uniform=True, exponents=exponents)

    def cost(removed: np.ndarray) -> float:
        return float(4 - removed[groups[1].units].sum())

    with pytest.raises(TargetError, match=r"out of reach with uniform=True: at most 0\.75 can be removed"):
        select(groups, scores, total=11, ratio=0.9, ratios={groups[0].index: 0.0}, target="macs", cost=cost, uniform=True)
    with pytest.raises(InputError, match="scope='global' does not go with it"):
        stp_fx.prune_graph(nn.Linear(2, 2), scope="global", uniform=True, example_inputs=torch.randn(1, 2))
    with pytest.raises(InputError, match="`uniform`"):
        stp_fx.prune_graph(nn.Linear(2, 2), uniform="yes", example_inputs=torch.randn(1, 2))  # type: ignore[arg-type]


def configured() -> dict[str, Any]:
    transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 90}
    image = {**sizes, "image_size": 16, "patch_size": 4}
    del image["vocab_size"]
    return {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=90)),
        "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)),
        "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**image)),
    }


@functools.cache
def traced(name: str) -> tuple[nn.Module, torch.Tensor, fx.GraphModule]:
    """A model, an input and its graph, which are only read."""
    torch.manual_seed(0)
    model = configured()[name]().eval()
    x = torch.randn(2, 3, 16, 16) if name == "vit" else torch.randint(0, 90, (2, 7))
    return model, x, stp_fx.trace(model, x)


@pytest.mark.parametrize("options", [{}, {"target": "macs"}], ids=["channels", "macs"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_configurations_say_it(name: str, options: dict[str, Any], tmp_path: Any) -> None:
    model, x, gm = traced(name)
    pruned = stp_fx.prune_graph(gm, ratio=0.5, uniform=True, **options)
    written = stp_fx.write_back(pruned, model)
    written.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(x).logits, pruned(x).logits)
    assert stp_fx.cost(pruned).macs <= 0.5 * stp_fx.cost(gm).macs
    if name in ("llama", "gpt2"):
        assert loaded.generate(x[:1], max_new_tokens=3, do_sample=False).shape == (1, 10)
