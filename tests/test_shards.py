"""Checkpoints cut tensor by tensor: what comes out is what pruning in memory gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import stp_fx
from stp_fx.errors import FileError, InputError, PlanError
from stp_fx.io import prune_shards

X = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """An embedding that is the output layer as well, an MLP, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embedding(x) * self.scale
        return self.head(self.norm(y + self.down(F.gelu(self.up(y)))))


def captured(device: str = "cpu") -> tuple[nn.Module, torch.fx.GraphModule]:
    torch.manual_seed(0)
    with torch.device(device):
        model = Tied().eval()
    return model, stp_fx.trace(model, X.to(device))


def written(folder: Path, shards: int = 2) -> Path:
    state = {k: v for k, v in captured()[0].state_dict().items() if k != "head.weight"}  # tied ones once, as usual
    names = list(state)
    folder.mkdir()
    for k in range(shards):
        save_file({name: state[name] for name in names[k::shards]}, folder / f"model-{k}.safetensors")
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("limit", [100, 10**9])
def test_files_cut_by_a_plan_made_without_weights(tmp_path: Path, limit: int) -> None:
    _, on_meta = captured("meta")
    plan = stp_fx.plan_of(stp_fx.prune_graph(on_meta, "random", 0.5))
    prune_shards(on_meta, plan, written(tmp_path / "whole"), tmp_path / "cut", max_shard_bytes=limit)
    expected = stp_fx.apply_plan(captured()[1], plan)
    found = read(tmp_path / "cut")
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())
    for path in (tmp_path / "cut").glob("*.safetensors"):
        sizes = [t.numel() * t.element_size() for t in load_file(path).values()]
        assert len(sizes) == 1 or sum(sizes) <= limit
    assert (len(set(index["weight_map"].values())) == 1) == (limit > 10**6)
    small = stp_fx.apply_plan(on_meta, plan).to_empty(device="cpu")
    small.load_state_dict(found, strict=False)
    small.head.weight = small.embedding.weight  # `to_empty` unties
    small.scale.fill_(1.0)
    assert torch.equal(small(X), expected(X))
    assert all(torch.equal(expected.state_dict()[name], tensor) for name, tensor in found.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "whole"]


def test_one_file_and_an_empty_plan(tmp_path: Path) -> None:
    model, gm = captured()
    save_file({k: v for k, v in model.state_dict().items() if k != "head.weight"}, tmp_path / "all.safetensors")
    prune_shards(gm, stp_fx.PrunePlan({}, {}), tmp_path / "all.safetensors", tmp_path / "cut")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in read(tmp_path / "cut").items())


def test_what_does_not_fit_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    _, gm = captured()
    plan = stp_fx.plan_of(stp_fx.prune_graph(gm, ratio=0.5))
    whole, target = written(tmp_path / "whole", 1), tmp_path / "cut"
    state = read(whole)
    path = whole / "model-0.safetensors"

    def refused(error: type[Exception], message: str, tensors: dict[str, torch.Tensor] | None = None, **changes: object) -> None:
        save_file(state if tensors is None else tensors, path)
        arguments = {"gm": gm, "plan": plan, "source": whole, "target": target, **changes}
        with pytest.raises(error, match=message):
            prune_shards(**arguments)  # type: ignore[arg-type]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["whole"]

    refused(FileError, r"do not hold 'up.weight'", {k: v for k, v in state.items() if k != "up.weight"})
    refused(FileError, r"'more'.*does not have", {**state, "more": torch.ones(1)})
    refused(FileError, r"'up.weight' has shape \(16, 9\)", {**state, "up.weight": torch.ones(16, 9)})
    refused(FileError, "no safetensors file", source=tmp_path / "nowhere")
    refused(InputError, "`plan` is a dict", plan={})
    refused(InputError, "positive number", max_shard_bytes=0)
    refused(PlanError, "no.*axis|does not", plan=stp_fx.PrunePlan({("other", 0): [0]}, {("other", 0): 2}))
    path.write_bytes(b"no tensors")
    with pytest.raises(FileError, match="damaged"):
        prune_shards(gm, plan, whole, target)
    assert not target.exists()
    with pytest.raises(FileError, match="exists"):
        prune_shards(gm, plan, whole, tmp_path)


def test_of_a_folder_with_an_index_what_that_lists_is_read(tmp_path: Path) -> None:
    _, gm = captured()
    plan = stp_fx.plan_of(stp_fx.prune_graph(gm, ratio=0.5))
    whole = written(tmp_path / "whole")
    places = {name: path.name for path in whole.glob("*.safetensors") for name in load_file(path)}
    index = whole / "model.safetensors.index.json"

    def cut(weight_map: object) -> dict[str, torch.Tensor]:
        index.write_text(weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map}))
        target = tmp_path / f"cut-{len(list(tmp_path.iterdir()))}"
        prune_shards(gm, plan, whole, target)
        return read(target)

    expected = cut(places)
    save_file({"up.weight": torch.full((16, 8), 7.0)}, whole / "a-stray.safetensors")
    found = cut(places)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    stray = {**places, "up.weight": "a-stray.safetensors"}
    with pytest.raises(FileError, match="does not list"):
        cut({name: file for name, file in places.items() if name != "up.weight"})
    assert cut(stray)["up.weight"].unique().tolist() == [7.0]
    for wrong, message in (
        ({**places, "up.weight": "none.safetensors"}, "no such file"),
        ({**places, "down.weight": "a-stray.safetensors"}, "does not hold it"),
        ({**places, "up.weight": "../whole/model-0.safetensors"}, "no safetensors file beside it"),
        ({**places, "up.weight": 3}, "no `weight_map`"),
        ("[" * 100_000, "cannot be read as an index"),
        ('{"weight_map": {"a": "b", "a": "c"}}', "given twice"),
    ):
        with pytest.raises(FileError, match=message):
            cut(wrong)
    index.unlink()
    with pytest.raises(FileError, match=r"'up.weight' lies in two files.*a-stray.*model-1"):
        prune_shards(gm, plan, whole, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("step", ["save_file", "os.replace"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    _, gm = captured()
    plan = stp_fx.plan_of(stp_fx.prune_graph(gm, ratio=0.5))
    whole = written(tmp_path / "whole")

    def full(*_: object) -> None:
        raise SafetensorError("No space left on device") if step == "save_file" else OSError("No space left on device")

    monkeypatch.setattr(f"stp_fx.io.shards.{step}", full)
    for target in (tmp_path / "cut", tmp_path / "new" / "folders" / "cut", tmp_path / ("x" * 300)):
        with pytest.raises(FileError, match="cannot be written"):
            prune_shards(gm, plan, whole, target)
        assert list(tmp_path.iterdir()) == [whole]


LARGE = """
import sys, torch
from pathlib import Path
from torch import nn
import stp_fx
from safetensors.torch import save_file
from stp_fx.io import prune_shards

folder, width, layers = Path(sys.argv[1]), 2048, 36
with torch.device("meta"):
    pairs = ((nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)) for _ in range(layers // 2))
    model = nn.Sequential(*(nn.Sequential(*pair) for pair in pairs))
    gm = stp_fx.trace(model, torch.zeros(1, width))
names, whole = list(model.state_dict()), folder / "whole"
if not whole.exists():
    whole.mkdir()
    for k in range(0, len(names), 4):
        some = {name: torch.randn(model.get_parameter(name).shape).half() for name in names[k : k + 4]}
        save_file(some, whole / f"{k:03}.safetensors")
    sys.exit()

def peak():  # not ru_maxrss, which a child inherits from its parent
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

plan = stp_fx.plan_of(stp_fx.prune_graph(gm, "random", 0.5))
before = peak()
prune_shards(gm, plan, whole, folder / "cut", max_shard_bytes=50_000_000)
sizes = [sum(p.stat().st_size for p in each.iterdir()) for each in (whole, folder / "cut")]
print(sum(p.numel() for p in model.parameters()), peak() - before, *sizes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_three_hundred_million_parameters_in_little_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LARGE, str(tmp_path)]
    subprocess.run(command, check=True, timeout=600)  # makes the files
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    parameters, more, whole, cut = map(int, done.stdout.split())
    assert parameters > 300e6
    assert whole > 600e6
    assert 0.2 * whole < cut < 0.6 * whole
    assert more < 0.5 * whole, f"{more / 1e6:.0f} MB more than before, for files of {whole / 1e6:.0f} MB"
    print(f"{more / 1e6:.0f} MB for {whole / 1e6:.0f} MB")
