"""Trains the tokenizer and the language model of ``_language.py``: a command of ``language_model.py``."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from _language import CHECKPOINT, LENGTH, TOKENIZER, VOCABULARY, config, perplexity, texts, tokens
from _language import model as trained
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["train"]

BATCH, WARM, RATE, DECAY = 8, 50, 4e-3, 0.1
EVERY = 100  # steps between two lines of the log


def _tokenizer() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts("train"), trainer)
    tokenizer.save(str(TOKENIZER), pretty=False)


def _batches(steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Windows in random order, every epoch with another offset."""
    ids, left = tokens("train"), list[Tensor]()
    for _ in range(steps):
        if len(left) < BATCH:
            offset = int(torch.randint(LENGTH, (), generator=generator))
            count = (len(ids) - offset) // LENGTH
            epoch = ids[offset : offset + count * LENGTH].view(count, LENGTH)
            left = list(epoch[torch.randperm(count, generator=generator)])
        yield torch.stack([left.pop() for _ in range(BATCH)])


def _cosine(part: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * part))


def _line(part: float) -> float:
    return 1 - part


def train(steps: int, stop: int | None = None, resume: bool = False) -> None:
    """AdamW; the checkpoint is in half precision. The learning rate rises in the first steps, then falls as a cosine does.

    ``stop``: after so many steps. ``resume``: from the checkpoint, with a learning rate that falls to zero in a straight line.
    """
    from transformers import LlamaForCausalLM

    TOKENIZER.parent.mkdir(exist_ok=True)
    if not resume:
        _tokenizer()
    torch.manual_seed(0)
    model = (trained() if resume else LlamaForCausalLM(config())).train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    scales = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": scales, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    warm, fall = (WARM // 5, _line) if resume else (WARM, _cosine)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / warm) * fall(k / steps))
    start, losses = time.process_time(), list[float]()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokens('train')):,} tokens", flush=True)
    for step, ids in enumerate(_batches(stop or steps, torch.Generator().manual_seed(int(resume))), 1):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % EVERY == 0 or step == (stop or steps):
            mean = math.exp(sum(losses[-EVERY:]) / len(losses[-EVERY:]))
            print(f"step {step}: perplexity {mean:.2f} of the last batches, {time.process_time() - start:.0f} s", flush=True)
            save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, CHECKPOINT)
    chosen, test = (perplexity(model, split) for split in ("chosen on", "test"))
    print(f"perplexity {chosen:.2f} of the books on which methods are chosen, {test:.2f} of the test books", flush=True)
