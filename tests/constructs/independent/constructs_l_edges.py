"""State that forward writes, aliases, names, hooks, containers that are changed."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune

from .registry import X, case, conv, ints


class Two(nn.Module):
    """Two linear layers for the subclasses."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)


@case("prototypes normalised in place under no_grad in training (SwAV)", X(2, 6))
class NormalisedPrototypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.protos = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 4, bias=False)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.protos.weight.copy_(F.normalize(self.protos.weight, dim=1))
        return self.protos(F.normalize(self.b(F.relu(self.a(x))), dim=1))


@case("weight.data assigned its normalised self in every forward", X(2, 6))
class DataAssigned(Two):
    def forward(self, x):
        self.b.weight.data = F.normalize(self.b.weight.data, dim=1)
        return self.out(F.relu(self.b(F.relu(self.a(x)))))


@case("weights clamped in training (WGAN)", X(2, 6))
class ClampedWeights(Two):
    def forward(self, x):
        if self.training:
            for p in self.b.parameters():
                p.data.clamp_(-0.2, 0.2)
        return self.out(F.relu(self.b(F.relu(self.a(x)))))


@case("stateful recurrence: the last hidden state kept as an attribute", X(2, 6), batch=False)
class StatefulHidden(Two):
    def __init__(self):
        super().__init__()
        self.h = None

    def forward(self, x):
        h = self.a(x) if self.h is None else self.a(x) + self.b(self.h)
        h = torch.tanh(h)
        self.h = h.detach()
        return self.out(h)


@case("attention map stored for pictures, not used", X(2, 6))
class StoredMap(Two):
    def forward(self, x):
        y = F.relu(self.a(x))
        self.last_map = y.detach().softmax(-1)
        return self.out(self.b(y))


@case("setattr of a buffer by a formatted name", X(4, 6))
class SetattrBuffer(Two):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean_0", torch.rand(8))

    def forward(self, x):
        y = self.a(x)
        if self.training:
            setattr(self, f"mean_{0}", 0.9 * self.mean_0 + 0.1 * y.detach().mean(0))
        return self.out(F.relu(self.b(y - self.mean_0)))


@case("a sub-module's buffer assigned by the parent", X(4, 6), keep=("stats.scale:0",))
class ChildBuffer(Two):
    class Stats(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.rand(8) + 0.5)

        def forward(self, x):
            return x / self.scale

    def __init__(self):
        super().__init__()
        self.stats = ChildBuffer.Stats()

    def forward(self, x):
        y = self.a(x)
        if self.training:
            self.stats.scale = torch.lerp(self.stats.scale, y.detach().abs().mean(0), 0.2)
        return self.out(F.relu(self.b(self.stats(y))))


@case("buffer.data assigned; codebook EMA of VQ-VAE-2", X(4, 6))
class CodebookEma(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 5), nn.Linear(5, 3)
        self.register_buffer("embed", torch.randn(5, 4))
        self.register_buffer("cluster", torch.ones(4))

    def forward(self, x):
        z = self.a(x)
        d = z.pow(2).sum(1, keepdim=True) - 2 * z @ self.embed + self.embed.pow(2).sum(0, keepdim=True)
        ind = (-d).max(1)[1]
        hot = F.one_hot(ind, 4).type(z.dtype)
        q = F.embedding(ind, self.embed.transpose(0, 1))
        if self.training:
            self.cluster.data.mul_(0.9).add_(hot.sum(0), alpha=0.1)
            self.embed.data.copy_(0.9 * self.embed + 0.1 * (z.detach().transpose(0, 1) @ hot))
        return self.out(z + (q - z).detach())


@case("warm-up by a step buffer in arithmetic", X(2, 6))
class WarmupStep(Two):
    def __init__(self):
        super().__init__()
        self.register_buffer("step", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.step += 1
        w = torch.clamp(self.step / 10, max=1.0)
        return self.out(F.relu(self.a(x)) * w + self.b(F.relu(self.a(x))) * (1 - w))


@case("temperature annealed by a python number in training", X(2, 6))
class Annealed(Two):
    def __init__(self):
        super().__init__()
        self.tau = 2.0

    def forward(self, x):
        if self.training:
            self.tau = max(0.5, self.tau * 0.9)
        return self.out(torch.sigmoid(self.b(F.relu(self.a(x))) / self.tau))


@case("full backward hook on a container that scales gradients", X(2, 6))
class BackwardHookContainer(Two):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.body.register_full_backward_hook(lambda m, gi, go: tuple(g * 0.1 for g in gi))

    def forward(self, x):
        return self.out(self.body(F.relu(self.a(x))))


@case("full backward hook on a leaf layer", X(2, 6))
class BackwardHookLeaf(Two):
    def __init__(self):
        super().__init__()
        self.b.register_full_backward_hook(lambda m, gi, go: (gi[0] * 0.1,))

    def forward(self, x):
        return self.out(F.relu(self.b(F.relu(self.a(x)))))


@case("tensor hook set in forward", X(2, 6))
class TensorHook(Two):
    def forward(self, x):
        y = F.relu(self.a(x))
        if y.requires_grad:
            y.register_hook(lambda g: g * 0.1)
        return self.out(self.b(y))


@case("one module under two names", X(2, 6))
class TwoNames(Two):
    def __init__(self):
        super().__init__()
        self.c = self.b

    def forward(self, x):
        return self.out(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))


@case("biases tied between two layers of the same width", X(2, 6))
class TiedBiases(Two):
    def __init__(self):
        super().__init__()
        self.b.bias = self.a.bias

    def forward(self, x):
        return self.out(F.relu(self.b(F.relu(self.a(x)))))


@case("layers in a plain list, their weights in no state dict", X(2, 6))
class UnregisteredLayers(Two):
    def __init__(self):
        super().__init__()
        self.hidden = [nn.Linear(8, 8).double().requires_grad_(False)]

    def forward(self, x):
        return self.out(F.relu(self.hidden[0](F.relu(self.b(self.a(x))))))


@case("a plain tensor as a weight", X(2, 6))
class PlainTensorWeight(Two):
    def __init__(self):
        super().__init__()
        self.proj = torch.randn(8, 8, dtype=torch.float64)

    def forward(self, x):
        return self.out(F.relu(self.b(F.relu(self.a(x) @ self.proj))))


@case("torch.nn.utils.prune masks on a layer", X(2, 6))
class TorchPruned(Two):
    def __init__(self):
        super().__init__()
        torch_prune.l1_unstructured(self.b, "weight", 0.3)

    def forward(self, x):
        return self.out(F.relu(self.b(F.relu(self.a(x)))))


@case("orthogonal parametrization", X(2, 6))
class Orthogonal(Two):
    def __init__(self):
        super().__init__()
        parametrizations.orthogonal(self.b, orthogonal_map="cayley", use_trivialization=False)

    def forward(self, x):
        return self.out(F.relu(self.b(F.relu(self.a(x)))))


class _Positive(nn.Module):
    def forward(self, w):
        return F.softplus(w)


@case(
    "positive weights by a parametrization, cached",
    X(2, 6),
    fill={"b.parametrizations.weight.original:0": -1e6, "b.parametrizations.weight.original:1": -1e6},
)
class PositiveCached(Two):
    def __init__(self):
        super().__init__()
        parametrize.register_parametrization(self.b, "weight", _Positive())

    def forward(self, x):
        with parametrize.cached():
            return self.out(F.relu(self.b(F.relu(self.b(F.relu(self.a(x)))))))


@case("the input dict is updated and returned", {"x": X(2, 6)})
class UpdatesDict(Two):
    def forward(self, batch):
        y = F.relu(self.a(batch["x"]))
        batch["hidden_mean"] = self.b(y).mean(0)
        batch["y"] = self.out(y)
        return batch


@case("the input list is appended to", [X(2, 6)])
class AppendsToList(Two):
    def forward(self, feats):
        feats.append(self.out(F.relu(self.a(feats[-1]))))
        return feats


@case("outputs: the input itself, one value twice, None, a string", X(2, 6))
class OddOutputs(Two):
    def forward(self, x):
        y = self.out(F.relu(self.a(x)))
        return x, y, {"again": y, "none": None, "kind": "logits"}, [y.argmax(-1), y > 0]


@case("integer image scaled in forward", ints(255, 2, 3, 5, 5))
class ByteImage(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = conv(3, 8), conv(8, 3)
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, -1, 1, 1))

    def forward(self, img):
        x = (img.to(self.mean.dtype) / 255.0 - self.mean) / 0.2
        return self.out(F.relu(self.a(x)))


@case("parameters named `input`, `output`, `x`, `weight` at the root", X(2, 6))
class OddNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.output, self.input = nn.Parameter(torch.randn(8, 6)), nn.Linear(8, 3), nn.Parameter(torch.zeros(8))
        self.relu = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.output(F.relu(F.linear(x, self.weight, self.input)) * self.relu)


@case("forward arguments named `graph`, `meta` and `training`", X(2, 6), X(2, 8), X(2, 8))
class OddArguments(Two):
    def forward(self, graph, meta, training):
        return self.out(F.relu(self.a(graph) * meta + self.b(training)))


@case("forward arguments with Python built-in names", X(2, 6), kwargs={"input": X(2, 8), "type": X(2, 8)})
class BuiltinArguments(Two):
    def forward(self, x, input, type):
        return self.out(F.relu(self.a(x) * input + self.b(type)))


@case("sub-modules named with digits, and `_0`", X(2, 6))
class DigitNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module("0", nn.Linear(6, 8))
        self.add_module("_0", nn.Linear(8, 8))
        self.add_module("layer-1", nn.Linear(8, 3))

    def forward(self, x):
        m = dict(self.named_children())
        return m["layer-1"](F.relu(m["_0"](F.relu(m["0"](x)))))


@case("an embedding read as `.weight` in a submodule named `code`", ints(5, 2))
class NamedCodeEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.code, self.a, self.out = nn.Embedding(5, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, ids):
        q = F.embedding(ids, self.code.weight)
        return self.out(F.relu(self.a(q)))


@case("a method of the model named as a module of the graph, `recompile` flag", X(2, 6))
class NamedPrintReadable(nn.Module):
    def __init__(self):
        super().__init__()
        self.recompile, self.print_readable, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(F.relu(self.print_readable(F.relu(self.recompile(x)))))
