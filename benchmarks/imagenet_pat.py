"""Pruning-aware training of any torchvision or timm classifier on folders of images or a torchvision dataset.

    python benchmarks/imagenet_pat.py --data /data/imagenet --model resnet50 --mac-target 0.5 --criterion variance \\
        --pat-steps 5 --epoch-rate 2 --epochs 30 --compensation mean --recalibrate --ema 0.9999 --amp
    torchrun --nproc-per-node=8 benchmarks/imagenet_pat.py ...              # the same under DistributedDataParallel
    python benchmarks/imagenet_pat.py --resume ...                          # goes on from OUT/checkpoint.pt

``--data`` has the folders ``train`` and ``val`` in ImageNet's layout (a folder a class); ``--dataset FashionMNIST`` takes a
dataset of torchvision instead. All randomness of an epoch follows from the seed and the epoch, and the checkpoint after
every epoch is written atomically: a run killed at any moment and resumed ends with the same weights (on a CPU, bit for
bit). Report, sections 1.2 and 2.2.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from rich.console import Console
from rich.progress import track
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.transforms import v2

import stp_fx

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_console = Console(stderr=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--data", type=Path, help="folder with train/ and val/, or where --dataset is kept")
    add("--dataset", help="a dataset of torchvision by its class's name, in place of image folders")
    add("--model", default="resnet50", help="name in torchvision.models, or timm:NAME")
    add("--weights", type=Path, help="state dict to start from (torch.save or safetensors); without: random weights")
    add("--out", type=Path, default=Path("out/pat"), help="checkpoint, logs and the pruned model")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    pruning = result.add_argument_group("pruning").add_argument
    pruning("--criterion", default="magnitude")
    pruning("--ratio", type=float, help="fraction of the channels that goes")
    pruning("--mac-target", type=float, help="fraction of the MACs that stays, in place of --ratio")
    pruning("--scope", default="local", choices=["local", "global", "isomorphic"])
    pruning("--round-to", type=int, default=1)
    pruning("--pat-steps", type=int, default=1, help="1: one-shot")
    pruning("--start-epoch", type=int, default=0, help="epochs of sparse pre-training before the first step")
    pruning("--epoch-rate", type=int, default=1, help="epochs of training after each step but the last")
    pruning("--schedule", default="geometric")
    pruning("--remove-at-every-step", action="store_true", help="in place of masking until the last one")
    pruning("--regularizer", help=f"one of {', '.join(stp_fx.regularizers.known_regularizers())}")
    pruning("--strength", type=float, help="of the regularizer")
    pruning("--compensation", choices=["mean", "least_squares"])
    pruning("--recalibrate", action="store_true", help="BatchNorm, after the last step")
    pruning("--calibration-batches", type=int, default=50)

    training = result.add_argument_group("training").add_argument
    training("--epochs", type=int, default=30)
    training("--batch-size", type=int, default=128, help="of each process")
    training("--workers", type=int, default=4)
    training("--image-size", type=int, default=224)
    training("--optimizer", default="sgd", choices=["sgd", "adamw"])
    training("--lr", type=float, default=0.05)
    training("--weight-decay", type=float, default=1e-4)
    training("--lr-schedule", default="cosine", choices=["cosine", "step"])
    training("--step-size", type=int, default=10, help="epochs, of --lr-schedule step")
    training("--label-smoothing", type=float, default=0.0)
    training("--mixup", type=float, default=0.0, help="alpha of the Beta distribution; 0: none")
    training("--ema", type=float, default=0.0, help="decay of the averaged weights; 0: none")
    training("--amp", action="store_true", help="bfloat16, or float16 with a GradScaler on CUDA devices without it")
    training("--kd-alpha", type=float, default=1.0, help="weight of the labels' loss")
    training("--kd-beta", type=float, default=0.0, help="weight of the distillation from the unpruned model; 0: none")
    training("--kd-temperature", type=float, default=4.0)
    return result


class Run:
    """Everything that a run has, in the order in which it is made; :meth:`train` goes through the epochs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.device = torch.device(args.device)
        seed_all(args.seed, 0, 0)  # the same weights on every rank
        self.train_data, self.val_data, classes = datasets(args)
        self.model = captured(args, classes, self.train_data[0][0].unsqueeze(0)).to(self.device)
        self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False) if args.kd_beta else None
        decay = get_ema_multi_avg_fn(args.ema)
        self.ema = AveragedModel(self.model, multi_avg_fn=decay, use_buffers=True) if args.ema else None
        self.optimizer = optimizer_of(args, self.model)
        self.scheduler = scheduler_of(args, self.optimizer)
        half = args.amp and self.device.type == "cuda" and not torch.cuda.is_bf16_supported()
        self.half = torch.float16 if half else torch.bfloat16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.loader = self._loader(self.train_data, train=True)
        self.pat = manager_of(args, self)
        self.mixup = v2.MixUp(alpha=args.mixup, num_classes=classes) if args.mixup else None
        self.epoch = 0

    def _loader(self, data: Any, *, train: bool) -> DataLoader:
        sampler = DistributedSampler(data, shuffle=train, seed=self.args.seed) if dist.is_initialized() else None
        return DataLoader(
            data, self.args.batch_size, shuffle=train and sampler is None, sampler=sampler,
            num_workers=self.args.workers, drop_last=train and len(data) > self.args.batch_size,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip

    def train(self) -> None:
        """All epochs that are left: a step of pruning where one is due, training, evaluation, checkpoint."""
        args = self.args
        args.out.mkdir(parents=True, exist_ok=True)
        if args.resume and (args.out / "checkpoint.pt").exists():
            self.load(args.out / "checkpoint.pt")
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(Log(args.out, self.epoch)) if self.rank == 0 else None
            for epoch in range(self.epoch, args.epochs):
                seed_all(args.seed, epoch + 1, self.rank)
                if isinstance(self.loader.sampler, DistributedSampler):
                    self.loader.sampler.set_epoch(epoch)
                self.pat.prune(epoch)
                start, figures = time.perf_counter(), self._one_epoch(epoch)
                self.scheduler.step()
                self.epoch = epoch + 1
                figures |= {"accuracy": self.accuracy(self.model), "seconds": time.perf_counter() - start}
                if self.ema is not None:
                    figures["ema_accuracy"] = self.accuracy(self.ema.module)
                cost = stp_fx.cost(self.model)
                figures |= {"macs": cost.macs, "params": cost.params, "lr": self.optimizer.param_groups[0]["lr"]}
                if log is not None:
                    log.write(epoch, figures)
                    write_atomically(self.state_dict(), args.out / "checkpoint.pt")
                    _console.print(f"epoch {epoch}: " + ", ".join(f"{k} {v:.5g}" for k, v in figures.items()))
        if self.rank == 0:
            write_atomically(self.model.state_dict(), args.out / "pruned.pt")
            (args.out / "plan.json").write_text(stp_fx.plan_of(self.model).to_json())

    def _one_epoch(self, epoch: int) -> dict[str, float]:
        self.pat.parallel.train()
        total, penalty, batches = 0.0, 0.0, 0
        for x, y in track(self.loader, f"epoch {epoch}", console=_console, disable=self.rank > 0, transient=True):
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            if self.mixup is not None:
                x, y = self.mixup(x, y)
            with torch.autocast(self.device.type, self.half, enabled=self.args.amp):
                loss = self.loss(self.pat.parallel(x), x, y)
            self.optimizer.zero_grad()
            self.scaler.scale(loss + self.pat.loss()).backward()
            self.scaler.unscale_(self.optimizer)
            penalty += self.pat.regularize()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.ema is not None:
                self.ema.update_parameters(self.model)
            total, batches = total + float(loss.detach()), batches + 1
            if not math.isfinite(total):
                raise RuntimeError(f"epoch {epoch}: the loss is {float(loss.detach())}")
        return {"loss": total / batches, "regularization": penalty / batches}

    def loss(self, output: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The labels' cross-entropy, and distillation (Hinton et al., 2015) from the unpruned model."""
        loss = F.cross_entropy(output, y, label_smoothing=self.args.label_smoothing)
        if self.teacher is None:
            return loss
        t = self.args.kd_temperature
        with torch.no_grad():
            wanted = F.log_softmax(self.teacher(x) / t, 1)
        distilled = F.kl_div(F.log_softmax(output / t, 1), wanted, reduction="batchmean", log_target=True) * t * t
        return self.args.kd_alpha * loss + self.args.kd_beta * distilled

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Of the validation images, over all processes."""
        was = model.training
        model.eval()
        right = torch.zeros(2, device=self.device)
        for x, y in self._loader(self.val_data, train=False):
            found = model(x.to(self.device)).argmax(1)
            right += torch.tensor([float((found == y.to(self.device)).sum()), len(y)], device=self.device)
        if dist.is_initialized():
            dist.all_reduce(right)
        model.train(was)
        return float(right[0] / right[1])

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}
        return parts if self.ema is None else {**parts, "ema": self.ema}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data; loads with ``weights_only=True``."""
        return {"epoch": self.epoch, "pat": self.pat.state_dict(), **{k: v.state_dict() for k, v in self._parts().items()}}

    def load(self, path: Path) -> None:
        """The manager first: it gives the model, its average and the optimizer the shapes of what was saved."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.pat.load_state_dict(state["pat"])
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.epoch = state["epoch"]


class Log:
    """``log.csv``, and TensorBoard's events where that package is installed."""

    COLUMNS = ("epoch", "loss", "regularization", "accuracy", "ema_accuracy", "macs", "params", "lr", "seconds")

    def __init__(self, folder: Path, epoch: int) -> None:
        self.path = folder / "log.csv"
        known = list(csv.DictReader(self.path.read_text().splitlines())) if epoch and self.path.exists() else []
        with self.path.open("w", newline="") as file:  # lines of epochs that are run again go
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows(row for row in known if int(row["epoch"]) < epoch)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.board = None
        else:
            self.board = SummaryWriter(str(folder), purge_step=epoch)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self.board is not None:
            self.board.close()

    def write(self, epoch: int, figures: dict[str, float]) -> None:
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.COLUMNS).writerow({"epoch": epoch, **figures})
        if self.board is not None:
            for name, value in figures.items():
                self.board.add_scalar(name, value, epoch)


def datasets(args: argparse.Namespace) -> tuple[Any, Any, int]:
    """Training and validation data, and the number of classes."""
    to_tensor = [v2.ToImage(), v2.RGB(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    size = args.image_size
    augmented = v2.Compose([v2.RandomResizedCrop(size, scale=(0.35, 1.0)), v2.RandomHorizontalFlip(), *to_tensor])
    plain = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), *to_tensor])
    if args.dataset is None:
        if args.data is None:
            raise SystemExit("give --data, a folder with train/ and val/, or --dataset")
        train = torchvision.datasets.ImageFolder(args.data / "train", augmented)
        val = torchvision.datasets.ImageFolder(args.data / "val", plain)
    else:
        kind = getattr(torchvision.datasets, args.dataset)
        root = args.data or Path("out/data")
        train = kind(root, train=True, transform=augmented, download=True)
        val = kind(root, train=False, transform=plain, download=True)
    return train, val, len(train.classes)


def captured(args: argparse.Namespace, classes: int, example: Tensor) -> fx.GraphModule:
    """The network, traced, with its starting weights."""
    if args.model.startswith("timm:"):
        import timm

        model = timm.create_model(args.model.removeprefix("timm:"), num_classes=classes)
    else:
        model = torchvision.models.get_model(args.model, num_classes=classes)
    if args.weights is not None:
        if args.weights.suffix == ".safetensors":
            from safetensors.torch import load_file

            model.load_state_dict(load_file(args.weights))
        else:
            model.load_state_dict(torch.load(args.weights, weights_only=True))
    return stp_fx.trace(model, example)


def optimizer_of(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Weight decay on weights only: not on biases and norms."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": decayed}, {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0}]
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay)
    return torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay)


def scheduler_of(args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    if args.lr_schedule == "step":
        return torch.optim.lr_scheduler.StepLR(optimizer, args.step_size)
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)


def manager_of(args: argparse.Namespace, run: Run) -> stp_fx.PATPassManager:
    if (args.ratio is None) == (args.mac_target is None):
        raise SystemExit("give one of --ratio and --mac-target")
    regularizer = None
    if args.regularizer is not None:
        strength = () if args.strength is None else (args.strength,)
        regularizer = stp_fx.regularizers.resolve(args.regularizer, *strength)
    devices = [run.device] if run.device.type == "cuda" else None
    return stp_fx.PATPassManager(
        run.model, criterion=args.criterion, steps=args.pat_steps, start_epoch=args.start_epoch, epoch_rate=args.epoch_rate,
        ratio=1 - args.mac_target if args.ratio is None else args.ratio, target="channels" if args.mac_target is None else "macs",
        schedule=args.schedule, scope=args.scope, round_to=args.round_to, mask_until_last=not args.remove_at_every_step,
        regularizer=regularizer, compensation=args.compensation, recalibrate=args.recalibrate or None,
        train_loader=run.loader, calibration_batches=args.calibration_batches, optimizer=run.optimizer,
        followers=[] if run.ema is None else [run.ema.module],
        wrap=(lambda model: DistributedDataParallel(model, devices)) if dist.is_initialized() else None,
    )  # fmt: skip


def seed_all(seed: int, epoch: int, rank: int) -> None:
    """All of an epoch's randomness follows from these three numbers."""
    value = int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def write_atomically(state: Any, path: Path) -> None:
    """A process that reads it, after a crash too, sees the old file or the new one, never half of one."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


@contextlib.contextmanager
def process_group(args: argparse.Namespace) -> Iterator[None]:
    """Under ``torchrun``: NCCL on CUDA devices, gloo elsewhere."""
    if "RANK" not in os.environ:
        yield
        return
    if args.device.startswith("cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    with process_group(args):
        Run(args).train()


if __name__ == "__main__":
    main()
