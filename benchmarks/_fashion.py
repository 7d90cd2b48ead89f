"""Fashion-MNIST, and three small networks trained on it: what the retention and training benchmarks start from.

    python benchmarks/_fashion.py [--only resnet|mobilenet|vit]     # trains the checkpoints anew: about an hour on one core

The images come from Debian's package ``dataset-fashion-mnist``, or through torchvision where there is a network.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CHECKPOINTS = Path(__file__).parent / "checkpoints"
MEAN, STD = 0.2860, 0.3530  # of the training images


class Images:
    """``train_x`` [images, 1, height, width] normalised, ``train_y`` [images]; ``test_x`` and ``test_y`` alike."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def augmented(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A batch as the training sees it."""
        raise NotImplementedError

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of the training set in random order, augmented."""
        order = torch.randperm(len(self.train_x), generator=generator)
        for index in order.split(size):
            yield self.augmented(self.train_x[index], generator), self.train_y[index]

    def calibration(self, images: int, size: int = 128, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
        """The same training images every time, not augmented."""
        order = torch.randperm(len(self.train_x), generator=torch.Generator().manual_seed(seed))[:images]
        return [(self.train_x[k], self.train_y[k]) for k in order.split(size)]

    def held_out(self, images: int, after: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Training images that are not among the first ``after`` of :meth:`calibration`: methods are chosen on them."""
        order = torch.randperm(len(self.train_x), generator=torch.Generator().manual_seed(seed))[after : after + images]
        return self.train_x[order], self.train_y[order]

    @torch.no_grad()
    def accuracy(self, model: nn.Module, images: tuple[Tensor, Tensor] | None = None) -> float:
        """Of the test images, or of those given."""
        was = model.training
        model.eval()
        all_x, all_y = (self.test_x, self.test_y) if images is None else images
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(all_x.split(500), all_y.split(500)))
        model.train(was)
        return right / len(all_x)


class Fashion(Images):
    """60,000 and 10,000 images of 28 x 28; training flips them and shifts them by up to two pixels."""

    def __init__(self) -> None:
        self.train_x, self.train_y = _split("train")
        self.test_x, self.test_y = _split("t10k")

    def augmented(self, x: Tensor, generator: torch.Generator) -> Tensor:
        flip = torch.rand(len(x), generator=generator) < 0.5
        return _shifted(torch.where(flip[:, None, None, None], x.flip(3), x), 2, generator)


class Digits(Images):
    """scikit-learn's 1,797 digits of 8 x 8, every fourth for testing; training shifts them by up to one pixel."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        images = torch.from_numpy(x.astype(np.float32)).reshape(-1, 1, 8, 8)
        images = (images - images.mean()) / images.std()
        labels = torch.from_numpy(y.astype(np.int64))
        test = torch.arange(len(images)) % 4 == 0
        self.train_x, self.train_y, self.test_x, self.test_y = images[~test], labels[~test], images[test], labels[test]

    def augmented(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return _shifted(x, 1, generator)


def _split(name: str) -> tuple[Tensor, Tensor]:
    if DEBIAN.exists():
        images = _idx(DEBIAN / f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
        labels = _idx(DEBIAN / f"{name}-labels-idx1-ubyte.gz", 8)
    else:
        from torchvision.datasets import FashionMNIST

        data = FashionMNIST("out/data", train=name == "train", download=True)
        images, labels = data.data.numpy()[:, None], data.targets.numpy()
    x = torch.from_numpy(images.astype(np.float32)).div_(255).sub_(MEAN).div_(STD)
    return x, torch.from_numpy(labels.astype(np.int64))


def _idx(path: Path, header: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8, offset=header)


def _shifted(x: Tensor, by: int, generator: torch.Generator) -> Tensor:
    height, width = x.shape[2:]
    dy, dx = torch.randint(0, 2 * by + 1, (2,), generator=generator).tolist()
    return F.pad(x, (by,) * 4, value=float(x.min()))[:, :, dy : dy + height, dx : dx + width]


class Block(nn.Module):
    """Two convolutions and a shortcut (He et al., CVPR 2016)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        same = stride == 1 and width_in == width
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-14: a stem, three stages of two blocks, a classifier."""

    def __init__(self, widths: tuple[int, int, int] = (16, 32, 64)) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0])
        blocks, width_in = [], widths[0]
        for k, width in enumerate(widths):
            blocks += [Block(width_in, width, 1 if k == 0 else 2), Block(width, width, 1)]
            width_in = width
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(width_in, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3)))


class Inverted(nn.Module):
    """Expand, depthwise, project (Sandler et al., CVPR 2018)."""

    def __init__(self, width_in: int, width: int, stride: int, expand: int = 4) -> None:
        super().__init__()
        inner = width_in * expand
        self.skip = stride == 1 and width_in == width
        self.body = nn.Sequential(
            nn.Conv2d(width_in, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(),
            nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.skip else self.body(x)


class MobileNet(nn.Module):
    """A MobileNetV2; with its usual strides for 28 x 28 images."""

    def __init__(self, strides: tuple[int, ...] = (2, 1, 2, 1, 1, 2, 1)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        widths = (16, 24, 24, 32, 32, 32, 48, 48)
        self.blocks = nn.Sequential(*[Inverted(a, b, s) for a, b, s in zip(widths[:-1], widths[1:], strides, strict=True)])
        self.last = nn.Sequential(nn.Conv2d(48, 160, 1, bias=False), nn.BatchNorm2d(160), nn.ReLU6())
        self.head = nn.Linear(160, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(self.stem(x))).mean((2, 3)))


class Layer(nn.Module):
    """Pre-norm attention and MLP (Dosovitskiy et al., ICLR 2021)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.project = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1)
        x = x + self.project(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Patches of 4 x 4 (49 tokens for 28 x 28), four layers of width 64, mean over tokens."""

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4, patch: int = 4, size: int = 28) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, patch, patch)
        self.position = nn.Parameter(torch.randn(1, (size // patch) ** 2, width) * 0.02)
        self.layers = nn.Sequential(*[Layer(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.layers(x)).mean(1))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained; ``bfloat16`` and ``channels_last`` are what is fastest on a CPU."""

    build: Callable[[], nn.Module]
    epochs: float
    lr: float
    decay: float
    bfloat16: bool = False
    channels_last: bool = False


NETWORKS = {
    "resnet": Recipe(ResNet, 9, 4e-3, 1e-2, bfloat16=True),
    "mobilenet": Recipe(MobileNet, 9, 4e-3, 1e-2, channels_last=True),
    "vit": Recipe(ViT, 12, 2e-3, 5e-2),
}


def load(name: str) -> nn.Module:
    """The trained network, in eval mode."""
    model = NETWORKS[name].build()
    model.load_state_dict(load_file(CHECKPOINTS / f"{name}.safetensors"))
    return model.eval()


def fit(model: nn.Module, data: Fashion, recipe: Recipe, seed: int = 0, batch: int = 64) -> None:
    """AdamW under one cosine cycle, with label smoothing."""
    generator = torch.Generator().manual_seed(seed)
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    model.train().to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.decay)
    steps = int(recipe.epochs * math.ceil(len(data.train_x) / batch))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps, pct_start=0.2)
    done = 0
    while done < steps:
        for x, y in data.batches(batch, generator):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
                loss = F.cross_entropy(model(x.to(memory_format=layout)), y, label_smoothing=0.05)
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            if done == steps:
                break
    model.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=NETWORKS)
    chosen = parser.parse_args().only
    data = Fashion()
    for name, recipe in NETWORKS.items():
        if chosen in (None, name):
            torch.manual_seed(0)
            model, start = recipe.build(), time.perf_counter()
            fit(model, data, recipe)
            CHECKPOINTS.mkdir(exist_ok=True)
            save_file(model.state_dict(), CHECKPOINTS / f"{name}.safetensors")
            print(
                f"{name}: {data.accuracy(model):.2%} after {recipe.epochs} epochs, {time.perf_counter() - start:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
