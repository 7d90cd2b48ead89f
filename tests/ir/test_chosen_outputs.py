"""``outputs=``: the graph gives what is asked for, and by-products no longer hold the widths of a network."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stp_fx
from stp_fx.errors import InputError
from stp_fx.io import load, save
from stp_fx.ir import provenance_of

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
Pair = collections.namedtuple("Pair", ["logits", "hidden"])


@dataclasses.dataclass
class Found:
    logits: Tensor | None = None
    hidden: Tensor | None = None


FORMS: dict[str, Any] = {
    "dict": (lambda a, b: {"logits": a, "hidden": b}, "logits"),
    "tuple": (lambda a, b: (a, b), 0),
    "list": (lambda a, b: [a, b], 0),
    "named tuple": (Pair, "logits"),
    "dataclass": (Found, "logits"),
}


class Two(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.stem, self.head, self.form = nn.Linear(6, 16), nn.Linear(16, 3), FORMS[form][0]

    def forward(self, x: Tensor) -> Any:
        hidden = self.stem(x).relu()
        return self.form(self.head(hidden), hidden)


def first(value: Any) -> Any:
    if isinstance(value, (dict, tuple, list)):
        return next(iter(value.values() if isinstance(value, dict) else value))
    return value.logits


@pytest.mark.parametrize("frontend", ["fx", "export"])
@pytest.mark.parametrize("form", FORMS)
def test_the_rest_is_none_and_the_width_is_free(form: str, frontend: str) -> None:
    if form == "dataclass" and frontend == "export":
        pytest.skip("torch.export takes dataclasses only where they are registered with pytree")
    model, name = Two(form).eval(), FORMS[form][1]
    whole = stp_fx.trace(model, X, frontend=frontend)
    assert not stp_fx.analyze(whole).groups
    gm = stp_fx.trace(model, X, frontend=frontend, outputs=name)
    found = gm(X)
    assert type(found) is type(model(X))
    torch.testing.assert_close(first(found), first(model(X)))
    rest = found[1] if isinstance(found, (tuple, list)) else found.get("hidden") if isinstance(found, dict) else found.hidden
    assert rest is None
    assert [group.size for group in stp_fx.analyze(gm).groups] == [16]
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    assert pruned.get_parameter("stem.weight").shape == (8, 6)
    written = stp_fx.write_back(pruned, model)
    torch.testing.assert_close(first(written(X)), first(pruned(X)))


def test_prune_graph_takes_it_and_files_keep_it(tmp_path: Path) -> None:
    model = Two("dict").eval()
    pruned = stp_fx.prune_graph(model, example_inputs=X, outputs=["logits"])
    save(pruned, tmp_path / "net.safetensors")
    loaded = load(tmp_path / "net.safetensors", Two("dict").eval())
    assert loaded(X)["hidden"] is None
    torch.testing.assert_close(loaded(X)["logits"], pruned(X)["logits"])
    both = stp_fx.prune_graph(model, example_inputs=X, outputs=("logits",), ratio=0.25)
    assert both(X)["logits"].shape == (2, 3)


def test_what_is_not_there_is_named() -> None:
    model = Two("dict").eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match=r"asks for 'logit', but the output has 'logits', 'hidden'"):
        stp_fx.trace(model, X, outputs="logit")
    with pytest.raises(InputError, match=r"asks for 2, but the output has 0, 1"):
        stp_fx.trace(Two("tuple"), X, outputs=2)
    with pytest.raises(InputError, match=r"asks for 0, but the output is a Tensor"):
        stp_fx.trace(nn.Linear(6, 2), X, outputs=0)
    for wrong in (1.5, (), [None], True):
        with pytest.raises(InputError, match="give keys, fields or positions of outputs"):
            stp_fx.trace(model, X, outputs=wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"give it to stp_fx\.trace"):
        stp_fx.prune_graph(stp_fx.trace(model, X), outputs="logits")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Auxiliary(nn.Module):
    """Hands out a second head's scores in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.second = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        hidden = self.stem(x).relu()
        return Found(self.head(hidden), self.second(hidden)) if self.training else self.head(hidden)


@pytest.mark.parametrize("training", [True, False])
def test_an_output_without_parts_stays_whole_in_its_mode(training: bool) -> None:
    model = Auxiliary().train(training)
    gm = stp_fx.trace(model, X, outputs="logits")
    assert provenance_of(gm).validation.differs == {}
    torch.testing.assert_close(gm.eval()(X), model.eval()(X))
    found = gm.train()(X)
    assert found.hidden is None
    torch.testing.assert_close(found.logits, model.train()(X).logits)
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    written = stp_fx.write_back(pruned, model)
    torch.testing.assert_close(written.eval()(X), pruned.eval()(X))


class Sized(nn.Module):
    """Reads the shape of one channel, as code does that wants the shape without the channels."""

    def __init__(self, read: Any) -> None:
        super().__init__()
        self.stem, self.head, self.read = nn.Linear(6, 16), nn.Linear(16, 3), read

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x[:, None].expand(-1, 5, -1)).relu()
        return self.head(x) + self.read(x)


READS: dict[str, Any] = {
    "shape": lambda x: torch.arange(x[..., -1].shape[1])[None, :, None],
    "size": lambda x: x[:, :, 15].size(1),
    "zeros_like": lambda x: torch.zeros_like(x[..., 7])[..., None],
    "new_ones": lambda x: x[..., 3].new_ones(1),
    "select": lambda x: torch.ones_like(x.select(-1, 15))[..., None],
}
NUMBERS: dict[str, Any] = {
    "itself": lambda x: x[..., -1:],
    "second operand": lambda x: torch.zeros(1).type_as(x[..., -1]) + x[..., -1][..., None],
}


@pytest.mark.parametrize("read", [*READS, *NUMBERS])
def test_a_channel_that_is_read_for_its_size_may_go(read: str) -> None:
    model = Sized({**READS, **NUMBERS}[read]).eval()
    gm = stp_fx.trace(model, X)
    assert [group.size for group in stp_fx.analyze(gm).groups] == [16 if read in READS else 15]
    for keep in ([0], [3, 7], list(range(8))):
        if read in NUMBERS:
            keep = [*keep, 15]
        gone = [k for k in range(16) if k not in keep]
        plan = stp_fx.analyze(gm).plan_for({"stem": gone})
        masked, removed = stp_fx.apply_plan(gm, plan, mask=True), stp_fx.apply_plan(gm, plan)
        for x in (X, X[:1].repeat(4, 1)):
            torch.testing.assert_close(removed.double()(x.double()), masked.double()(x.double()))
