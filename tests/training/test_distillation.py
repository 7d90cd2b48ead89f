"""Distillation: the loss against one written by hand, at every stage of pruning, and what it must leave alone."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import stp_fx
from stp_fx.errors import InputError
from stp_fx.testing.untouched import assert_untouched, snapshot
from stp_fx.training.features import Tap

X = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BLOCKS = ("relu", "mean", "gelu")
PLAN = {"stem": [0, 4, 5], "a": [1, 2, 9], "mid": [3, 6]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.na, self.b = nn.Conv2d(8, 10, 3, padding=1), nn.BatchNorm2d(10), nn.Conv2d(10, 8, 3, padding=1)
        self.mid, self.head = nn.Linear(8, 9), nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.b(F.relu(self.na(self.a(x)))))
        return self.head(F.gelu(self.mid(x.mean((2, 3)))))


def traced(seed: int = 0) -> fx.GraphModule:
    torch.manual_seed(seed)
    net = Net().double()
    for norm in (net.norm, net.na):  # so that evaluation is not far from training
        nn.init.uniform_(norm.running_mean, -0.2, 0.2), nn.init.uniform_(norm.running_var, 0.1, 0.4)
    return stp_fx.trace(net.eval(), X)


def by_hand(t: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logits and the ends of the blocks in evaluation, from tensors by name; of whatever width."""

    def norm(name: str, value: torch.Tensor) -> torch.Tensor:
        stored = (t[f"{name}.{each}"] for each in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(value, *stored)

    one = norm("norm", F.conv2d(x, t["stem.weight"], padding=1)).relu()
    inner = norm("na", F.conv2d(one, t["a.weight"], t["a.bias"], padding=1)).relu()
    two = (one + F.conv2d(inner, t["b.weight"], t["b.bias"], padding=1)).relu().mean((2, 3))
    three = F.gelu(F.linear(two, t["mid.weight"], t["mid.bias"]))
    return F.linear(three, t["head.weight"], t["head.bias"]), dict(zip(BLOCKS, (one, two, three), strict=True))


def tensors(gm: nn.Module) -> dict[str, torch.Tensor]:
    trained = dict(gm.named_parameters())
    return {name: t.detach().clone().requires_grad_(name in trained) for name, t in gm.state_dict().items()}


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Of [positions, classes], by the definition."""
    p, q = (torch.exp(x / temperature) / torch.exp(x / temperature).sum(-1, keepdim=True) for x in (teacher, student))
    return temperature**2 * (p * (p / q).log()).sum(-1).mean()


def expected_features(small: fx.GraphModule, teacher: fx.GraphModule, plan: stp_fx.PrunePlan) -> torch.Tensor:
    """The term of the features, of a student that has lost a plan's channels."""
    kept = {"relu": plan.kept["stem.weight", 0], "mean": plan.kept["stem.weight", 0], "gelu": plan.kept["mid.weight", 0]}
    (_, taught), (_, given) = by_hand(tensors(teacher), X), by_hand(tensors(small), X)
    errors = []
    for name in BLOCKS:
        wanted = taught[name][:, kept[name].tolist()]
        errors.append(((given[name] - wanted) ** 2).mean() / ((wanted - wanted.mean()) ** 2).mean())
    return sum(errors) / len(errors)


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_the_divergence_is_that_of_the_definition(temperature: float | None) -> None:
    teacher, student = traced(), traced(1)
    distill = stp_fx.Distillation(teacher, student, temperature=temperature, weight=0.3)
    outputs = student(X)
    loss = distill(outputs, X)
    expected = 0.3 * divergence(outputs, by_hand(tensors(teacher), X)[0], temperature or 4.0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, outputs), torch.autograd.grad(expected, outputs))
    assert distill(teacher(X), X).item() == pytest.approx(0.0, abs=1e-14)


def test_squared_differences_and_losses_of_the_users() -> None:
    teacher, student = traced(), traced(1)
    taught, outputs = by_hand(tensors(teacher), X)[0], student(X)
    squared = stp_fx.Distillation(teacher, loss="mse")(outputs, X)
    torch.testing.assert_close(squared, ((outputs - taught) ** 2).sum() / 24)
    largest = stp_fx.Distillation(teacher, loss=lambda s, t: (s - t).abs().max(), weight=2)(outputs, X)
    torch.testing.assert_close(largest, 2 * (outputs - taught).abs().max())


@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_classes_stand_where_they_are_said_to(dim: int, loss: str) -> None:
    taught, given = torch.randn(2, 3, 5, 7, dtype=torch.float64), torch.randn(2, 3, 5, 7, dtype=torch.float64)
    distill = stp_fx.Distillation(nn.Identity(), class_dim=dim, loss=loss)  # type: ignore[arg-type]
    rows = [value.movedim(dim, -1).reshape(-1, value.shape[dim]) for value in (given, taught)]

    def expected(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return divergence(s, t, 4.0) if loss == "kl" else ((s - t) ** 2).mean()

    torch.testing.assert_close(distill(given, taught), expected(*rows))
    where = torch.rand(given.movedim(dim, -1).shape[:-1]) < 0.4
    torch.testing.assert_close(distill(given, taught, where=where), expected(*(row[where.flatten()] for row in rows)))
    none = distill(given.requires_grad_(), taught, where=torch.zeros_like(where))
    none.backward()
    assert none.item() == 0
    assert not given.grad.any()
    with pytest.raises(InputError, match="class_dim=-1"):
        stp_fx.Distillation(nn.Identity())(given, taught)


def test_blocks_are_found_and_compared_at_the_channels_that_are_left() -> None:
    teacher = traced()
    plan = stp_fx.analyze(teacher).plan_for(PLAN)
    small = stp_fx.apply_plan(traced(1), plan, validate=False)
    for student in (stp_fx.apply_plan(traced(1), plan, mask=True, validate=False), small):
        distill = stp_fx.Distillation(teacher, student, features="blocks", feature_weight=0.5)
        assert distill.features == BLOCKS
        terms = distill.terms(student(X), X)
        torch.testing.assert_close(terms["features"], 0.5 * expected_features(small, teacher, plan).detach())


def test_gradients_are_those_of_a_loss_written_by_hand() -> None:
    teacher, student = traced(), stp_fx.prune_graph(traced(1), ratio=0.5, validate=False)
    distill = stp_fx.Distillation(teacher, student, features="blocks", temperature=2.0)
    distill(student(X), X).backward()
    own, known = tensors(student), stp_fx.plan_of(student).kept
    kept = {"relu": known["stem.weight", 0], "mean": known["stem.weight", 0], "gelu": known["mid.weight", 0]}
    (logits, given), (taught, wanted) = by_hand(own, X), by_hand(tensors(teacher), X)
    loss = divergence(logits, taught.detach(), 2.0)
    for name in BLOCKS:
        target = wanted[name][:, kept[name].tolist()].detach()
        loss = loss + (given[name] - target).square().mean() / target.var(correction=0) / 3
    loss.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, own[name].grad, msg=name)


class RMS(nn.Module):
    """Norms without scale in a chain, which a removal multiplies by a number; a value that is written to; a reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.rms_norm(self.a(x), (12,))
        heads = self.b(x).view(-1, 3, 4).relu_()
        return self.d(self.c(heads.flatten(1)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.into, self.out, self.norm = nn.Linear(6, 8), nn.Linear(8, 3), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.into(x).unsqueeze(0)
        q, k, v = (part(y).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = y + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.out(self.norm(y).squeeze(0))


@pytest.mark.parametrize(
    ("make", "features", "ignore"),
    [(RMS, ("rms_norm", "b", "c"), ()), (RMS, "blocks", ()), (Attention, ("v", "add", "o"), ("into",))],
)
def test_masked_and_removed_students_have_one_loss(make: Any, features: Any, ignore: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=torch.float64)
    student = stp_fx.trace(make().double(), x)
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1).add_(0.05)
    plan = stp_fx.plan_of(stp_fx.prune_graph(student, ratio=0.5, ignore=ignore, validate=False))
    found = []
    for attached_before in (True, False):
        gm = copy.deepcopy(student)
        distill = stp_fx.Distillation(teacher, gm, features=features)
        if not attached_before:
            distill.close()
        for masks in (True, False):
            cut = stp_fx.apply_plan(gm, plan, mask=masks, validate=False)
            assert any(isinstance(module, Tap) for module in cut.modules()) == attached_before
            again = stp_fx.Distillation(teacher, cut, features=features)
            found.append(again.terms(cut(x.clone()), x)["features"].detach())
    assert all(torch.allclose(each, found[0], rtol=1e-9) for each in found)
    assert 1e-4 < found[0].item() < 10


def test_a_value_that_is_written_to_is_kept_as_it_was() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=torch.float64)
    gm = stp_fx.trace(RMS().double(), x)
    distill = stp_fx.Distillation(copy.deepcopy(gm), gm, features=["view"])
    with torch.no_grad():
        gm.get_parameter("b.weight").mul_(2)
    values = gm.get_submodule("b")(F.rms_norm(gm.get_submodule("a")(x), (12,)))
    before = distill.teacher.get_submodule("b")(F.rms_norm(gm.get_submodule("a")(x), (12,)))
    error = (values - before).square().mean() / before.var(correction=0)
    assert (before < 0).any()
    torch.testing.assert_close(distill.terms(gm(x), x)["features"], error)


def test_through_a_run_of_pruning_aware_training() -> None:
    gm = traced()
    teacher, names = copy.deepcopy(gm), list(gm.state_dict())
    distill = stp_fx.Distillation(teacher, gm, features="blocks")
    averaged = AveragedModel(gm)
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-2)
    pat = stp_fx.PATPassManager(gm, ratio=0.5, steps=3, optimizer=optimizer, followers=[averaged.module])
    before, parameters = tensors(teacher), [id(p) for p in gm.parameters()]
    teacher.train()
    labels = torch.arange(6) % 4
    for epoch in range(4):
        pat.prune(epoch)
        first = None
        for _ in range(6):
            optimizer.zero_grad()
            outputs = pat.model.train()(X)
            terms = distill.terms(outputs, X)
            (F.cross_entropy(outputs, labels) + sum(terms.values())).backward()
            optimizer.step()
            averaged.update_parameters(pat.model)
            first = first if first is not None else terms["features"]
        assert terms["features"].item() < first.item()
    assert gm.get_parameter("a.weight").shape == (5, 4, 3, 3) == averaged.module.get_parameter("a.weight").shape
    assert averaged.module(X).shape == (6, 4)
    assert list(gm.state_dict()) == names
    assert [id(p) for p in gm.parameters()] == parameters
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(module.training for module in teacher.modules())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.requires_grad for p in teacher.parameters())


def test_a_resumed_run_goes_on_with_the_teacher_made_anew() -> None:
    def run() -> tuple[fx.GraphModule, stp_fx.PATPassManager, stp_fx.Distillation]:
        gm = traced()
        return gm, stp_fx.PATPassManager(gm, ratio=0.5, steps=2), stp_fx.Distillation(copy.deepcopy(gm), gm, features="blocks")

    gm, pat, distill = run()
    pat.prune(1)
    again, new_pat, resumed = run()
    new_pat.load_state_dict(pat.state_dict())
    again.load_state_dict(gm.state_dict())
    torch.testing.assert_close(resumed(again(X), X), distill(gm(X), X), rtol=0, atol=0)


def test_the_student_graph_is_given_back_as_it_was() -> None:
    gm = traced()
    code, expected = gm.code, gm(X)
    distill = stp_fx.Distillation(traced(1), gm, features=["norm", "relu_2"])
    assert gm.code != code
    assert torch.equal(gm(X), expected)
    other = traced(2)
    distill.student = other
    assert gm.code == code
    assert "stp_fx_tap" in other.code
    assert distill.terms(other(X), X)["features"] > 0
    distill.close()
    assert not any(isinstance(module, Tap) for module in other.modules())
    assert set(distill.terms(other(X), X)) == {"logits"}


def test_copies_and_files_of_a_student_that_is_read() -> None:
    gm = traced()
    distill = stp_fx.Distillation(traced(1), gm, features="blocks")
    outputs = gm(X)
    copied = copy.deepcopy(gm)
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    for each in (copied, torch.load(file, weights_only=False)):
        assert torch.equal(each(X), outputs)
        assert all(module.value is None for module in copy.deepcopy(each).modules() if isinstance(module, Tap))
    exported = torch.export.export(copied, (X,)).module()
    torch.testing.assert_close(exported(X), outputs)
    assert distill.terms(outputs, X)["features"] > 0  # what copies have run is not what is read


def test_modules_are_named_as_well_and_two_teachers_are_heard() -> None:
    torch.manual_seed(0)
    part = lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU())  # noqa: E731
    x = torch.randn(4, 6)
    gm = stp_fx.trace(nn.Sequential(part(), part(), nn.Linear(6, 2)), x)
    nodes = [node.name for node in gm.graph.nodes if node.op == "call_module"]
    first = stp_fx.Distillation(copy.deepcopy(gm), gm, features=["0", "1.0", "1"])
    second = stp_fx.Distillation(copy.deepcopy(gm), gm, features="blocks")
    assert first.features == (nodes[1], nodes[2], nodes[3])
    assert second.features == (nodes[1], nodes[3])
    with torch.no_grad():
        gm.get_parameter("1.0.weight").mul_(1.5)
    outputs = gm(x)
    assert first.terms(outputs, x)["features"].item() > 0 < second.terms(outputs, x)["features"].item()


class Auxiliary(nn.Module):
    """A second head in training; dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.aux, self.head = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: torch.Tensor) -> Any:
        x = F.dropout(F.relu(self.one(x)), 0.5, self.training)
        y = self.head(F.relu(self.two(x)))
        return {"logits": y, "aux": self.aux(x)} if self.training else {"logits": y, "aux": None}


def test_a_teacher_of_two_modes_teaches_as_in_evaluation() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    gm = stp_fx.trace(Auxiliary(), x)
    teacher = copy.deepcopy(gm)
    distill = stp_fx.Distillation(teacher, gm, features=["relu"], output="logits", loss="mse")
    outputs = gm(x)  # in training
    assert outputs["aux"] is not None
    assert teacher.training
    plain = F.relu(F.linear(x, teacher.get_parameter("one.weight"), teacher.get_parameter("one.bias")))
    taught = teacher.get_submodule("head")(F.relu(teacher.get_submodule("two")(plain)))
    terms = distill.terms(outputs, x)
    torch.testing.assert_close(terms["logits"], (outputs["logits"] - taught).square().mean())
    assert terms["features"].item() == 0
    assert teacher.training
    with pytest.raises(InputError, match="one mode only"):
        stp_fx.Distillation(teacher, gm, features=["aux"], output="logits")
    with pytest.raises(InputError, match=r"2 tensors.*'logits', 'aux'.*output='logits'"):
        stp_fx.Distillation(teacher)(outputs, x)


@pytest.mark.parametrize("kind", ["autocast", "bfloat16"])
def test_mixed_and_half_precision(kind: str) -> None:
    teacher, student = traced().float(), traced(1).float()
    x = X.float()
    exact = stp_fx.Distillation(teacher, student, features="blocks")
    expected = exact(student(x), x)
    if kind == "bfloat16":
        exact.to(torch.bfloat16)
        student, x = student.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        outputs = student(x)
        loss = exact(outputs, x)
    assert outputs.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.0)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def gradients(student: nn.Module, gm: fx.GraphModule, distill: stp_fx.Distillation) -> dict[str, torch.Tensor]:
    gm.zero_grad()
    distill(student(X), X).backward()
    return {name: p.grad.clone() for name, p in gm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("wrap", ["compile", "DDP"])
def test_wrapped_students_have_the_same_gradients_before_and_after_cuts(wrap: str, tmp_path: Path) -> None:
    gm = traced().train()
    plain = copy.deepcopy(gm)
    if wrap == "DDP":
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    wrapper: Callable[[Any], Any] = (
        DistributedDataParallel if wrap == "DDP" else lambda gm: torch.compile(gm, backend="aot_eager")
    )
    try:
        distills = [stp_fx.Distillation(traced(1), each, features="blocks") for each in (gm, plain)]
        managers = [stp_fx.PATPassManager(gm, ratio=0.5, steps=2, wrap=wrapper), stp_fx.PATPassManager(plain, ratio=0.5, steps=2)]
        for epoch in range(2):
            mine = gradients(managers[0].parallel, gm, distills[0])
            expected = gradients(plain, plain, distills[1])
            assert mine.keys() == expected.keys()
            assert len(mine) > 10
            for name, gradient in mine.items():
                torch.testing.assert_close(gradient, expected[name], msg=name)
            for manager in managers:
                manager.prune(epoch)
        assert managers[0].finished
        assert gradients(managers[0].parallel, gm, distills[0])["a.weight"].shape == (5, 4, 3, 3)
    finally:
        if wrap == "DDP":
            dist.destroy_process_group()


def test_any_module_may_teach_outputs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net().double()

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    teacher, student = Model(), traced()
    before, batch = tensors(teacher), {"x": X, "labels": torch.arange(6) % 4}
    outputs = student(X)
    found = [stp_fx.Distillation(teacher, student)(outputs, inputs) for inputs in (batch, tuple(batch.values()))]
    teacher.eval()
    assert found[0].item() == found[1].item() == pytest.approx(divergence(outputs, teacher.net(X), 4.0).item())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def shared() -> Any:
    net = Net().double()
    return stp_fx.Distillation(net, stp_fx.trace(net, X))


def rotated() -> tuple[Any, Any]:
    """A graph, and the same in another basis, of whose norms nothing tells."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8), nn.Linear(8, 8), nn.Linear(8, 2))
    gm = stp_fx.trace(net, X[:, 0, 0, :1].float().expand(6, 6))
    return gm, stp_fx.prune_graph(gm, ratio=0.0, basis="rotate", validate=False)


def other_basis() -> Any:
    return stp_fx.Distillation(*rotated(), features="blocks")


def test_files_keep_that_channels_are_mixtures(tmp_path: Path) -> None:
    gm, turned = rotated()
    stp_fx.save(turned, tmp_path / "turned.stp")
    stp_fx.save(gm, tmp_path / "plain.stp")
    before = snapshot(gm, turned)
    with pytest.raises(InputError, match="combinations of the teacher's"):
        stp_fx.Distillation(gm, stp_fx.load(tmp_path / "turned.stp", gm), features="blocks")
    plain = stp_fx.load(tmp_path / "plain.stp", turned)  # the file's numbers, which are not turned
    x = X[:, 0, 0, :1].float().expand(6, 6)
    assert stp_fx.Distillation(gm, plain, features="blocks").terms(plain(x), x)["features"].item() == 0
    assert_untouched(before)


def pruned_further() -> Any:
    return stp_fx.Distillation(stp_fx.prune_graph(traced(1), validate=False), traced(), features="blocks")


def other_structure() -> Any:
    class Wide(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mid, self.head = nn.Linear(8, 12), nn.Linear(12, 4)

    student = stp_fx.trace(Wide().double(), X)
    return stp_fx.Distillation(traced(), student, features="blocks")(student(X), X)


def twice() -> Any:
    gm = traced()
    distill = stp_fx.Distillation(traced(1), gm, features="blocks")
    outputs = gm(X)
    distill(outputs, X), distill(outputs, X)


def without_gradients() -> Any:
    gm = traced()
    distill = stp_fx.Distillation(traced(1), gm, features="blocks")
    with torch.no_grad():
        distill(gm(X), X)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (shared, r"share the parameter 'stem.weight'.*copy.deepcopy"),
        (lambda: stp_fx.Distillation(Net(), features="blocks"), "`teacher` is a Net"),
        (lambda: stp_fx.Distillation(traced(), features="blocks"), "`student` is a NoneType"),
        (lambda: stp_fx.Distillation(traced(), nn.DataParallel(traced(1)), features="blocks"), "`student` is a DataParallel"),
        (
            lambda: stp_fx.Distillation(traced(), traced(1), features=["relu_7"]),
            "no node or module 'relu_7'; did you mean 'relu_2'",
        ),
        (lambda: stp_fx.Distillation(traced(), traced(1), features=["x"]), "'x' is no computed tensor"),
        (lambda: stp_fx.Distillation(traced(), traced(1), features=[]), "`features` is empty"),
        (lambda: stp_fx.Distillation(traced(), traced(1), features="block"), "`features` holds 'block'"),
        (other_basis, "change of basis"),
        (pruned_further, "that the teacher has lost"),
        (other_structure, r"feature 'gelu' is \(6, 9\).*\(6, 12\).*features=None"),
        (twice, "no value of 'relu' has been seen"),
        (without_gradients, "with gradients enabled"),
        (lambda: stp_fx.Distillation(traced(), weight=0.0), "nothing is compared"),
        (lambda: stp_fx.Distillation(traced(), loss="mse", temperature=2.0), "`temperature` belongs to"),
        (lambda: stp_fx.Distillation(traced(), loss="l1"), "'kl', 'mse'"),  # type: ignore[arg-type]
        (lambda: stp_fx.Distillation(traced())(torch.zeros(6, 5), X), r"\(6, 5\).*\(6, 4\)"),
        (lambda: stp_fx.Distillation(traced())({}, X), "gives 0 tensors"),
        (lambda: stp_fx.Distillation(traced(), output="logits")({"a": X}, X), "no tensor .* 'logits'; it gives 'a'"),
        (
            lambda: stp_fx.Distillation(traced())(X, X.float()),
            r"parameters of torch.float64 on cpu.*torch.float32 on cpu.*distill.to",
        ),
        (
            lambda: stp_fx.Distillation(traced()).to("meta")(X, X),
            r"teacher is on meta, its inputs are on cpu: distill.to\('cpu'\)",
        ),
        (lambda: stp_fx.Distillation(traced())(torch.zeros(6, 4), X, where=torch.ones(6)), r"bool \(6,\)"),
        (lambda: stp_fx.Distillation(traced(), loss=lambda s, t: s)(torch.zeros(6, 4), X), "scalar tensor; it gave"),
        (lambda: stp_fx.Distillation(traced(), class_dim=3)(torch.zeros(6, 4), X), "`class_dim` is 3"),
    ],
)
def test_what_cannot_be_compared_is_refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(InputError, match=f"(?s){said}"):
        call()


def test_a_network_without_blocks_says_so_and_leaves_the_student_alone() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    student = stp_fx.trace(nn.Sequential(nn.Linear(6, 2)), torch.randn(2, 6))
    code = student.code
    with pytest.raises(InputError, match="found one block"):
        stp_fx.Distillation(copy.deepcopy(student), student, features="blocks")
    dense = stp_fx.trace(Dense(), torch.randn(2, 6))
    with pytest.raises(InputError, match=r"the student computes no 'cat'"):
        stp_fx.Distillation(dense, student, features=["cat"])
    assert student.code == code
