"""The callback in a real Hugging Face Trainer, over a traced network in a module of the user's, and over a traced BERT."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_network import IMAGES, LABELS, PAT, same, traced
from torch import fx, nn

import stp_fx
from stp_fx.errors import InputError
from stp_fx.ir.provenance import provenance_of

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from stp_fx.integrations import transformers as adapter
from stp_fx.integrations.transformers import PATCallback


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """Every Trainer collects garbage, which takes longer than these runs with the modules that are imported by now."""
    gc.freeze()
    yield
    gc.unfreeze()


DATA = [{"x": x, "labels": y} for x, y in zip(IMAGES, LABELS, strict=True)]


class Classifier(nn.Module):
    """A graph in a module that computes the loss, as most users have it; with dropout, which draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = traced()

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = F.dropout(self.net(x), 0.1, self.training)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def trainer(
    folder: Path, callbacks: list[TrainerCallback], model: nn.Module | None = None, *, data: Any = DATA, **options: Any
) -> Trainer:
    optimizer = options.pop("optimizer", None)
    settings = {
        "num_train_epochs": 5, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "weight_decay": 0.01, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "logging_strategy": "epoch", "save_strategy": "no", "logging_steps": 3,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **{**settings, **options})
    model = Classifier() if model is None else model
    return Trainer(model, args, train_dataset=data, callbacks=callbacks, optimizers=(optimizer, None))


class Epochs(TrainerCallback):
    """What the model and its optimizer look like as each epoch begins, after the pruning step."""

    def __init__(self) -> None:
        self.macs: list[int] = []
        self.weights: list[torch.Tensor] = []

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        net = kwargs["model"].net
        self.macs.append(stp_fx.cost(net).macs)
        self.weights.append(net.conv.weight.detach().clone())
        for parameter in net.parameters():
            for value in kwargs["optimizer"].state[parameter].values():
                assert value.dim() == 0 or value.shape == parameter.shape


def test_a_run_ends_at_the_ratio_and_goes_on_training(tmp_path: Path) -> None:
    seen, model = Epochs(), Classifier()
    whole, parameters = stp_fx.cost(model.net), dict(model.net.named_parameters())
    run = trainer(tmp_path, [PATCallback(**PAT), seen], model)
    run.train()
    net = model.net
    assert whole.macs > seen.macs[0] > seen.macs[1] > seen.macs[2] == seen.macs[3] == seen.macs[4]
    assert (net.conv.weight.shape, net.mid.weight.shape, net.mid.bias.shape) == ((8, 6, 3, 3), (10, 8), (10,))
    assert all(net.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert not torch.equal(seen.weights[3], seen.weights[4])
    assert not torch.equal(seen.weights[4], net.conv.weight)
    rows = run.state.log_history
    assert [row["pat/macs"] for row in rows] == [*seen.macs, seen.macs[-1]]
    assert [row["pat/step"] for row in rows] == [1, 2, 3, 3, 3, 3]


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    def started(folder: str) -> tuple[Trainer, PATCallback]:
        callback = PATCallback(**{**PAT, "compensation": None}, regularizer="growing")
        return trainer(tmp_path / folder, [callback], save_strategy="epoch"), callback

    uninterrupted, _ = started("first")
    uninterrupted.train()
    assert uninterrupted.model.net.conv.weight.shape[0] == 8
    for stop in (2, 3):  # among masks, and after the removal
        resumed, callback = started("second")
        resumed.train(resume_from_checkpoint=callback.restore(tmp_path / "first" / f"checkpoint-{3 * stop}"))
        assert resumed.state.global_step == 15
        assert same(uninterrupted.model, resumed.model)


def test_a_run_that_adds_biases_resumes_with_the_users_optimizer(tmp_path: Path) -> None:
    def started() -> tuple[Trainer, PATCallback, torch.optim.Optimizer]:
        callback, model = PATCallback(**PAT), Classifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return trainer(tmp_path, [callback], model, save_strategy="epoch", optimizer=optimizer), callback, optimizer

    uninterrupted, *_ = started()
    uninterrupted.train()
    resumed, callback, optimizer = started()
    with pytest.raises(InputError, match=r"mid\.bias.*optimizers="):
        callback.restore(tmp_path / "checkpoint-9")
    resumed.train(resume_from_checkpoint=callback.restore(tmp_path / "checkpoint-9", optimizer))
    assert provenance_of(resumed.model.net).added == ("mid.bias",)
    assert same(uninterrupted.model, resumed.model)


def test_a_checkpoint_needs_restore(tmp_path: Path) -> None:
    trainer(tmp_path, [PATCallback(ratio=0.5, steps=2)], num_train_epochs=2, save_strategy="epoch").train()
    masked, removed = tmp_path / "checkpoint-3", tmp_path / "checkpoint-6"
    with pytest.raises(InputError, match=r"shape .*restore"):
        trainer(tmp_path, [PATCallback(ratio=0.5, steps=2)]).train(resume_from_checkpoint=str(removed))
    with pytest.raises(InputError, match="restore"):
        trainer(tmp_path, [PATCallback(ratio=0.5, steps=2)]).train(resume_from_checkpoint=str(masked))
    callback = PATCallback(ratio=0.5, steps=3)
    with pytest.raises(InputError, match="make the Trainer"):
        callback.restore(removed)
    fresh = trainer(tmp_path, [callback])
    before = {name: tensor.clone() for name, tensor in fresh.model.state_dict().items()}
    with pytest.raises(InputError, match="schedule"):
        callback.restore(removed)
    with pytest.raises(InputError, match=r"stp_fx_pat\.pt"):
        callback.restore(tmp_path / "nowhere")
    assert all(torch.equal(before[name], tensor) for name, tensor in fresh.model.state_dict().items())
    callback = PATCallback(ratio=0.5, steps=2)
    trainer(tmp_path, [callback])
    assert callback.restore(True) == str(removed)
    assert callback.manager is not None
    assert callback.manager.finished


def test_gradients_are_regularized_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    regularize = stp_fx.PATPassManager.regularize
    monkeypatch.setattr(stp_fx.PATPassManager, "regularize", lambda self: calls.append(regularize(self)))
    callback = PATCallback(ratio=0.5, start_epoch=2, regularizer=stp_fx.regularizers.GroupLasso(1e-3))
    trainer(tmp_path, [callback], num_train_epochs=3, gradient_accumulation_steps=3).train()
    assert len(calls) == 3
    assert calls[0] > 0 < calls[1]
    assert calls[2] == 0.0  # pruning is over


class Plain(Classifier):
    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits} if labels is not None else {"logits": logits}


def test_a_loss_is_added_to_the_loss(tmp_path: Path) -> None:
    """As if the model had added it."""

    class Adds(Plain):
        def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            output = super().forward(x, labels)
            return {**output, "loss": output["loss"] + callback.manager.loss()}  # type: ignore[union-attr]

    regularizer = stp_fx.regularizers.VarianceEntropy(0.1)
    options = {"num_train_epochs": 2, "gradient_accumulation_steps": 3, "optim": "sgd"}
    added, expected, plain = Plain(), Adds(), Plain()
    trainer(tmp_path, [PATCallback(start_epoch=1, regularizer=regularizer)], added, **options).train()
    callback = PATCallback(start_epoch=1, regularizer=regularizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "_adds_loss_of", lambda manager: lambda *_: None)
        trainer(tmp_path, [callback], expected, **options).train()
    trainer(tmp_path, [PATCallback(start_epoch=1)], plain, **options).train()
    assert not same(plain, added)
    assert not added._forward_hooks
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(added.state_dict()[name], value)


def test_a_model_without_a_loss_cannot_have_one_added(tmp_path: Path) -> None:
    class Without(Plain):
        def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            return super().forward(x)

    callback = PATCallback(start_epoch=1, regularizer="variance_entropy")
    with pytest.raises(InputError, match="VarianceEntropy"):
        trainer(tmp_path, [callback], Without()).train()


def test_gradients_that_are_still_scaled_are_unscaled_first() -> None:
    """A GradScaler works on CPUs too; Trainer's fp16 does not."""

    class Prepared:  # what Accelerate hands to callbacks
        def __init__(self) -> None:
            self.weight = nn.Parameter(torch.ones(3))
            self.optimizer = torch.optim.SGD([self.weight])
            self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    prepared = Prepared()
    prepared.scaler.scale(prepared.weight.sum()).backward()
    for _ in range(2):  # clipping may have done it
        adapter._unscale(prepared)
        assert prepared.weight.grad.tolist() == [1.0] * 3


CONFIG = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32,
    "max_position_embeddings": 16, "num_labels": 3, "type_vocab_size": 1,
}  # fmt: skip
TOKENS = torch.randint(1, 40, (12, 8), generator=torch.Generator().manual_seed(0))
SENTENCES = [
    {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": torch.tensor(k % 3)} for k, row in enumerate(TOKENS)
]


def bert() -> fx.GraphModule:
    torch.manual_seed(0)
    batch = {name: torch.stack([each[name] for each in SENTENCES[:4]]) for name in SENTENCES[0]}
    return stp_fx.trace(BertForSequenceClassification(BertConfig(**CONFIG)), None, kwargs=batch)


def test_a_bert_that_is_the_graph(tmp_path: Path) -> None:
    """The Trainer's model is the GraphModule: labels and loss are in it, in mixed precision, whose autocast Accelerate wraps
    around its forward. Saved, resumed, evaluated and pickled."""

    def started(folder: str) -> tuple[Trainer, PATCallback]:
        callback = PATCallback(ratio=0.5, steps=2, criterion="variance", regularizer="variance_entropy")
        options = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "bf16": True, "save_strategy": "epoch"}
        run = trainer(tmp_path / folder, [callback], copy.deepcopy(graph), data=SENTENCES, **options)
        run.eval_dataset = SENTENCES  # type: ignore[assignment]
        return run, callback

    graph = bert()
    first, _ = started("first")
    whole, before = stp_fx.cost(first.model), first.model.get_parameter("classifier.weight").clone()
    first.train()
    assert stp_fx.cost(first.model).macs < 0.3 * whole.macs
    assert not torch.equal(before[:, :8], first.model.get_parameter("classifier.weight"))
    loss = first.evaluate()["eval_loss"]
    second, callback = started("second")
    second.train(resume_from_checkpoint=callback.restore(tmp_path / "first" / "checkpoint-6"))
    assert same(first.model, second.model)
    assert second.evaluate()["eval_loss"] == pytest.approx(loss)
    assert [row["pat/step"] for row in first.state.log_history if "loss" in row] == [1, 2, 2]


class Tied(nn.Module):
    """A network whose last layer is its first."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.outer = nn.Embedding(40, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.decoder = nn.Linear(16, 40, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embedding(input_ids)
        logits = self.decoder(x + self.outer(F.gelu(self.inner(x))))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_shared_parameters_are_saved_once(tmp_path: Path) -> None:
    """safetensors, which Trainer saves with, refuses tensors that share memory."""

    def started(folder: str) -> tuple[Trainer, PATCallback]:
        torch.manual_seed(0)
        callback, model = PATCallback(ratio=0.5), stp_fx.trace(Tied(), (TOKENS[:4], TOKENS[:4]))
        data = [{"input_ids": row, "labels": row} for row in TOKENS]
        return trainer(tmp_path / folder, [callback], model, data=data, num_train_epochs=2, save_strategy="epoch"), callback

    first, _ = started("first")
    first.train()
    assert first.model.get_parameter("decoder.weight").shape == (40, 8)
    second, callback = started("second")
    second.train(resume_from_checkpoint=callback.restore(tmp_path / "first" / "checkpoint-2"))
    assert same(first.model, second.model)
    assert second.model.get_parameter("decoder.weight") is second.model.get_parameter("embedding.weight")
    assert "decoder.weight" not in first.model.state_dict()
    pickled = pickle.loads(pickle.dumps(second.model))
    assert torch.equal(pickled.get_parameter("embedding.weight"), second.model.get_parameter("embedding.weight"))


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'third'.*'net'"):
        trainer(tmp_path, [PATCallback("third")]).train()
    with pytest.raises(InputError, match="`wrap` comes from the trainer"):
        PATCallback(wrap=None)


def test_several_processes_are_refused() -> None:
    class Arguments:
        world_size = 2

    with pytest.raises(InputError, match=r"2 processes.*stp_fx\.integrations\.accelerate"):
        PATCallback().on_train_begin(Arguments(), None, None)  # type: ignore[arg-type]
