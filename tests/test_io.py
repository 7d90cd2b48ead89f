"""Saving and loading: what comes back, into what, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import errno
import io
import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import torch.nn.functional as F
import torchvision
from io_checks import assert_back, assert_untouched, snapshot
from safetensors.torch import load_file
from torch import fx, nn

import stp_fx
from stp_fx.errors import FileError, InputError
from stp_fx.io import saving


def make_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 4, 3)).eval()


def image(size: int = 10) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.safetensors"


@pytest.fixture
def pruned() -> fx.GraphModule:
    torch.manual_seed(0)
    return stp_fx.prune_graph(make_net(), example_inputs=image())


# -- what comes back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("traced", [False, True])
def test_a_pruned_network_comes_back(pruned: fx.GraphModule, path: Path, traced: bool) -> None:
    stp_fx.save(pruned, path)
    model = make_net().train()
    given = stp_fx.trace(make_net(), image(20)) if traced else model
    before = snapshot(given)
    loaded = stp_fx.load(str(path), given)
    assert_untouched(given, before)
    assert_back(pruned, loaded, image())
    again = stp_fx.prune_graph(loaded, ratio=0.5)
    assert stp_fx.cost(again).macs < stp_fx.cost(loaded).macs
    assert stp_fx.cost(loaded) == stp_fx.cost(pruned) or traced


@pytest.mark.parametrize(
    "network",
    [
        lambda: torchvision.models.resnet18(num_classes=5),
        lambda: torchvision.models.SwinTransformer([4, 4], 12, [2, 2], [3, 3], [4, 4], num_classes=5),
        lambda: torchvision.models.VisionTransformer(64, 16, 2, 4, 32, 64, num_classes=5),
    ],
    ids=["resnet18", "swin", "vit"],
)
def test_known_networks_come_back(network: Callable[[], nn.Module], path: Path) -> None:
    torch.manual_seed(0)
    x = image(64)
    pruned = stp_fx.prune_graph(network().eval(), example_inputs=x)
    stp_fx.save(pruned, path)
    assert_back(pruned, stp_fx.load(path, network()), x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("theirs", [torch.float32, torch.float64])
@pytest.mark.parametrize("ours", [torch.float32, torch.float64, torch.bfloat16])
def test_the_original_may_be_of_another_precision(path: Path, bias: bool, theirs: torch.dtype, ours: torch.dtype) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=bias)).eval()
    saved = stp_fx.prune_graph(stp_fx.trace(model, x), compensation="mean", calibration=[x]).to(theirs)  # may add a bias
    stp_fx.save(saved, path)
    again = stp_fx.load(path, copy.deepcopy(model).to(ours))
    assert_back(saved, again, x.to(theirs))
    assert stp_fx.prune_graph(again)(x.to(theirs)).dtype == theirs


@pytest.mark.parametrize("frontend", ["fx", "export"])
@pytest.mark.parametrize("training", [False, True])
def test_either_front_end_and_mode_is_captured_again(path: Path, frontend: str, training: bool) -> None:
    gm = stp_fx.trace(make_net().train(training), image(), frontend=frontend)
    pruned = stp_fx.prune_graph(gm)
    stp_fx.save(pruned, path)
    model = make_net().train(not training)
    before = snapshot(model)
    loaded = stp_fx.load(path, model)
    assert_untouched(model, before)
    assert loaded.training is training
    assert_back(pruned, loaded, image())


def test_a_masked_network_comes_back(path: Path) -> None:
    gm = stp_fx.trace(make_net(), image())
    plan = stp_fx.plan_of(stp_fx.prune_graph(gm, ratio=0.25))
    masked = stp_fx.apply_plan(gm, plan, mask=True)
    stp_fx.save(masked, path)
    loaded = stp_fx.load(path, make_net())
    assert_back(masked, loaded, image())
    masks = {name: value for name, value in masked.named_buffers() if name.startswith("stp_fx_dead")}
    assert masks
    assert all(torch.equal(loaded.get_buffer(name), value) for name, value in masks.items())
    with pytest.raises(InputError, match="masked"):
        stp_fx.load(path, masked)


def test_pruned_and_then_masked(path: Path, pruned: fx.GraphModule) -> None:
    plan = stp_fx.plan_of(stp_fx.prune_graph(stp_fx.trace(pruned, image()), ratio=0.5))
    both = stp_fx.apply_plan(pruned, plan, mask=True)
    stp_fx.save(both, path)
    assert_back(both, stp_fx.load(path, make_net()), image())


class Bare(nn.Module):
    """Calls that have no place for a bias, a weight used twice, and layers without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, bias=False)
        self.weight = nn.Parameter(torch.randn(8, 8, 1, 1))
        self.last = nn.Conv2d(8, 4, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(F.relu(self.first(x)), self.weight)
        return self.last(F.relu(x))


def test_biases_that_compensation_added_come_back_also_when_pruned_again(path: Path) -> None:
    torch.manual_seed(0)
    gm = stp_fx.trace(Bare().eval(), image())
    once = stp_fx.prune_graph(gm, ratio=0.25, calibration=[image()], compensation="mean")
    twice = stp_fx.prune_graph(once, ratio=0.5, calibration=[image()], compensation="mean")
    for each in (once, twice):
        assert any("bias" in name for name, _ in each.named_parameters())
        stp_fx.save(each, path)
        model = Bare()
        before = snapshot(model)
        assert_back(each, stp_fx.load(path, model), image())
        assert_untouched(model, before)
        plan = stp_fx.plan_of(each)
        assert stp_fx.plan_of(stp_fx.apply_plan(gm, plan)) == plan, "a plan fits the network it was made for"


def test_an_unpruned_network_and_one_pruned_twice(path: Path) -> None:
    gm = stp_fx.trace(make_net(), image())
    twice = stp_fx.prune_graph(stp_fx.prune_graph(gm, ratio=0.3), ratio=0.5)
    for each in (gm, twice):
        stp_fx.save(each, path)
        assert_back(each, stp_fx.load(path, make_net()), image())


def test_a_network_that_was_trained_while_pruned(path: Path) -> None:
    torch.manual_seed(0)
    gm = stp_fx.trace(make_net().train(), image())
    optimizer = torch.optim.SGD(gm.parameters(), 0.1, momentum=0.9)
    manager = stp_fx.PATPassManager(gm, ratio=0.5, steps=3, optimizer=optimizer)
    for epoch in range(4):
        manager.prune(epoch)
        stp_fx.save(manager.model, path)
        assert_back(manager.model, stp_fx.load(path, make_net()), image())
        manager.model.train()
        optimizer.zero_grad()
        manager.model(image()).square().mean().backward()
        optimizer.step()
    assert manager.finished


class Odd(nn.Module):
    """Tied and sliced weights, buffers of every kind, no two memory orders alike."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.tied = nn.Linear(6, 8)
        self.tied.weight = self.up.weight
        self.turned = nn.Linear(6, 6)
        self.turned.weight = nn.Parameter(torch.randn(6, 6).t())
        self.conv = nn.Conv2d(1, 4, 3).to(memory_format=torch.channels_last)
        self.recurrent = nn.LSTM(6, 5, batch_first=True)
        both = torch.arange(12.0)
        self.register_buffer("left", both[:6])
        self.register_buffer("right", both[6:], persistent=False)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("twist", torch.randn(6, dtype=torch.complex64).conj())
        self.register_buffer("rounded", torch.randn(6).bfloat16())
        self.register_buffer("flags", torch.tensor([True, False] * 3))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.down.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(F.relu(self.up(x))) + self.down(F.gelu(self.tied(x)))
        x = torch.where(self.flags, x, self.rounded.float()) * self.scale + self.left + self.right + self.twist.real
        x = self.turned(x) + self.empty.sum()
        return self.recurrent(x)[0] + self.conv(x[:, None]).mean((1, 2, 3))[:, None, None]


def test_odd_tensors_come_back(path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    pruned = stp_fx.prune_graph(Odd().eval(), example_inputs=x)
    pruned.get_submodule("conv").eval()
    pruned.train()
    pruned.get_submodule("recurrent").eval()
    stp_fx.save(pruned, path)
    loaded = stp_fx.load(path, Odd())
    assert loaded.get_parameter("up.weight") is loaded.get_submodule("tied").weight
    assert "right" not in loaded.state_dict() or "right" in pruned.state_dict()
    assert_back(pruned, loaded, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_precision_is_the_files(pruned: fx.GraphModule, path: Path, dtype: torch.dtype) -> None:
    stp_fx.save(pruned.to(dtype), path)
    loaded = stp_fx.load(path, make_net())
    assert_back(pruned, loaded, image().to(dtype))
    assert stp_fx.cost(loaded).macs == stp_fx.cost(pruned).macs


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_the_original_may_be_without_values(path: Path, frontend: str) -> None:
    pruned = stp_fx.prune_graph(stp_fx.trace(make_net(), image(), frontend=frontend))
    stp_fx.save(pruned, path)
    with torch.device("meta"):
        model = make_net()
    loaded = stp_fx.load(path, model)
    assert_back(pruned, loaded, image())
    assert all(p.is_meta for p in model.parameters())


class Asks(nn.Module):
    """Arguments of all sorts: nested, named, and constants that decide what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, pair: dict[str, torch.Tensor], *more: torch.Tensor, twice: bool = False, name: str | None = None) -> Any:
        x = F.relu(self.first(pair["a"] + pair["b"] + sum(more)))
        x = self.last(x)
        return {"out": 2 * x if twice else x, "kind": name}


def test_arguments_are_recorded_with_the_capture(path: Path) -> None:
    t = [torch.randn(2, 4) for _ in range(4)]
    inputs = ({"a": t[0], "b": t[1]}, t[2], t[3])
    gm = stp_fx.trace(Asks(), inputs, kwargs={"twice": True, "name": "doubled"})
    pruned = stp_fx.prune_graph(gm)
    stp_fx.save(pruned, path)
    loaded = stp_fx.load(path, Asks())
    assert loaded.code == pruned.code
    assert torch.equal(loaded(*inputs)["out"], pruned(*inputs)["out"])


@dataclasses.dataclass
class Settings:
    factor: float = 2.0


class Configured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, settings: Settings) -> torch.Tensor:
        return self.last(F.relu(self.first(x))) * settings.factor


def test_an_example_that_no_file_can_hold_is_asked_for(path: Path) -> None:
    x = torch.randn(2, 4)
    pruned = stp_fx.prune_graph(stp_fx.trace(Configured(), x, kwargs={"settings": Settings()}))
    stp_fx.save(pruned, path)
    with pytest.raises(FileError, match=r"could not be recorded: give stp_fx.trace"):
        stp_fx.load(path, Configured())
    assert_back(pruned, stp_fx.load(path, stp_fx.trace(Configured(), x, kwargs={"settings": Settings()})), x)


def test_a_pruned_part_is_saved_by_itself(path: Path) -> None:
    model = nn.Sequential(make_net(), nn.Flatten())
    whole = stp_fx.prune_submodule(model, "0", image())
    with pytest.raises(InputError, match=r"its part '0' is: save that"):
        stp_fx.save(whole, path)
    part = whole.get_submodule("0")
    stp_fx.save(part, path)
    assert_back(part, stp_fx.load(path, make_net()), image())


def test_other_programs_can_read_the_file(pruned: fx.GraphModule, path: Path) -> None:
    stp_fx.save(pruned, path)
    tensors = load_file(path)
    assert {k: v.tolist() for k, v in tensors.items()} == {k: v.tolist() for k, v in pruned.state_dict().items()}
    with safetensors.safe_open(path, "pt") as file:
        assert stp_fx.PrunePlan.from_json(file.metadata()["stp_fx_plan"]) == stp_fx.plan_of(pruned)
    buffer = io.BytesIO()
    torch.save(pruned.state_dict(), buffer)
    buffer.seek(0)
    loaded = stp_fx.load(path, make_net())
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    loaded.load_state_dict(tensors)
    assert_back(pruned, loaded, image())


def test_torchs_own_ways_keep_a_graph(pruned: fx.GraphModule, path: Path) -> None:
    def torch_save(gm: fx.GraphModule) -> fx.GraphModule:
        buffer = io.BytesIO()
        torch.save(gm, buffer)
        return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)

    def package(gm: fx.GraphModule) -> fx.GraphModule:
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch.package's own use of TypedStorage
            with torch.package.PackageExporter(buffer) as exporter:
                exporter.extern(["torch.**", "stp_fx.**", "numpy.**"])
                exporter.save_pickle("net", "net.pkl", gm)
            return torch.package.PackageImporter(io.BytesIO(buffer.getvalue())).load_pickle("net", "net.pkl")

    for way in (copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm)), torch_save, package):
        again = way(pruned)
        assert_back(pruned, again, image())
        stp_fx.save(again, path)
        assert_back(pruned, stp_fx.load(path, make_net()), image())


def test_the_example_in_the_docstring() -> None:
    result = doctest.testmod(saving)
    assert result.attempted > 0
    assert result.failed == 0


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: net.append(nn.Conv2d(4, 2, 1)), r"another network: that one had no tensor '5\.weight'"),
        (lambda net: net.pop(4), r"another network: this one has no tensor '4\.weight'"),
        (lambda net: net.__setitem__(0, nn.Conv2d(3, 9, 3)), r"'0\.weight' had the sizes \[8, 3, 3, 3\] and has \[9, 3, 3, 3\]"),
        (lambda net: net.__setitem__(4, nn.Conv2d(8, 4, 3, bias=False)), r"this one has no tensor '4\.bias'"),
        (lambda net: net[1].register_buffer("running_mean", torch.zeros(8, dtype=torch.int64)), r"'1\.running_mean' is .*float"),
    ],
    ids=["longer", "shorter", "wider", "without bias", "of integers"],
)
def test_another_network_is_named_by_its_first_difference(
    pruned: fx.GraphModule, path: Path, change: Callable[[Any], Any], message: str
) -> None:
    stp_fx.save(pruned, path)
    model = make_net()
    change(model)
    before = snapshot(model)
    with pytest.raises(FileError, match=message):
        stp_fx.load(path, model)
    assert_untouched(model, before)


def test_a_pruned_network_is_not_the_original(pruned: fx.GraphModule, path: Path) -> None:
    stp_fx.save(pruned, path)
    with pytest.raises(FileError, match=r"'0\.weight' had the sizes \[8.*pruned already"):
        stp_fx.load(path, pruned)


def test_untied_weights_are_another_network(path: Path) -> None:
    x = torch.randn(2, 5, 6)
    stp_fx.save(stp_fx.prune_graph(Odd().eval(), example_inputs=x), path)
    model = Odd()
    model.tied.weight = nn.Parameter(torch.randn(8, 6))
    with pytest.raises(FileError, match=r"'tied\.weight'"):
        stp_fx.load(path, model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x08\x00", "is cut off"),
        (b"PK\x03\x04 and so on", r"torch\.save"),
        (pickle.dumps({"a": 1}), r"torch\.save"),
        (b"\xff" * 64, "no safetensors file, or damaged"),
        (b"just some text, longer than a header", "no safetensors file, or damaged"),
    ],
)
def test_other_files_are_refused(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(FileError, match=message):
        stp_fx.load(path, make_net())


def test_other_places_are_refused(path: Path, tmp_path: Path, pruned: fx.GraphModule) -> None:
    with pytest.raises(FileError, match="No such file"):
        stp_fx.load(path, make_net())
    with pytest.raises(FileError, match="a directory"):
        stp_fx.load(tmp_path, make_net())
    with pytest.raises(FileError, match="no regular file"):
        stp_fx.load("/dev/zero", make_net())
    for name in ("a\0b", "a\ud800b"):
        with pytest.raises(InputError, match="`path` is"):
            stp_fx.load(name, make_net())
        with pytest.raises(InputError, match="`path` is"):
            stp_fx.save(pruned, name)
    with pytest.raises(InputError, match="`path` is a int"):
        stp_fx.load(3, make_net())
    with pytest.raises(FileError, match="directory"):
        stp_fx.save(pruned, tmp_path)
    with pytest.raises(FileError, match="cannot be written"):
        stp_fx.save(pruned, tmp_path / "no" / "folder" / "net")
    assert list(tmp_path.iterdir()) == []
    safetensors.torch.save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(FileError, match=r"not one that stp_fx\.save wrote"):
        stp_fx.load(path, make_net())
    for wrong in ({}, None):
        with pytest.raises(InputError, match=r"`pruned` is a|`model` is a"):
            stp_fx.save(wrong, path) if wrong is None else stp_fx.load(path, wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no record of a capture"):
        stp_fx.save(make_net(), path)  # type: ignore[arg-type]


def test_a_newer_format_says_so(pruned: fx.GraphModule, path: Path) -> None:
    stp_fx.save(pruned, path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["stp_fx"] = json.dumps({**json.loads(metadata["stp_fx"]), "stp_fx_file": 2, "news": 1})
    safetensors.torch.save_file(load_file(path), path, metadata)
    with pytest.raises(FileError, match=r"of format 2, .* up to 1: use a newer stp_fx"):
        stp_fx.load(path, make_net())


def test_every_lost_bit_of_the_weights_is_told(pruned: fx.GraphModule, path: Path) -> None:
    stp_fx.save(pruned, path)
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for place in range(begin, len(whole), 37):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(FileError, match="checksum"):
            stp_fx.load(path, make_net())


def test_tensors_without_a_plain_form_are_named(pruned: fx.GraphModule, path: Path) -> None:
    pruned.register_buffer("adjacency", torch.eye(3).to_sparse())
    with pytest.raises(FileError, match="'adjacency' is a Tensor of"):
        stp_fx.save(pruned, path)
    pruned.register_buffer("adjacency", torch.zeros(3, device="meta"))
    with pytest.raises(FileError, match="'adjacency' has no values"):
        stp_fx.save(pruned, path)
    pruned.register_buffer("adjacency", None)
    pruned.get_submodule("0").weight = nn.Parameter(torch.zeros(5, 3, 3, 3))
    with pytest.raises(FileError, match=r"'0\.weight' dim 0 has 5 positions and the plan left 4"):
        stp_fx.save(pruned, path)
    assert not path.exists()


# -- writing is all or nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["save_file", "os.fsync", "os.replace", "os.chmod"])
def test_a_failed_save_leaves_what_was_there(
    pruned: fx.GraphModule, path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    stp_fx.save(pruned, path)
    whole = path.read_bytes()

    def fails(*args: Any, **kwargs: Any) -> None:
        if step == "save_file":
            Path(args[1]).write_bytes(whole[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"stp_fx.io.files.{step}", fails)
        with pytest.raises(FileError, match=r"cannot be written.*No space left"):
            stp_fx.save(stp_fx.prune_graph(pruned), path)
    assert path.read_bytes() == whole
    assert list(path.parent.iterdir()) == [path]

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"stp_fx.io.files.{step}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stp_fx.save(pruned, path)
    assert path.read_bytes() == whole
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_what_is_no_regular_file_is_not_replaced(pruned: fx.GraphModule, path: Path) -> None:
    os.mkfifo(path)
    link = path.parent / "link"
    link.symlink_to(path)
    for target in (path, link):
        with pytest.raises(FileError, match="device, pipe or socket"):
            stp_fx.save(pruned, target)
    assert path.is_fifo()
    assert sorted(path.parent.iterdir()) == sorted([path, link])


@pytest.mark.skipif(os.name != "posix", reason="modes and links of POSIX")
def test_links_and_modes_are_kept(pruned: fx.GraphModule, path: Path) -> None:
    before = os.umask(0o027)
    try:
        stp_fx.save(pruned, path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    link = path.parent / "link"
    link.symlink_to(path)
    path.chmod(0o600)
    second = stp_fx.prune_graph(pruned)
    stp_fx.save(second, link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o600
    assert_back(second, stp_fx.load(link, make_net()), image())
