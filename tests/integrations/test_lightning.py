"""The Lightning callback in a real Trainer: what goes when, what is logged, how a run resumes across a removal."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_network import IMAGES, LABELS, PAT, same, traced
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stp_fx
from stp_fx.errors import InputError

pytest.importorskip("lightning")
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger

from stp_fx.integrations.lightning import PATCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # one process is meant
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # a resumed run keeps its checkpoints apart
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning"),  # Lightning 2.6 over torch 2.14
]


class Lit(LightningModule):
    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__()
        self.net, self.kind = traced(), optimizer

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch: Any, index: int) -> None:
        self.log("loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        if self.kind == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.05)
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


class Logger(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.rows.append(dict(metrics))


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)


def fit(folder: Path, callbacks: list[Callback], epochs: int, module: Lit | None = None, **options: Any) -> tuple[Lit, Trainer]:
    module = Lit() if module is None else module
    ckpt_path = options.pop("ckpt_path", None)
    torch.manual_seed(1)
    settings = {
        "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, "enable_progress_bar": False, "logger": False,
        "enable_model_summary": False, "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
    }  # fmt: skip
    trainer = Trainer(default_root_dir=folder, max_epochs=epochs, callbacks=callbacks, **{**settings, **options})
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return module, trainer


class Epochs(Callback):
    """What the model and its optimizer look like as each epoch begins, after the pruning step."""

    def __init__(self) -> None:
        self.macs: list[int] = []
        self.weights: list[torch.Tensor] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        net: Any = pl_module.net
        self.macs.append(stp_fx.cost(net).macs)
        self.weights.append(net.conv.weight.detach().clone())
        for parameter in net.parameters():
            for value in trainer.optimizers[0].state[parameter].values():
                assert value.dim() == 0 or value.shape == parameter.shape


def test_a_run_ends_at_the_ratio_and_goes_on_training(tmp_path: Path) -> None:
    seen, logger, callback = Epochs(), Logger(), PATCallback(**PAT)
    parameters = dict((module := Lit()).net.named_parameters())
    whole = stp_fx.cost(module.net)
    fit(tmp_path, [callback, seen], 5, module, logger=logger)
    assert seen.macs[0] < whole.macs
    assert seen.macs[0] > seen.macs[1] > seen.macs[2] == seen.macs[3] == seen.macs[4]
    net = module.net
    assert (net.conv.weight.shape, net.mid.weight.shape, net.mid.bias.shape) == ((8, 6, 3, 3), (10, 8), (10,))
    assert all(net.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert not torch.equal(seen.weights[3], seen.weights[4])
    assert not torch.equal(seen.weights[4], net.conv.weight)
    logged = [row["pat/macs"] for row in logger.rows if "pat/macs" in row]
    assert logged == seen.macs
    assert [row["pat/step"] for row in logger.rows if "pat/step" in row] == [1, 2, 3, 3, 3]
    assert callback.manager is not None
    assert callback.manager.finished


@pytest.mark.parametrize("stop", [2, 3])  # among masks, and after the removal
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, stop: int) -> None:
    def callbacks(folder: str) -> list[Callback]:
        return [PATCallback(**PAT, regularizer="growing"), ModelCheckpoint(tmp_path / folder, "{epoch}", save_top_k=-1)]

    uninterrupted, _ = fit(tmp_path, callbacks("first"), 5)
    path = str(tmp_path / "first" / f"epoch={stop - 1}.ckpt")
    resumed, trainer = fit(tmp_path, callbacks("second"), 5, ckpt_path=path)
    assert trainer.current_epoch == 5
    assert same(uninterrupted, resumed)


def test_a_checkpoint_of_weights_alone_can_be_tested_and_restored(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "weights", save_weights_only=True)
    trained, trainer = fit(tmp_path, [PATCallback(**PAT), saving], 3)
    path = tmp_path / "weights.ckpt"
    (expected,) = trainer.test(trained, loader(), verbose=False)
    fresh, callback = Lit(), PATCallback(**PAT)
    other = Trainer(accelerator="cpu", devices=1, logger=False, callbacks=[callback], enable_progress_bar=False)
    assert other.test(fresh, loader(), ckpt_path=str(path), verbose=False) == [expected]
    assert same(trained, fresh)
    assert not {"on_load_checkpoint", "on_save_checkpoint"} & set(fresh.__dict__)
    again, checkpoint = Lit(), torch.load(path, weights_only=True)
    PATCallback(**PAT).restore(again, checkpoint)
    again.load_state_dict(checkpoint["state_dict"])
    assert same(trained, again)


def test_gradients_are_regularized_once_a_step(tmp_path: Path) -> None:
    calls: list[float] = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            calls.append(callback.manager.regularize())  # type: ignore[union-attr]

    logger = Logger()
    callback = PATCallback(ratio=0.5, steps=1, start_epoch=2, regularizer=stp_fx.regularizers.GroupLasso(1e-3))
    fit(tmp_path, [callback, Look()], 3, logger=logger, accumulate_grad_batches=3, gradient_clip_val=1.0)
    assert len(calls) == 3
    assert calls[0] > 0 < calls[1]
    assert calls[2] == 0.0  # pruning is over
    logged = [row["pat/regularization"] for row in logger.rows if "pat/regularization" in row]
    assert logged == pytest.approx(calls)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_loss_is_added_to_the_loss(tmp_path: Path, accumulate: int) -> None:
    """As if the training step had added it."""

    class Adds(Lit):
        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return super().training_step(batch, index) + by_hand.manager.loss()  # type: ignore[union-attr]

    options = {"ratio": 0.5, "start_epoch": 1, "regularizer": stp_fx.regularizers.VarianceEntropy(0.1)}
    by_hand = PATCallback(**options, add_loss=False)  # type: ignore[arg-type]
    plain, _ = fit(tmp_path, [PATCallback(ratio=0.5, start_epoch=1)], 2, Lit("sgd"), accumulate_grad_batches=accumulate)
    added, _ = fit(tmp_path, [PATCallback(**options)], 2, Lit("sgd"), accumulate_grad_batches=accumulate)  # type: ignore
    expected, _ = fit(tmp_path, [by_hand], 2, Adds("sgd"), accumulate_grad_batches=accumulate)
    assert not same(plain, added)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(added.state_dict()[name], value)


def test_a_loss_is_scaled_and_divided_like_the_loss() -> None:
    """Lightning's GradScaler needs a GPU; torch's does not."""
    module, scaler = Lit(), torch.amp.GradScaler("cpu", init_scale=64.0)
    callback = PATCallback(start_epoch=1, regularizer=stp_fx.regularizers.VarianceEntropy(0.1))
    manager = callback._manage(module)

    class Fake:
        accumulate_grad_batches = 2

        class precision_plugin:
            scaler: Any = None

    Fake.precision_plugin.scaler = scaler
    task = F.cross_entropy(module.net(IMAGES), LABELS)
    expected = 32 * (task + manager.loss())
    task = F.cross_entropy(module.net(IMAGES), LABELS)
    loss = scaler.scale(task / 2)
    callback.on_before_backward(Fake(), module, loss)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, expected)
    assert loss > 32 * task


def test_mixed_precision(tmp_path: Path) -> None:
    module, _ = fit(tmp_path, [PATCallback(**PAT, regularizer="variance_entropy")], 4, precision="bf16-mixed")
    assert module.net.conv.weight.shape == (8, 6, 3, 3)
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_a_second_fit_goes_on(tmp_path: Path) -> None:
    callback = PATCallback(**PAT)
    module, trainer = fit(tmp_path, [callback], 2)
    before = copy.deepcopy(module.net)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader())
    assert module.net.conv.weight.shape == (8, 6, 3, 3)
    assert stp_fx.cost(before).macs > stp_fx.cost(module.net).macs
    assert callback.manager is not None
    assert callback.manager.optimizers == (trainer.optimizers[0],)


class Two(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.other = traced()


class Without(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(3, 4, 1)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Without, {}, "stp_fx.trace"),
        (Two, {}, "'net', 'other'"),
        (Two, {"model": "third"}, "'third'.*'net', 'other'"),
        (Lit, {"ratio": 2.0}, "ratio"),
        (Lit, {"compensation": "median"}, "median"),
    ],
)
def test_bad_arguments(tmp_path: Path, module: type[Lit], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit(tmp_path, [PATCallback(**options)], 1, module())


def test_what_the_trainer_gives_is_refused() -> None:
    with pytest.raises(InputError, match="`optimizer` comes from the trainer"):
        PATCallback(optimizer=None)


def test_two_graphs_of_a_module(tmp_path: Path) -> None:
    class Both(Two):
        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return F.cross_entropy(self.net(batch[0]) + self.other(batch[0]), batch[1])

    def callbacks(folder: str) -> list[Callback]:
        return [PATCallback("net", ratio=0.5), PATCallback("other", ratio=0.25), ModelCheckpoint(tmp_path / folder, "both")]

    module, _ = fit(tmp_path, callbacks("first"), 1, Both())
    assert (module.net.conv.weight.shape[0], module.other.conv.weight.shape[0]) == (8, 12)  # type: ignore[union-attr]
    resumed, _ = fit(tmp_path, callbacks("second"), 1, Both(), ckpt_path=str(tmp_path / "first" / "both.ckpt"))
    assert same(module, resumed)
    assert "on_load_checkpoint" not in resumed.__dict__


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        str(Path(__file__).with_name("lightning_worker.py")), str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "second" / "epoch=4.ckpt").exists()


def test_strategies_that_shard_are_refused() -> None:
    class Sharding:
        model = nn.Linear(2, 2)

    class Fake:
        strategy = Sharding()

    with pytest.raises(InputError, match="Sharding spreads"):
        PATCallback().on_fit_start(Fake(), Lit())  # type: ignore[arg-type]


def test_a_trainer_of_the_other_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lightning` brings `pytorch_lightning` along, whose classes are others."""
    other = pytest.importorskip("pytorch_lightning")
    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    monkeypatch.delitem(sys.modules, "stp_fx.integrations.lightning")
    adapter = importlib.import_module("stp_fx.integrations.lightning")
    assert issubclass(adapter.PATCallback, other.Callback)
    monkeypatch.undo()

    class OtherLit(other.LightningModule):
        training_step, configure_optimizers = Lit.training_step, Lit.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            self.net, self.kind = traced(), "sgd"

    module = OtherLit()
    trainer = other.Trainer(
        accelerator="cpu", devices=1, max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[adapter.PATCallback(**PAT)], default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, loader())
    assert module.net.conv.weight.shape == (8, 6, 3, 3)


def test_no_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "stp_fx.integrations.lightning")
    with pytest.raises(ImportError, match=r"stp-fx\[lightning\]"):
        importlib.import_module("stp_fx.integrations.lightning")
