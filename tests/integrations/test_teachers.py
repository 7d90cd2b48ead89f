"""A teacher in the trainers of other libraries, while a callback prunes the student."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_network import IMAGES, LABELS, PAT, traced
from torch.utils.data import DataLoader, TensorDataset

import stp_fx

FEATURES = {"features": "blocks", "loss": "mse"}


def taught(features: list[float], net: Any, distill: stp_fx.Distillation, before: dict[str, torch.Tensor]) -> None:
    """After a run: the student was cut, has heard its teacher throughout, and the teacher is as it was."""
    assert net.conv.weight.shape == (8, 6, 3, 3)
    assert len(features) == 15  # five epochs of three batches
    assert min(features) > 1e-6
    assert sum(features[-3:]) < 0.8 * sum(features[6:9])  # the epoch after the last cut, and the last one
    assert not any("tap" in name for name in net.state_dict())
    for name, value in distill.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from lightning.pytorch import LightningModule, Trainer

    from stp_fx.integrations.lightning import PATCallback

    class Lit(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = traced()
            self.distill = stp_fx.Distillation(copy.deepcopy(self.net), self.net, **FEATURES)  # type: ignore[arg-type]
            self.seen: list[float] = []

        def on_fit_start(self) -> None:
            self.distill.to(self.device)  # it is no module, so that nothing of it is trained, saved or moved

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            outputs = self.net(batch[0])
            terms = self.distill.terms(outputs, batch[0])
            self.seen.append(terms["features"].item())
            return F.cross_entropy(outputs, batch[1]) + sum(terms.values())

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module = Lit()
    before = copy.deepcopy(module.distill.teacher.state_dict())
    assert all(name.startswith("net.") for name in module.state_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # one process is meant, and a CPU
        trainer = Trainer(
            default_root_dir=tmp_path, max_epochs=5, callbacks=[PATCallback(**PAT)], accelerator="cpu", devices=1,
            precision="bf16-mixed", enable_progress_bar=False, logger=False, enable_model_summary=False,
            enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8))
    taught(module.seen, module.net, module.distill, before)


def test_hugging_face(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from torch import nn
    from transformers import Trainer, TrainingArguments

    from stp_fx.integrations.transformers import PATCallback

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = traced()

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class DistillationTrainer(Trainer):
        def __init__(self, *args: Any, distill: stp_fx.Distillation, **options: Any) -> None:
            super().__init__(*args, **options)
            self.distill, self.seen = distill, list[float]()

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
            if model.training:
                terms = self.distill.terms(outputs, inputs["x"])
                self.seen.append(terms["features"].item())
                loss = loss + sum(terms.values())
            return (loss, outputs) if return_outputs else loss

    model = Classifier()
    distill = stp_fx.Distillation(copy.deepcopy(model.net), model.net, **FEATURES)  # type: ignore[arg-type]
    before = copy.deepcopy(distill.teacher.state_dict())
    args = TrainingArguments(
        str(tmp_path), num_train_epochs=5, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    data: Any = [{"x": x, "labels": y} for x, y in zip(IMAGES, LABELS, strict=True)]
    run = DistillationTrainer(model, args, train_dataset=data, callbacks=[PATCallback(**PAT)], distill=distill)
    run.train()
    taught(run.seen, model.net, distill, before)
