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
TIMM_MORE = (
    "coat_lite_tiny", "crossvit_9_240", "xcit_nano_12_p16_224", "cait_xxs24_224", "volo_d1_224", "eva02_tiny_patch14_224",
    "beit_base_patch16_224", "maxvit_rmlp_nano_rw_256", "efficientformer_l1", "efficientformerv2_s0", "fastvit_t8",
    "mobilevit_xxs", "mobilevitv2_050", "mobileone_s0", "repghostnet_050", "regnety_002", "rexnet_100", "ese_vovnet19b_dw",
    "selecsls42", "inception_v4", "xception41", "nasnetalarge", "gcresnet33ts", "botnet26t_256", "halonet26t",
    "lambda_resnet26t", "sequencer2d_s", "convmixer_768_32", "gmlp_s16_224", "resmlp_12_224", "focalnet_tiny_srf",
    "davit_tiny", "gcvit_xxtiny", "mvitv2_tiny", "nest_tiny", "tnt_s_patch16_224", "visformer_tiny", "tiny_vit_5m_224",
    "efficientvit_b0", "efficientvit_m0", "hiera_tiny_224", "ghostnetv2_100", "starnet_s1", "convnextv2_atto",
    "swinv2_tiny_window8_256", "vit_relpos_small_patch16_224", "hgnet_tiny", "inception_next_tiny", "caformer_s18", "pvt_v2_b0",
    "repvit_m1", "resnest14d", "seresnet50", "skresnext50_32x4d", "dla34", "res2next50", "tf_efficientnetv2_b0", "vgg11_bn",
    "mixnet_s", "hardcorenas_a", "mnasnet_100", "fbnetc_100", "lcnet_050", "tinynet_a", "convit_tiny", "rdnet_tiny",
    "mambaout_femto",
)  # fmt: skip
SEGMENTATION = ("fcn_resnet50", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large")
VIDEO = {"r3d_18": 112, "mc3_18": 112, "r2plus1d_18": 112, "s3d": 224, "mvit_v1_b": 224, "swin3d_t": 224}
FLOW = ("raft_large", "raft_small")
DETECTION = (
    "fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large",
)  # fmt: skip

# The arguments that the module's own factory needs to build quickly and without warnings.
OPTIONS: dict[str, dict[str, Any]] = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
IMAGE = {"inception_v3": 299}
# In double precision, smaller images where the network takes them: the law is about channels, not about pixels.
SMALL_IMAGE = {"inception_v3": 299}  # its auxiliary head, in training, takes no smaller
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
    if collection == "wild":
        return _wild()[plain]
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
    from _coverage_transformers import TRANSFORMERS

    build, inputs, constants = TRANSFORMERS[name]
    return Network(build, lambda batch, small, dtype: ((), inputs(batch, dtype)), constants, reads_values=True)


def _transformers(named: bool) -> list[str]:
    from _coverage_transformers import NAMED, TRANSFORMERS

    return [f"hf:{name}" for name in TRANSFORMERS if (name in NAMED) == named]


def _wild() -> dict[str, Network]:
    """Networks of other libraries, as their users build them."""
    from _wild_detection import DETECTION
    from _wild_images import IMAGES
    from _wild_sequences import SEQUENCES

    return {**DETECTION, **IMAGES, **SEQUENCES}


COLLECTIONS: dict[str, Callable[[], list[str]]] = {
    "torchvision": lambda: torchvision.models.list_models(module=torchvision.models),
    "torchvision-more": lambda: [*SEGMENTATION, *VIDEO, *FLOW, *DETECTION],
    "timm": lambda: [f"timm:{name}" for name in TIMM],
    "timm-more": lambda: [f"timm:{name}" for name in TIMM_MORE],
    "transformers": lambda: _transformers(named=True),
    "transformers-more": lambda: _transformers(named=False),
    "wild": lambda: [f"wild:{name}" for name in _wild()],
}
