"""The networks of the coverage run: how each is built, and what it takes."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

__all__ = ["COLLECTIONS", "Inputs", "Network", "network"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

TIMM = (
    "resnet50", "resnetv2_50", "convnext_tiny", "deit_small_patch16_224", "vit_base_patch16_224", "swin_tiny_patch4_window7_224",
    "mobilenetv4_conv_small", "efficientnet_b0", "levit_128", "repvgg_a0", "ghostnet_100", "hrnet_w18", "dpn68",
    "res2net50_26w_4s", "skresnet18", "tresnet_m", "coatnet_0_224", "poolformer_s12", "mixer_b16_224", "pit_ti_224",
    "twins_svt_small", "edgenext_small", "nfnet_f0", "cspdarknet53",
)  # fmt: skip
SEGMENTATION = ("fcn_resnet50", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large")
VIDEO = {"r3d_18": 112, "mc3_18": 112, "r2plus1d_18": 112, "s3d": 224, "mvit_v1_b": 224, "swin3d_t": 224}
FLOW = ("raft_large", "raft_small")
DETECTION = (
    "fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large",
)  # fmt: skip
TRANSFORMERS = ("bert", "gpt2", "llama", "vit", "t5", "segformer")

# What the module's own factory needs to build quickly and without warnings.
OPTIONS: dict[str, dict[str, Any]] = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
IMAGE = {"inception_v3": 299}
# In double precision, smaller images where the network takes them: the law is about channels, not about pixels.
SMALL_IMAGE = {"inception_v3": 96}
FIXED_IMAGE = ("vit_", "maxvit")
# Padding to whole windows follows the image size and is fixed by the trace, so these are traced anew for smaller images.
IMAGE_IN_TRACE = ("swin",)


@dataclasses.dataclass(frozen=True)
class Network:
    """``inputs(batch, small, dtype)`` gives positional and named arguments of the module that is traced.

    Where no front end takes the whole, ``part`` names the submodule that is traced, and ``whole`` gives what the whole takes.
    ``constants`` are arguments that the trace bakes in. ``resizable``: a graph traced with the large example runs on small ones.
    ``reads_values``: the module's code cannot run on meta tensors. ``dtype``: of the law; not every module's code can do double.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, bool, torch.dtype], Inputs]
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    part: str = ""
    whole: Callable[[int], Any] | None = None
    resizable: bool = True
    reads_values: bool = False
    dtype: torch.dtype = torch.float64


def network(name: str) -> Network:
    """``"resnet50"``, ``"timm:resnet50"``, ``"hf:bert"`` and so on.

    Raises:
        KeyError: no such network.
    """
    collection, _, plain = name.rpartition(":")
    if collection == "timm":
        return _timm(plain)
    if collection == "hf":
        return _transformer(plain)
    if name in SEGMENTATION:
        return Network(
            lambda: _torchvision(name, weights_backbone=None), _images(lambda small: (64, 64) if small else (224, 224))
        )
    if name in VIDEO:
        return _video(name)
    if name in FLOW:
        return Network(lambda: _torchvision(name), _image_pairs, resizable=False, dtype=torch.float32)  # it makes float32 grids
    if name in DETECTION:
        return _detector(name)
    size = IMAGE.get(name, 224)
    small = size if name.startswith(FIXED_IMAGE) else SMALL_IMAGE.get(name, 64)
    inputs = _images(lambda is_small: (small, small) if is_small else (size, size))
    return Network(lambda: _torchvision(name), inputs, resizable=not name.startswith(IMAGE_IN_TRACE))


def _torchvision(name: str, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torchvision.models.get_model(name, weights=None, **OPTIONS.get(name, {}), **options)


def _random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 128, shape, generator=torch.Generator().manual_seed(seed))


def _images(size: Callable[[bool], tuple[int, ...]]) -> Callable[[int, bool, torch.dtype], Inputs]:
    return lambda batch, small, dtype: ((_random(batch, batch, 3, *size(small), dtype=dtype),), {})


def _image_pairs(batch: int, small: bool, dtype: torch.dtype) -> Inputs:
    return (_random(batch, batch, 3, 128, 128, dtype=dtype), _random(9 + batch, batch, 3, 128, 128, dtype=dtype)), {}


def _timm(name: str) -> Network:
    import timm

    size = timm.get_pretrained_cfg(name).input_size[-1]
    return Network(lambda: timm.create_model(name), _images(lambda small: (size, size)))


def _video(name: str) -> Network:
    size, fixed = VIDEO[name], name in ("mvit_v1_b", "swin3d_t", "s3d")
    inputs = _images(lambda small: (8, 64, 64) if small and not fixed else (16, size, size))
    return Network(lambda: _torchvision(name), inputs)


def _detector(name: str) -> Network:
    def build() -> nn.Module:
        sizes = {} if name.startswith("ssdlite") else {"min_size": 128, "max_size": 160}
        return _torchvision(name, weights_backbone=None, num_classes=5, **sizes)

    inputs = _images(lambda small: (64, 64) if small else (320, 320))
    return Network(build, inputs, part="backbone", whole=lambda batch: list(_random(batch, batch, 3, 96, 128).sigmoid()))


def _transformer(name: str) -> Network:
    import transformers as hf

    def words(batch: int, small: bool, dtype: torch.dtype) -> Inputs:
        return (), {"input_ids": _tokens(batch, batch, 16)}

    def masked_words(batch: int, small: bool, dtype: torch.dtype) -> Inputs:
        return (), {"input_ids": _tokens(batch, batch, 16), "attention_mask": torch.ones(batch, 16, dtype=torch.int64)}

    def pairs(batch: int, small: bool, dtype: torch.dtype) -> Inputs:
        return (), {"input_ids": _tokens(batch, batch, 16), "decoder_input_ids": _tokens(9 + batch, batch, 8)}

    def pixels(size: int) -> Callable[[int, bool, torch.dtype], Inputs]:
        return lambda batch, small, dtype: ((), {"pixel_values": _random(batch, batch, 3, size, size, dtype=dtype)})

    wide = {"num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 256}
    known: dict[str, tuple[Callable[[], nn.Module], Callable[[int, bool, torch.dtype], Inputs], dict[str, Any]]] = {
        "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(vocab_size=128, **wide)), masked_words, {}),
        "gpt2": (
            lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=128, n_embd=128, n_layer=4, n_head=8)),
            words, {"use_cache": False},
        ),
        "llama": (
            lambda: hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=128, num_key_value_heads=2, **wide)),
            words, {"use_cache": False},
        ),
        "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(image_size=64, patch_size=8, **wide)), pixels(64), {}),
        "t5": (
            lambda: hf.T5ForConditionalGeneration(
                hf.T5Config(vocab_size=128, d_model=128, d_kv=16, num_layers=3, num_heads=8, d_ff=256)
            ),
            pairs, {"use_cache": False},
        ),
        "segformer": (lambda: hf.SegformerForSemanticSegmentation(hf.SegformerConfig(num_labels=5)), pixels(64), {}),
    }  # fmt: skip
    build, inputs, constants = known[name]
    return Network(build, inputs, constants, reads_values=True)


COLLECTIONS: dict[str, Callable[[], list[str]]] = {
    "torchvision": lambda: torchvision.models.list_models(module=torchvision.models),
    "torchvision-more": lambda: [*SEGMENTATION, *VIDEO, *FLOW, *DETECTION],
    "timm": lambda: [f"timm:{name}" for name in TIMM],
    "transformers": lambda: [f"hf:{name}" for name in TRANSFORMERS],
}
