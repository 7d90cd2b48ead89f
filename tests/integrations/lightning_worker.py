"""One process of test_lightning.py: `torchrun ... lightning_worker.py FOLDER`. Ends with the same smaller model on all ranks."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from small_network import IMAGES, LABELS, PAT, same, traced
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from stp_fx.integrations.lightning import PATCallback

MORE: dict[str, Any] = {"start_epoch": 1, "recalibrate": True, "regularizer": "growing"}


class Lit(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = traced()
        self.wrappers: list[Any] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        self.wrappers.append(self.trainer.strategy.model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(folder: Path, resume: str | None = None) -> Lit:
    module = Lit()
    saving = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=5, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[PATCallback(**PAT, **MORE), saving],
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4), ckpt_path=resume)
    return module


def main() -> None:
    folder = Path(sys.argv[1])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    module = fit(folder / "first")
    assert module.net.get_parameter("conv.weight").shape == (8, 6, 3, 3)
    assert all(isinstance(wrapper, DistributedDataParallel) for wrapper in module.wrappers)
    assert len({id(wrapper) for wrapper in module.wrappers}) == 3  # the first; with a bias of `mid`; at the removal
    mine = torch.cat([p.detach().flatten() for p in module.parameters()])
    others = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(others, mine)
    assert torch.equal(others[0], others[1])
    for epoch in (2, 3):  # among masks, and after the removal
        assert same(module, fit(folder / "second", str(folder / "first" / f"epoch={epoch}.ckpt")))


if __name__ == "__main__":
    main()
