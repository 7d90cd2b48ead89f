"""The harness: every claim of the library about one construct, against the original eager module."""

import contextlib
import copy
import logging
import traceback
import warnings
from dataclasses import dataclass, field

import torch

import stp_fx
from stp_fx.errors import NothingToPruneError, RewriteError, StpFxError, VerificationError

from .compare import Copies, call, difference, fresh, leaves, snapshot, tensors_of, unchanged

ORDER = ["SILENT", "FOREIGN", "WRONG-LOUD", "refused", "nothing-pruned", "pruned-inexact-ok", "ok"]


@dataclass
class Result:
    """What one construct gave on one front end."""

    name: str
    frontend: str
    findings: list = field(default_factory=list)
    share: float = 0.0
    base: str = "ok"
    log: list = field(default_factory=list)

    @property
    def verdict(self):
        """The worst class among the findings."""
        return min([c for c, _ in self.findings] + [self.base], key=ORDER.index)

    def add(self, kind, text):
        """Notes a finding."""
        self.findings.append((kind, text))


class Check:
    """One construct on one front end."""

    def __init__(self, case, frontend, extras=True):
        self.case, self.frontend, self.extras = case, frontend, extras
        self.result = Result(case.name, frontend)
        self.inputs = {w: case.args(w) for w in ("example", "batch", "size")}
        self.random = self.is_random()

    def is_random(self):
        """Whether the model's train mode draws random numbers."""
        m = self.case.model()
        args, kwargs = copy.deepcopy(self.inputs["example"])
        torch.manual_seed(3)
        before = torch.get_rng_state()
        m.train()(*args, **kwargs)
        return not torch.equal(before, torch.get_rng_state())

    def reference(self, make, which, lenient=False, graph=False, **kw):
        """The result of what `make` makes, or None where that itself cannot run it."""
        if self.inputs[which] is None:
            return None
        try:
            return call(make(), self.graph_inputs(which) if graph else self.inputs[which], **kw)
        except Exception:
            if which == "example" and not lenient:
                raise
            return None

    def announced(self, text=""):
        """Whether the library's log or report speaks of a difference."""
        said = " ".join(self.result.log)
        return any(w in said for w in ("differs", "from call to call", "does not keep", "hook", "requires a gradient"))

    def graph_inputs(self, which):
        """The inputs without named ones that hold no tensor: `trace` says that it bakes such arguments in."""
        args, kwargs = self.inputs[which]
        return args, {k: v for k, v in kwargs.items() if any(isinstance(t, torch.Tensor) for t in leaves(v))}

    def other_weights(self, gm):
        """That the graph reads its weights: both with other values."""

        def change(model):
            with torch.no_grad():
                for p in model.parameters():
                    if p.is_floating_point() or p.is_complex():
                        p.mul_(1.1).add_(0.01)
            return model

        copied = fresh(gm)
        if copied is gm:
            return
        self.same(
            "eval trace, weights changed",
            change(copied),
            self.reference(lambda: change(self.case.model()), "example"),
            grads=False,
        )

    def guarded(self, what, run):
        """Runs a public call; notes what it raises; None if it raised."""
        try:
            return run()
        except NothingToPruneError as e:
            self.result.base = "nothing-pruned" if self.result.base == "ok" else self.result.base
            self.result.log.append(f"{what}: {e}")
        except (RewriteError, VerificationError) as e:
            self.result.add("WRONG-LOUD", f"{what}: {type(e).__name__}: {e}"[:500])
        except StpFxError as e:
            self.result.add("refused", f"{what}: {type(e).__name__}: {e}"[:500])
        except Exception as e:
            where = traceback.extract_tb(e.__traceback__)[-1]
            self.result.add("FOREIGN", f"{what}: {type(e).__name__}: {e} ({where.filename}:{where.lineno})"[:700])
        return None

    def same(self, what, graph, eager, grads=True, index=None, which="example", repeat=1, plain=False):
        """Compares a graph's call with the reference: outputs, inputs after, buffers, gradients."""
        if eager is None:
            return
        train = what.startswith("train") or " train" in what
        try:
            inputs = self.inputs[which] if plain else self.graph_inputs(which)
            got = call(graph, inputs, train=train, grads=grads and bool(eager["grads"]), repeat=repeat, aliases=False)
        except Exception as e:
            text = f"{what}: the graph raises {type(e).__name__}: {e}"[:300]
            if which == "example":
                self.result.add("FOREIGN", text)
            else:
                self.result.log.append("does not take: " + text)
            return
        problems = [difference(got["out"], eager["out"]), difference(tensors_of(got["in"]), tensors_of(eager["in"]))]
        names = ["out", "inputs after"]
        kinds = ["buffers", "grads"] if grads and eager["grads"] else ["buffers"]
        for kind in kinds:
            for n in eager[kind]:
                if n not in got[kind]:
                    if bool(eager[kind][n].any()) and kind == "grads":
                        problems.append("no gradient"), names.append(f"{kind} {n}")
                    continue
                if index and kind == "buffers" and not (eager[kind][n].is_floating_point() or eager[kind][n].is_complex()):
                    continue  # positions are renumbered, as the docs say
                want = index(n, eager[kind][n]) if index else eager[kind][n]
                if index and kind == "grads":
                    want = want / self.factor(graph, n, index)
                problems.append(difference(got[kind][n], want, 1e-8)), names.append(f"{kind} {n}")
        for name, problem in zip(names, problems):
            if problem:
                loud = (train or name.startswith("grads")) and self.announced()
                self.result.add("WRONG-LOUD" if loud else "SILENT", f"{what} [{which}] {name}: {problem}")

    def factor(self, graph, name, index):
        """What the removal has multiplied an RMSNorm's weight with: its gradient is smaller by as much."""
        model = self.case.model()
        if not isinstance(dict(model.named_modules()).get(name.rpartition(".")[0]), torch.nn.RMSNorm):
            return 1.0
        before, after = index(name, dict(model.named_parameters())[name]), dict(graph.named_parameters())[name]
        ratio = (after / before).detach()
        assert torch.allclose(ratio, ratio[:1].expand_as(ratio)), "the weight of a norm is scaled by one number"
        return float(ratio[0])

    def trace(self):
        """Traces and compares the graph with the module."""
        model = self.case.model()
        before = snapshot(model)
        args, kwargs = copy.deepcopy(self.inputs["example"])
        gm = self.guarded("trace", lambda: stp_fx.trace(model, args, kwargs=kwargs or None, frontend=self.frontend))
        for problem in unchanged(before, snapshot(model)):
            self.result.add("SILENT", f"trace changed the model: {problem}")
        if gm is None:
            self.result.base = "refused"
            return None
        base, copies = self.case.model, Copies(gm)
        for which in ("example", "batch", "size"):
            self.same("eval trace", copies.take(), self.reference(base, which, grads=True), which=which)
            if self.case.train:
                self.same("train trace", copies.take(), self.reference(base, which, train=True, grads=True), which=which)
        if self.case.train:
            self.same(
                "train trace, 2nd call", fresh(gm), self.reference(base, "example", train=True, repeat=2), grads=False, repeat=2
            )
        self.other_weights(gm)
        gm.eval()
        return gm

    def oracle(self, plan):
        """The eager module with everything that the plan removes set to zero."""
        model = self.case.model()
        tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        for (name, dim), kept in plan.kept.items():
            t = tensors.get(name)
            if t is None:
                self.result.log.append(f"plan names {name}, which the module does not have")
                continue
            if not (t.is_floating_point() or t.is_complex()) or f"{name}:{dim}" in self.case.keep:
                continue
            gone = torch.ones(t.shape[dim], dtype=torch.bool)
            gone[torch.as_tensor(kept)] = False
            with torch.no_grad():
                t[(slice(None),) * dim + (gone,)] = self.case.fill.get(f"{name}:{dim}", 0.0)
        return model

    def compare_removed(self, what, pruned, exact):
        """The removal against the oracle where it is claimed exact, else that it runs."""
        plan = stp_fx.plan_of(pruned)

        def index(name, tensor):
            for (n, dim), kept in plan.kept.items():
                if n == name and tensor.shape[dim] != len(kept):
                    tensor = tensor.index_select(dim, torch.as_tensor(kept))
            return tensor

        tries = [("eval", "example"), ("eval", "batch"), ("eval", "size")]
        if not self.random and self.case.train:
            tries += [("train", "example"), ("train", "batch")]
        copies = Copies(pruned)
        for mode, which in tries:
            ref = self.reference(lambda: self.oracle(plan), which, train=mode == "train", grads=which == "example")
            if ref is None:
                continue
            if exact:
                self.same(f"{mode} {what}", copies.take(), ref, index=index, which=which)
                continue
            self.runs(f"{mode} {what} inexact", copies.take(), ref, mode == "train", which)

    def runs(self, what, graph, ref, train, which):
        """That an inexact result runs, is finite, has its shapes."""
        try:
            got = call(graph, self.graph_inputs(which), train=train, grads=bool(ref["grads"]))
        except Exception as e:
            kind = "FOREIGN" if which == "example" else None
            text = f"{what} [{which}]: the graph raises {type(e).__name__}: {e}"[:300]
            self.result.add(kind, text) if kind else self.result.log.append(text)
            return
        for a, b in zip(leaves(got["out"]), leaves(ref["out"])):
            if isinstance(a, torch.Tensor):
                if a.shape != b.shape:
                    self.result.add("SILENT", f"{what} [{which}]: shape {tuple(a.shape)} against {tuple(b.shape)}")
                elif not torch.isfinite(a).all() and torch.isfinite(b).all():
                    self.result.add("SILENT", f"{what} [{which}]: not finite")

    def prune(self, gm, criterion, **options):
        """A pruned graph and whether every touched group is claimed exact."""
        seed = {"seed": 3} if criterion == "random" else {}
        what = f"prune {criterion} {options}" if options else f"prune {criterion}"
        pruned = self.guarded(what, lambda: stp_fx.prune_graph(gm, criterion, 0.5, **seed, **options))
        if pruned is None:
            return None, True
        report = stp_fx.report_of(pruned)
        self.result.log.append(str(report.validation.line()) if report.validation else "")
        self.result.log.extend(report.notes)
        if report.notes and any("stay" in n or "whole" in n or "changes" in n for n in report.notes):
            self.result.add("ok", "notes: " + "; ".join(report.notes)[:400])
        touched = [g for g in report.to_dict()["groups"] if g["removed"]]
        return pruned, all(g["exact"] for g in touched)

    def others(self, gm, pruned):
        """The other public calls on what came out."""
        plan = stp_fx.plan_of(pruned)
        self.guarded("cost", lambda: (stp_fx.cost(gm), stp_fx.cost(pruned)))
        self.guarded("compare", lambda: str(stp_fx.compare(gm, pruned)))
        self.guarded("explain", lambda: [stp_fx.analyze(gm).explain(g.name) for g in stp_fx.analyze(gm).groups])
        again = self.guarded(
            "apply_plan", lambda: stp_fx.apply_plan(gm, stp_fx.PrunePlan.from_json(plan.to_json()), validate=False)
        )
        if again is not None:
            self.same(
                "eval apply_plan", again, self.reference(lambda: fresh(pruned), "example", lenient=True, graph=True), grads=False
            )
        r = self.result
        mark = len(r.findings)
        back = self.guarded("write_back", lambda: stp_fx.write_back(pruned, self.case.model()))
        r.findings[mark:] = [f for f in r.findings[mark:] if f[0] == "FOREIGN"]
        if back is not None:
            for which in ("example", "batch"):
                ref = (
                    self.reference(lambda: fresh(pruned), which, lenient=True, graph=True)
                    if self.inputs[which] is not None
                    else None
                )
                self.same("eval write_back", fresh(back), ref, grads=False, which=which, plain=True)

    def run(self):
        """All of it."""
        gm = self.trace()
        if gm is None:
            return self.result
        self.result.log.append(str(self.guarded("unknown", lambda: dict(stp_fx.analyze(gm).unknown)) or ""))
        inexact = [g.name for g in self.guarded("groups", lambda: stp_fx.analyze(gm).groups) or [] if not g.exact]
        total = sum(p.numel() for p in gm.parameters())
        for criterion in ("magnitude", "random"):
            pruned, exact = self.prune(gm, criterion)
            if pruned is None:
                if self.result.base == "nothing-pruned":
                    return self.result
                continue
            left = sum(p.numel() for p in pruned.parameters())
            self.result.share = 1 - left / max(1, total)
            if left >= total:
                self.result.add("ok", "no fewer parameters")
            self.compare_removed(criterion, pruned, exact and not self.case.inexact_only)
            if criterion == "magnitude" and self.extras:
                self.others(gm, pruned)
            if not exact:
                self.result.base = "pruned-inexact-ok"
                rest, exact = self.prune_rest(gm, criterion, inexact)
                if rest is not None:
                    self.compare_removed(f"{criterion} exact groups", rest, exact)
        blind, exact = self.prune(gm, "random", validate=False)
        if blind is not None and (pruned is None or stp_fx.plan_of(blind) != stp_fx.plan_of(pruned)):
            # Validation has pinned something. (Where it has not, this is the removal that was compared as "random".)
            mark = len(self.result.findings)
            self.compare_removed("unvalidated", blind, exact and not self.case.inexact_only)
            for i, (kind, text) in enumerate(self.result.findings[mark:], mark):
                self.result.findings[i] = (
                    "WRONG-LOUD" if kind in ("SILENT", "FOREIGN") else kind,
                    "caught by validation only: " + text,
                )
        return self.result

    def prune_rest(self, gm, criterion, inexact):
        """Prunes again, all inexact groups left whole."""
        base, found = self.result.base, list(self.result.findings)
        out = self.prune(gm, criterion, ignore=inexact)
        if out[0] is None:
            self.result.base, self.result.findings = (
                base,
                [*found, *[f for f in self.result.findings[len(found) :] if f[0] == "FOREIGN"]],
            )
        return out


class _Capture(logging.Handler):
    def __init__(self, into):
        super().__init__(logging.WARNING)
        self.into = into

    def emit(self, record):
        self.into.append(record.getMessage())


@contextlib.contextmanager
def _listening(into):
    handler, logger = _Capture(into), logging.getLogger("stp_fx")
    logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logger.removeHandler(handler)


def check(case, frontend="auto", extras=True):
    """Runs every check of one construct on one front end."""
    log = []
    with _listening(log):
        checker = Check(case, frontend, extras)
        checker.result.log = log
        return checker.run()
