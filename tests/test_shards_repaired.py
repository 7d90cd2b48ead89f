"""Checkpoints planned and repaired shard by shard: what comes out is what the same does in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import stp_fx
from stp_fx.errors import FileError, InputError
from stp_fx.ir.streamed import Streamed

IMAGES = [torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(3)]
TOKENS = [torch.randint(0, 40, (4, 7), generator=torch.Generator().manual_seed(k)) for k in range(3)]


class Residual(nn.Module):
    """Convolutions with norms on a stream, one of them grouped, and a linear layer that is called as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(True), nn.Conv2d(12, 8, 1))
            for _ in range(2)
        )
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.head = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return F.linear(self.grouped(x.relu()).relu().mean((2, 3)), self.head)


class Attention(nn.Module):
    """A ViT: patches, a class token, positions, pre-norm blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 5, 16))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 24, 0.0, "gelu", 1e-5, True, True) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Tied(nn.Module):
    """An embedding that is the output layer as well, RMSNorm, an MLP; a table that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(40, 12), nn.RMSNorm(12)
        self.up, self.down = nn.Linear(12, 20, bias=False), nn.Linear(20, 12, bias=False)
        self.head = nn.Linear(12, 40, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.linspace(0.5, 1.5, 7)[:, None], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embedding(x) * self.table
        return self.head(self.norm(y + self.down(F.silu(self.up(self.norm(y))))))


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 40}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2))


@dataclasses.dataclass(frozen=True)
class Case:
    """A network with batches, and the buffers that a graph on the meta device is given."""

    make: Callable[[], nn.Module]
    batches: list[torch.Tensor]
    buffers: tuple[str, ...] = ()


CASES = {
    "CNN": Case(Residual, IMAGES),
    "ViT": Case(Attention, IMAGES),
    "tied": Case(Tied, TOKENS, ("table",)),
    "Llama": Case(llama, TOKENS, ("model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq")),
}


def captured(case: Case, device: str, like: torch.fx.GraphModule | None = None) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    with torch.device(device):
        model = case.make().double().eval()
    gm = stp_fx.trace(model, case.batches[0].to(device), validate=False)
    for name, buffer in gm.named_buffers() if like is None else ():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    known = {} if like is None else dict(like.named_buffers())
    for name in case.buffers if like is not None else ():
        if name in known:
            owner, _, own = name.rpartition(".")
            setattr(gm.get_submodule(owner), own, known[name])
    return gm


def written(gm: torch.fx.GraphModule, folder: Path, dtype: torch.dtype | None = None, shards: int = 3) -> Path:
    folder.mkdir()
    state = {
        name: t.clone() if dtype is None or not t.is_floating_point() else t.to(dtype) for name, t in gm.state_dict().items()
    }
    names = list(state)
    for k in range(shards):
        save_file({name: state[name] for name in names[k::shards]}, folder / f"model-{k}.safetensors")
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", CASES)
def test_what_is_planned_and_repaired_in_memory(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    gm = captured(case, "cpu")
    on_meta = captured(case, "meta", gm)
    whole = written(gm, tmp_path / "whole")
    pruned = stp_fx.prune_graph(gm, "variance", 0.4, calibration=case.batches, compensation="sequential", validate=False)
    plan = stp_fx.plan_shards(on_meta, whole, "variance", 0.4, calibration=case.batches)
    assert plan == stp_fx.plan_of(pruned)
    stp_fx.prune_shards(on_meta, plan, whole, tmp_path / "cut", compensation="sequential", calibration=case.batches, memory=0)
    found, expected = read(tmp_path / "cut"), pruned.state_dict()
    plain = stp_fx.apply_plan(gm, plan, validate=False).state_dict()
    assert set(found) == set(expected)
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-9)
    changed = [key for key in found if not torch.equal(expected[key], plain[key])]
    assert len(changed) >= 2
    assert all(not torch.equal(found[key], plain[key]) for key in changed)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "whole"]
    assert all(t.is_meta for t in on_meta.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_of_half_precision_are_repaired_in_the_precision_of_the_graph(tmp_path: Path, dtype: torch.dtype) -> None:
    case = CASES["ViT"]
    whole = written(captured(case, "cpu"), tmp_path / "whole", dtype)
    gm = captured(case, "cpu")
    gm.load_state_dict(read(whole))
    on_meta = captured(case, "meta", gm)
    pruned = stp_fx.prune_graph(gm, "magnitude", 0.4, calibration=case.batches, compensation="sequential", validate=False)
    plan = stp_fx.plan_shards(on_meta, whole, ratio=0.4)
    assert plan == stp_fx.plan_of(pruned)
    stp_fx.prune_shards(on_meta, plan, whole, tmp_path / "cut", compensation="sequential", calibration=case.batches)
    found = read(tmp_path / "cut")
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, pruned.state_dict()[key].to(dtype), rtol=0, atol=1e-9)


def test_few_tensors_are_in_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [each for _ in range(12) for each in (nn.Linear(16, 16), nn.ReLU())]
    case = Case(lambda: nn.Sequential(*layers), [torch.randn(64, 16, dtype=torch.float64)])
    gm = captured(case, "cpu")
    whole, load, most = written(gm, tmp_path / "whole"), Streamed._load, [0]

    def watched(streamed: Streamed, tensor: torch.Tensor) -> None:
        load(streamed, tensor)
        most[0] = max(most[0], len(streamed._loaded))

    monkeypatch.setattr(Streamed, "_load", watched)
    on_meta = captured(Case(lambda: nn.Sequential(*layers).to("meta"), case.batches), "meta", gm)
    plan = stp_fx.plan_shards(on_meta, whole, "variance", calibration=case.batches)
    assert most == [2]  # a weight and a bias of 24 tensors
    stp_fx.prune_shards(on_meta, plan, whole, tmp_path / "cut", compensation="sequential", calibration=case.batches)
    assert most[0] <= 4  # of one layer that runs, and the next that is refitted


def test_a_repair_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["CNN"]
    gm = captured(case, "cpu")
    whole, target = written(gm, tmp_path / "whole"), tmp_path / "new" / "cut"
    plan = stp_fx.plan_of(stp_fx.prune_graph(gm, ratio=0.5, validate=False))

    def broken() -> Any:
        yield case.batches[0]
        raise RuntimeError("no more")

    def refused(error: type[Exception], message: str, **changes: Any) -> None:
        given = {"compensation": "sequential", "calibration": case.batches, **changes}
        with pytest.raises(error, match=message):
            stp_fx.prune_shards(gm, plan, whole, target, **given)
        assert [p.name for p in tmp_path.iterdir()] == ["whole"]

    refused(InputError, "fails at batch 1", calibration=broken())
    refused(InputError, "not finite", calibration=[torch.full_like(IMAGES[0], torch.inf)])
    refused(InputError, "no batch", calibration=[])
    refused(RuntimeError, "channels", calibration=[torch.randn(2, 5, 8, 8, dtype=torch.float64)])
    refused(InputError, "give `calibration`", calibration=None)
    refused(InputError, "whole network in memory", compensation="mean")
    refused(InputError, "give compensation", compensation=None)
    refused(InputError, "number of bytes", memory=-1)
    refused(InputError, "`device`", device="nowhere")
    refused(InputError, "holds no numbers", device="meta")

    def full(*_: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("stp_fx.io.shards.save_file", full)
    refused(FileError, "cannot be written")


def test_what_cannot_be_scored_or_run_without_the_network_is_said(tmp_path: Path) -> None:
    case = CASES["tied"]
    gm = captured(case, "cpu")
    whole = written(gm, tmp_path / "whole")
    with torch.device("meta"):
        bare = stp_fx.trace(Tied().double().eval(), TOKENS[0].to("meta"))
    for criterion in ("reconstruction", "taylor", "hessian", "auto"):
        with pytest.raises(InputError, match=r"'magnitude'.*'variance'"):
            stp_fx.plan_shards(bare, whole, criterion, calibration=TOKENS)
    with pytest.raises(InputError, match="give `calibration`"):
        stp_fx.plan_shards(bare, whole, "variance")
    with pytest.raises(InputError, match="'optimal'"):
        stp_fx.plan_shards(bare, whole, allocation="optimal", calibration=TOKENS)
    with pytest.raises(InputError, match=r"'table' has no numbers.*gm.table ="):
        stp_fx.plan_shards(bare, whole, "variance", calibration=TOKENS)
    plan = stp_fx.plan_shards(bare, whole, "lamp", scope="global")
    assert plan == stp_fx.plan_of(stp_fx.prune_graph(gm, "lamp", scope="global", validate=False))
    with pytest.raises(InputError, match="'table' has no numbers"):
        stp_fx.prune_shards(bare, plan, whole, tmp_path / "cut", compensation="sequential", calibration=TOKENS)
    assert [p.name for p in tmp_path.iterdir()] == ["whole"]
