"""The inputs of networks of the collection "wild", and how those of transformers are built from a small configuration."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from _coverage_networks import Inputs, Network
from torch import Tensor, nn

__all__ = [
    "Given",
    "causal",
    "experts",
    "ids",
    "images",
    "lazily",
    "masked_words",
    "named",
    "noise",
    "noise_and_lengths",
    "of_class",
    "one_query",
    "pairs",
    "pixels",
    "pixels_and_words",
    "quiet",
    "seeded",
    "tokens",
    "with_image",
    "words",
]

hf.logging.set_verbosity_error()

Given = Callable[[int, bool, torch.dtype], Inputs]


# -- inputs --------------------------------------------------------------------------------------------------------------


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int) -> Given:
    """One tensor [batch, *shape]."""
    return lambda batch, _, dtype: ((torch.randn(batch, *shape, generator=seeded(batch), dtype=dtype),), {})


def noise_and_lengths(*shape: int) -> Given:
    """One tensor [batch, length, *shape] and as many lengths."""
    return lambda batch, small, dtype: ((*noise(*shape)(batch, small, dtype)[0], torch.full((batch,), shape[0])), {})


def ids(batch: int, length: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(5, 120, (batch, length), generator=seeded(batch + seed))


def tokens(batch: int, small: bool, dtype: torch.dtype) -> Inputs:
    return (ids(batch),), {}


def words(batch: int, small: bool, dtype: torch.dtype) -> Inputs:
    return (), {"input_ids": ids(batch)}


def masked_words(batch: int, small: bool, dtype: torch.dtype) -> Inputs:
    return (), {"input_ids": ids(batch), "attention_mask": torch.ones(batch, 16, dtype=torch.int64)}


def pairs(batch: int, small: bool, dtype: torch.dtype) -> Inputs:
    return (), {"input_ids": ids(batch), "decoder_input_ids": ids(batch, 8, seed=9)}


def named(name: str, *shape: int) -> Given:
    return lambda batch, small, dtype: ((), {name: noise(*shape)(batch, small, dtype)[0][0]})


def pixels(size: int) -> Given:
    return named("pixel_values", 3, size, size)


def pixels_and_words(size: int, ids: Callable[[int], Tensor] = ids) -> Given:
    return lambda batch, small, dtype: ((), {"input_ids": ids(batch), **pixels(size)(batch, small, dtype)[1]})


def with_image(batch: int) -> Tensor:
    """Words after sixteen tokens that stand for patches of an image."""
    return torch.cat([torch.full((batch, 16), 3), ids(batch, 8)], 1)


def one_query(batch: int) -> Tensor:
    """One query for each image."""
    return ids(batch, 8)


# -- how they are built --------------------------------------------------------------------------------------------------


def quiet(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Factories that warn of parts of PyTorch that will change."""

    def built() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return build()

    return built


def of_class(kind: str, inputs: Given, config: str = "", dtype: torch.dtype = torch.float64, **options: Any) -> Network:
    """A class of transformers by its name; its configuration's by its stem."""
    stem = config or kind.partition("For")[0].removesuffix("Model")

    def build() -> nn.Module:
        return getattr(hf, kind)(getattr(hf, f"{stem}Config")(**options))

    return Network(quiet(build), inputs, reads_values=True, resizable=False, dtype=dtype)


def causal(stem: str, dtype: torch.dtype = torch.float64, **options: Any) -> Network:
    """A language model by the stem of its classes' names."""
    return of_class(f"{stem}ForCausalLM", words, stem, dtype, **options)


def experts(stem: str, **options: Any) -> Network:
    """A mixture of experts, whose kernel for groups of rows takes no double precision."""
    return causal(stem, torch.float32, **options)


def images(stem: str, size: int, **options: Any) -> Network:
    return of_class(f"{stem}ForImageClassification", pixels(size), stem, **options)


def lazily(build: Callable[[], nn.Module], inputs: Given, dtype: torch.dtype = torch.float64) -> Network:
    return Network(quiet(build), inputs, reads_values=True, resizable=False, dtype=dtype)
