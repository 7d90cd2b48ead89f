"""Pruning-aware training in a loop with Hugging Face Accelerate, on scikit-learn's digits.

    python examples/accelerate_pat.py
    torchrun --nproc-per-node 2 examples/accelerate_pat.py --cpu       # `accelerate launch` has one process on CPUs, without MPI
    python examples/accelerate_pat.py --resume out/accelerate/epoch-4

Half of the multiply-accumulates go, in three steps; every epoch is saved, and a run goes on from any of them.
Needs ``pip install "stp-fx[accelerate,demo]"``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stp_fx
from stp_fx.integrations.accelerate import pat_manager


class Net(nn.Module):
    """Images ``[batch, 1, 8, 8]`` to logits ``[batch, 10]``."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv1, self.norm1 = nn.Conv2d(width, 2 * width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(2 * width)
        self.conv2, self.norm2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.conv1(F.relu(self.norm(self.stem(x))))))
        return self.head(F.relu(x + self.norm2(self.conv2(x))).mean((2, 3)))


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,347 images to train on, 450 held out."""
    bunch: Any = load_digits()
    images, labels = torch.tensor(bunch.images, dtype=torch.float32).div(8).sub(1).unsqueeze(1), torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[450:], order[:450]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def accuracy(accelerator: Accelerator, model: nn.Module, loader: DataLoader[Any]) -> float:
    model.eval()
    right, seen = 0, 0
    for x, y in loader:
        with torch.no_grad():
            found, expected = accelerator.gather_for_metrics((model(x).argmax(1), y))
        right, seen = right + int((found == expected).sum()), seen + len(expected)
    return right / seen


def train(args: argparse.Namespace) -> tuple[nn.Module, float]:
    """The trained model and its accuracy."""
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.accumulate,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # a resumed epoch sees the same batches
    )
    accelerator.print(f"{accelerator.num_processes} processes, {accelerator.device}")
    set_seed(0)
    train_data, test_data = digits()
    gm = stp_fx.trace(Net(args.width), train_data[0][0][None])
    whole = stp_fx.cost(gm)
    optimizer = torch.optim.AdamW(gm.parameters(), lr=args.lr)
    batches = DataLoader(train_data, args.batch_size, shuffle=True)
    model, optimizer, loader, test = accelerator.prepare(gm, optimizer, batches, DataLoader(test_data, 150))

    pat = pat_manager(
        accelerator, model, optimizer=optimizer, train_loader=loader, criterion="variance", ratio=args.ratio, target="macs",
        steps=3, start_epoch=args.start_epoch, compensation="mean", recalibrate=True, regularizer="group_lasso",
    )  # fmt: skip
    if args.resume:
        accelerator.load_state(args.resume)

    right = accuracy(accelerator, pat.parallel, test)
    for epoch in range(pat.epoch + 1, args.epochs):
        loader.set_epoch(epoch)  # before pruning, which reads the loader too
        pat.prune(epoch)  # masks at first; at the last step it removes, and pat.parallel may be another object
        pat.parallel.train()
        for number, (x, y) in enumerate(loader):
            if number == args.max_batches:
                break
            with accelerator.accumulate(pat.parallel):
                accelerator.backward(F.cross_entropy(pat.parallel(x), y) + pat.loss())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(gm.parameters(), 5.0)  # unscales the gradients of mixed precision
                    pat.regularize()
                optimizer.step()
                optimizer.zero_grad()
        right, now = accuracy(accelerator, pat.parallel, test), stp_fx.cost(gm)
        accelerator.print(f"epoch {epoch}: accuracy {right:.1%}, MACs {now.macs / whole.macs:.1%}, parameters {now.params:,}")
        accelerator.save_state(str(args.output / f"epoch-{epoch}"))
    return gm, right


def main(arguments: list[str] | None = None) -> tuple[nn.Module, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--start-epoch", type=int, default=4, help="the epoch of the first of three pruning steps")
    parser.add_argument("--ratio", type=float, default=0.5, help="the fraction of the multiply-accumulates that goes")
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-batches", type=int, default=None, help="of an epoch")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per optimizer step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--resume", default=None, help="a folder that an earlier run has saved")
    parser.add_argument("--output", type=Path, default=Path("out/accelerate"))
    return train(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
