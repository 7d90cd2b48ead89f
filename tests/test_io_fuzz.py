"""Damaged and hostile files, a thousand in the whole suite: an error of ours or the right network, the model untouched,
nothing run. ``STP_FX_FUZZ=20000 pytest tests/test_io_fuzz.py`` looks at more of them; STP_FX_FUZZ_SEED gives others.
"""

from __future__ import annotations

import builtins
import collections
import copy
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from io_checks import assert_untouched, snapshot
from torch import fx, nn

import stp_fx
from stp_fx.errors import FileError
from stp_fx.io.contents import checksum
from stp_fx.ir.shapes import fetch

FILES = int(os.environ.get("STP_FX_FUZZ", "1000"))
FEW = 200
SEED = int(os.environ.get("STP_FX_FUZZ_SEED", "0"))
TEXTS = ("stp_fx", "stp_fx_plan", "stp_fx_masked")
HOSTILE: tuple[Any, ...] = (
    *(-1, 0, 1, 7, 2**31, 2**63 - 1, 2**63, 10**40, 1.5, 1e308, float("nan"), float("inf"), True, False, None),
    *("", "0.weight", "__class__.__init__", "\0", "x" * 5000, "../../etc/passwd", "__import__('os').system('false')"),
    *([], {}, [[]], [0, 0], [3, 1], [0, 2**40], [-5, -1]),
    {"tensor": ["float32", [2**40]]},
    {"tensor": ["load", [1]]},
    {"dict": {"x": {"tensor": ["float32", [1, 3, 9, 9]]}}},
)


class Net(nn.Module):
    """Ties, a buffer of each kind, and a call without a place for a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.middle = nn.Conv2d(6, 6, 1, bias=False).to(memory_format=torch.channels_last)
        self.drop = nn.Dropout()
        self.last = nn.Conv2d(6, 2, 1, bias=False)
        self.register_buffer("twist", torch.ones(1, dtype=torch.complex64))
        self.again = self.last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.middle(x))
        return self.last(self.drop(x)) * self.twist.real


def example() -> torch.Tensor:
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, torch.Tensor]]:
    """Files of a network with a removed, a masked and an added part, and of one only pruned; with their outputs."""
    torch.manual_seed(0)
    gm = stp_fx.trace(Net().eval(), example())
    pruned = stp_fx.prune_graph(gm, ratio=0.3, calibration=[example()], compensation="mean")
    plan = stp_fx.plan_of(stp_fx.prune_graph(stp_fx.trace(pruned, example()), ratio=0.5))
    found = []
    for k, each in enumerate((pruned, stp_fx.apply_plan(pruned, plan, mask=True))):
        path = tmp_path_factory.mktemp("fuzz") / f"{k}.safetensors"
        stp_fx.save(each, path)
        found.append((path, each(example())))
    return found


# -- ways to spoil a file ----------------------------------------------------------------------------------------------


def flip(data: bytes, draw: random.Random) -> bytes:
    spoiled = bytearray(data)
    end = draw.choice([9, 200, len(data)])  # the length of the header, its begin, or anywhere
    for _ in range(draw.choice([1, 1, 2, 8])):
        spoiled[draw.randrange(min(end, len(data)))] ^= 1 << draw.randrange(8)
    return bytes(spoiled)


def truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))] if draw.random() < 0.8 else data + draw.randbytes(draw.randrange(1, 64))


def splice(data: bytes, draw: random.Random) -> bytes:
    begin, end, to = (draw.randrange(len(data)) for _ in range(3))
    begin, end = min(begin, end), max(begin, end)
    return draw.choice(
        [data[:begin] + data[end:], data[:to] + data[begin:end] + data[to:], data[:to] + draw.randbytes(16) + data[to:]]
    )


def opened(data: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def closed(header: dict[str, Any], rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + rest


def edit_header(data: bytes, draw: random.Random) -> bytes:
    """Names, dtypes, shapes and places of tensors as safetensors has them."""
    header, rest = opened(data)
    return closed(spoil(header, draw), rest)


def forge_metadata(data: bytes, draw: random.Random) -> bytes:
    """What is ours in the file, with a checksum that fits."""
    header, rest = opened(data)
    texts = header["__metadata__"]
    key = draw.choice([key for key in TEXTS if key in texts])
    if draw.random() < 0.1:
        texts[key] = draw.choice(
            ["", "[" * 100_000, '{"a":' * 50_000, "null", "[]", "{}", "NaN", texts["stp_fx_plan"], texts["stp_fx"]]
        )
    elif draw.random() < 0.1:
        place = draw.randrange(len(texts[key]))
        texts[key] = texts[key][:place] + draw.choice('0123456789-e.,:[]{}" \0é') + texts[key][place + 1 :]
    else:
        document = json.loads(texts[key])
        for _ in range(draw.choice([1, 1, 1, 2])):
            document = spoil(document, draw)
        texts[key] = json.dumps(document)
    return signed(header, rest)


def forge_tensors(data: bytes, draw: random.Random) -> bytes:
    """Tensors of other names, sizes, types and number, with a checksum that fits."""
    tensors = dict(safetensors.torch.load(data))
    header, _ = opened(data)
    name = draw.choice(sorted(tensors))
    value = tensors.pop(name)
    if not value.dim():
        return signed(*opened(safetensors.torch.save(tensors, header["__metadata__"])))
    changed = (
        {},
        {name + "x": value},
        {name: value, "more.weight": value.clone()},
        {name: value.half()},
        {name: value.int()},
        {name: value.reshape(-1)},
        {name: torch.cat([value, value])},
        {name: torch.tensor(1.0)},
        {name: value[:0].clone()},
        {name: value + 1},
    )
    return signed(*opened(safetensors.torch.save({**tensors, **draw.choice(changed)}, header["__metadata__"])))


def signed(header: dict[str, Any], rest: bytes) -> bytes:
    data = closed(header, rest)
    texts = header["__metadata__"]
    texts["stp_fx_sha256"] = checksum(texts, safetensors.torch.load(data))
    return closed(header, rest)


def spoil(document: Any, draw: random.Random) -> Any:
    """One change somewhere in a JSON document."""
    spots: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            spots.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    document = copy.deepcopy(document)
    if not isinstance(document, (dict, list)) or not document:
        return draw.choice(HOSTILE)
    walk(document)
    node, key = draw.choice(spots)
    how = draw.choice(["replace", "replace", "nudge", "nudge", "drop", "double", "swap", "nest"])
    if how == "nudge" and type(node[key]) is int:
        node[key] += draw.choice([-1, 1])
    elif how == "drop":
        del node[key]
    elif how == "double" and isinstance(node, list):
        node.insert(key, copy.deepcopy(node[key]))
    elif how == "double" and isinstance(node, dict):
        node[key + "x"] = node[key]
    elif how == "swap":
        other, place = draw.choice(spots)
        node[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(node[key])
    elif how == "nest":
        for _ in range(draw.choice([1, 40, 400])):
            node[key] = [node[key]]
    else:
        node[key] = copy.deepcopy(draw.choice(HOSTILE))
    return document


SPOILERS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip, truncate, splice, edit_header, forge_metadata, forge_metadata, forge_metadata, forge_tensors,
)  # fmt: skip


# -- what must hold ----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whatever would run a file's contents fails, and is remembered even if somebody catches the failure."""
    ran: list[str] = []

    def forbid(owner: Any, name: str) -> None:
        def forbidden(*args: Any, **kwargs: Any) -> Any:
            ran.append(name)
            raise AssertionError(f"{name} was called")

        monkeypatch.setattr(owner, name, forbidden)

    for name in ("load", "loads", "Unpickler"):
        forbid(pickle, name)
    for owner, name in ((torch, "load"), (torch.jit, "load"), (builtins, "eval"), (os, "system"), (os, "popen")):
        forbid(owner, name)
    return ran


@pytest.mark.parametrize(
    ("files", "seed"), [(FEW, SEED), pytest.param(FILES - FEW, SEED + 1_000_000, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_a_thousand_spoiled_files(
    saved: list[tuple[Path, torch.Tensor]], tmp_path: Path, no_code: list[str], files: int, seed: int
) -> None:
    draw = random.Random(seed)
    originals = [(path.read_bytes(), expected) for path, expected in saved]
    module = Net()
    given = [module, module, stp_fx.trace(Net().eval(), example())]
    before = [snapshot(model) for model in given]
    path = tmp_path / "spoiled.safetensors"
    seen: collections.Counter[str] = collections.Counter()
    for number in range(files):
        data, expected = draw.choice(originals)
        spoiler = draw.choice(SPOILERS)
        spoiled = spoiler(data, draw)
        path.write_bytes(spoiled)
        place = draw.randrange(len(given))
        try:
            loaded = stp_fx.load(path, given[place])
        except FileError as error:
            refusal = str(error)
            seen["refused"] += 1
        else:
            refusal = None
            seen["loaded"] += 1
            check_loaded(loaded, expected, forged=spoiler in (forge_metadata, forge_tensors))
        assert refusal is None or refusal.startswith(repr(str(path)))
        assert_untouched(given[place], before[place])
        assert not no_code, f"file {number}: {no_code}"
        assert os.listdir(tmp_path) == [path.name]
        seen[spoiler.__name__] += 1
    assert seen["refused"] > files // 2, seen
    assert all(seen[spoiler.__name__] for spoiler in SPOILERS), seen


def check_loaded(loaded: fx.GraphModule, expected: torch.Tensor, *, forged: bool) -> None:
    """The very network; of a forgery, a whole one: it runs, its plan is what was removed."""
    if len({p.dtype for p in loaded.parameters()}) == 1:  # mixed ones are anybody's right, and want autocast to run
        stp_fx.ir.verify(loaded)
    plan = stp_fx.plan_of(loaded)
    for (name, dim), kept in plan.kept.items():
        assert fetch(loaded, name).shape[dim] == len(kept)
    if forged:
        return
    assert torch.equal(loaded(example()), expected)


def test_the_files_as_they_are(saved: list[tuple[Path, torch.Tensor]], no_code: list[str]) -> None:
    for path, expected in saved:
        assert torch.equal(stp_fx.load(path, Net())(example()), expected)
        assert closed(*opened(path.read_bytes()))[-64:] == path.read_bytes()[-64:]
    assert not no_code
