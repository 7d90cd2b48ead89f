"""The command line: what each command prints and writes, its exit codes, and what it says of bad input."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import safetensors.torch
import torch

import stp_fx
from stp_fx.cli import main
from stp_fx.selection import PrunePlan

SHAPE = ("-i", "1,1,8,8")
COMMANDS = ("analyze", "prune", "compare", "sweep", "draw", "explore", "doctor")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*argv: str, code: int = 0) -> tuple[str, str]:
        found = main(list(argv))
        out, err = capsys.readouterr()
        assert found == code, err or out
        return out, err

    return run


def from_json(run: Any, *argv: str) -> dict[str, Any]:
    out, _ = run(*argv, "--json")
    return json.loads(out)


# -- help -------------------------------------------------------------------------------------------------------------


def test_help_lists_commands_and_exit_codes(run: Any) -> None:
    out, err = run("--help")
    assert all(f"    {command} " in out for command in COMMANDS)
    assert "exit codes:" in out
    assert err == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_examples_and_fits_a_terminal(run: Any, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out, _ = run(command, "--help")
    assert f"  stp-fx {command} " in out.partition("examples:")[2]
    assert "MODEL is one of" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("argv", [[], ["prun"], ["analyze"], ["analyze", "net:make", "--bogus"], ["draw", "net:make"]])
def test_bad_usage_is_2(run: Any, argv: list[str]) -> None:
    out, err = run(*argv, code=2)
    assert out == ""
    assert "stp-fx" in err
    assert "error:" in err


def test_version(run: Any) -> None:
    assert run("--version")[0] == f"stp-fx {stp_fx.__version__}\n"


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["net:make", "net:Net", "net:module", "net.py:make", "./net.py:Net"])
def test_models_of_the_users(run: Any, spec: str, project: pathlib.Path) -> None:
    before = list(sys.path)
    assert from_json(run, "analyze", spec, *SHAPE)["units"] == 24
    assert sys.path == before


def test_factory_arguments(run: Any) -> None:
    assert from_json(run, "analyze", "net.py:make", *SHAPE, "-a", "width=12")["units"] == 28
    _, err = run("analyze", "net.py:make", *SHAPE, "-a", "depth=12", code=2)
    assert "net.py:make(depth=12) raised TypeError" in err
    _, err = run("analyze", "net.py:module", *SHAPE, "-a", "width=12", code=2)
    assert "is already a module" in err


@pytest.mark.parametrize("spec", ["squeezenet1_1", "torchvision:squeezenet1_1"])
def test_torchvision_names(run: Any, spec: str) -> None:
    found = from_json(run, "analyze", spec, "-i", "1,3,64,64", "-a", "num_classes=10")
    assert found["params"] == 727_626
    assert found["inputs"] == ["1,3,64,64"]


def test_timm_names_bring_their_own_input_size(run: Any) -> None:
    pytest.importorskip("timm")
    assert from_json(run, "analyze", "timm:test_resnet")["inputs"] == ["1,3,160,160"]
    _, err = run("analyze", "timm:test_resnett", code=2)
    assert "timm has no model 'test_resnett'; did you mean 'test_resnet'" in err


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("resnet5", "did you mean 'resnet50'"),
        ("resnext", "did you mean 'resnext50_32x4d'"),
        ("torchvision:resnet5", "torchvision has no model 'resnet5'; did you mean 'resnet50'"),
        ("qqqq", "write package.module:factory"),
        ("net.py", "name one of its objects: net.py:NAME"),
        ("net.py:mak", "net.py has no 'mak'; did you mean 'make'?"),
        ("nets.py:make", "there is no file 'nets.py'"),
        ("nets:make", "there is no module 'nets'"),
        ("failing:make", "failing needs a module that is not installed: 'a_module_that_is_not_there'"),
        ("failing.py:make", "failing.py fails as it is imported: ModuleNotFoundError"),
        ("net.py:broken", "net.py:broken() raised RuntimeError: no luck"),
        ("net.py:number", "gave a int; it has to give a torch.nn.Module"),
        ("net.py:torch", "is a module; name a module, its class, or a function"),
        ("net:", "names no object"),
    ],
)
def test_models_that_are_none(run: Any, spec: str, said: str) -> None:
    out, err = run("analyze", spec, code=2)
    assert out == ""
    assert said in err
    assert len(err.splitlines()) == 1


def test_inputs_by_name_and_dtype(run: Any) -> None:
    found = from_json(run, "analyze", "net.py:Tokens", "-i", "int64:2,7", "-i", "mask=2x7")
    assert found["inputs"] == ["int64:2,7", "mask=2,7"]
    assert found["units"] == 24


@pytest.mark.parametrize("text", ["1,3,8a", "int63:1,3", "1,0,3", "2 b=1,3", ","])
def test_inputs_that_are_none(run: Any, text: str) -> None:
    _, err = run("analyze", "net.py:make", "-i", text, code=2)
    assert "argument --input/-i" in err


def test_the_default_input_is_named_where_it_does_not_fit(run: Any) -> None:
    _, err = run("analyze", "net.py:make", code=2)
    assert "It was captured with the default --input 1,3,224,224" in err
    assert len(err.splitlines()) == 1  # what torch logs on the way is not shown


# -- weights ----------------------------------------------------------------------------------------------------------


def net(width: int = 8) -> torch.nn.Module:
    from stp_fx.cli.models import load_model

    return load_model("net.py:make", {"width": width}).model


@pytest.mark.parametrize("form", ["net.safetensors", "net.pt", "nested.pt", "parallel.pth"])
def test_weights_from_a_file(run: Any, form: str) -> None:
    state = {name: torch.full_like(value, 0.25) for name, value in net().state_dict().items()}
    if form.endswith("safetensors"):
        safetensors.torch.save_file(state, form)
    elif form.startswith("nested"):
        torch.save({"epoch": 3, "state_dict": state}, form)
    else:
        torch.save({"module." + name: v for name, v in state.items()} if form.startswith("par") else state, form)
    run("prune", "net.py:make", *SHAPE, "-w", form, "-o", "small.stp")
    small = stp_fx.load("small.stp", net())
    assert all(bool((value == 0.25).all()) for value in small.state_dict().values())


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"stem.weight": torch.zeros(8, 1, 3, 3)}, "has no 'stem.bias', which the model has"),
        ({**dict.fromkeys(["body.weightt"], torch.zeros(1))}, "has no 'stem.weight'"),
        ([1, 2], "holds no state dict"),
        (print, "cannot be read without running code"),
    ],
)
def test_weights_that_do_not_fit(run: Any, state: Any, said: str) -> None:
    torch.save(state, "bad.pt")
    _, err = run("prune", "net.py:make", *SHAPE, "-w", "bad.pt", "--dry-run", code=2)
    assert said in err


def test_weights_of_another_shape_or_with_more_names(run: Any) -> None:
    torch.save(net(12).state_dict(), "wide.pt")
    _, err = run("analyze", "net.py:make", *SHAPE, "-w", "wide.pt", code=2)
    assert "'stem.weight' has shape (12, 1, 3, 3) in wide.pt, but (8, 1, 3, 3) in the model" in err
    torch.save({**net().state_dict(), "haed.weight": torch.zeros(1)}, "more.pt")
    _, err = run("analyze", "net.py:make", *SHAPE, "-w", "more.pt", code=2)
    assert "more.pt has 'haed.weight', which the model has not; did you mean 'head.weight'" in err
    pathlib.Path("junk.safetensors").write_bytes(b"junk" * 9)
    assert "no readable safetensors" in run("analyze", "net.py:make", "-w", "junk.safetensors", code=2)[1]
    assert "there is no file 'none.pt'" in run("analyze", "net.py:make", "-w", "none.pt", code=2)[1]


def test_random_weights_are_said_to_be_random(run: Any) -> None:
    argv = ("prune", "squeezenet1_1", "-i", "1,3,64,64", "--dry-run")
    assert "the weights of squeezenet1_1 are random" in run(*argv)[1]
    assert run(*argv, "--quiet")[1] == ""


# -- analyze ----------------------------------------------------------------------------------------------------------


def test_analyze(run: Any) -> None:
    out, err = run("analyze", "net.py:make", *SHAPE)
    graph = stp_fx.trace(net(), torch.zeros(1, 1, 8, 8))
    cost = stp_fx.cost(graph)
    assert f"{cost.macs:,} MACs, {cost.params:,} parameters, 24 channels in 2 groups" in out
    assert [line.split()[:2] for line in out.splitlines() if line.startswith(("stem", "body"))] == [
        ["stem.weight:0", "8"],
        ["body.weight:0", "16"],
    ]
    assert "graph output" in out
    assert err == ""
    found = from_json(run, "analyze", "net.py:make", *SHAPE)
    assert (found["schema"], found["macs"], found["params"]) == (1, cost.macs, cost.params)
    assert found["pinned"]["graph output"] == ["head.weight:0", "head.bias:0"]
    assert found["groups"][1]["axes"][:2] == ["body.weight:0", "head.weight:1"]
    assert found["groups"][1]["params_per_unit"] == 8 * 9 + 1 + 10


def test_analyze_explains(run: Any) -> None:
    out, _ = run("analyze", "net.py:make", *SHAPE, "-e", "stem", "-e", "graph output")
    assert "stem.weight:0 (8 positions, weight out): 8 in group 'stem.weight:0' of 8 units" in out
    assert "graph output: 2 axes: head.weight:0, head.bias:0" in out
    found = from_json(run, "analyze", "net.py:make", *SHAPE, "-e", "body", "--index", "3")
    assert found["explained"]["body"].startswith("body.weight:0[3]: unit 3 of group 'body.weight:0'")
    _, err = run("analyze", "net.py:make", *SHAPE, "-e", "steam", code=2)
    assert "did you mean 'stem'" in err


# -- prune ------------------------------------------------------------------------------------------------------------


def test_prune_writes_what_load_reads(run: Any) -> None:
    out, err = run("prune", "net.py:make", *SHAPE, "-r", "0.5", "-o", "small.stp")
    assert "wrote small.stp" in err
    assert "4/8" in out
    expected = stp_fx.prune_graph(net(), ratio=0.5, example_inputs=torch.zeros(1, 1, 8, 8))
    small = stp_fx.load("small.stp", net())
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(small(x), expected(x))
    assert "head.weight" in safetensors.torch.load_file("small.stp")


def test_prune_in_json(run: Any) -> None:
    found = from_json(run, "prune", "net.py:make", *SHAPE, "-o", "small.safetensors", "--ratios", "body=0.25", "--ignore", "stem")
    assert found["output"] == "small.safetensors"
    assert [(g["name"], g["units"]["after"]) for g in found["groups"]] == [("body.weight:0", 12)]
    assert found["asked"]["ratios"] == {"body": 0.25}
    assert found["macs"]["after"] == stp_fx.cost(stp_fx.load("small.safetensors", net())).macs
    assert found["plan"] == stp_fx.plan_of(stp_fx.load("small.safetensors", net())).digest()


def test_prune_writes_a_plan(run: Any) -> None:
    run("prune", "net.py:make", *SHAPE, "-o", "plan.json")
    plan = PrunePlan.from_json(pathlib.Path("plan.json").read_text())
    assert len(plan.kept["body.weight", 0]) == 8
    assert stp_fx.apply_plan(stp_fx.trace(net(), torch.zeros(1, 1, 8, 8)), plan).get_parameter("head.weight").shape == (10, 8)


def test_prune_goes_on_from_what_was_pruned(run: Any) -> None:
    run("prune", "net.py:make", *SHAPE, "-o", "half.stp")
    found = from_json(run, "prune", "net.py:make", *SHAPE, "--from", "half.stp", "-o", "quarter.stp")
    assert [g["units"] for g in found["groups"]][1] == {"before": 8, "after": 4, "left": 0.5}
    assert stp_fx.load("quarter.stp", net()).get_parameter("head.weight").shape == (10, 4)


def test_prune_with_data(run: Any) -> None:
    found = from_json(
        run, "prune", "net.py:make", *SHAPE, "--calibration", "net.py:batches", "--batches", "2",
        "-c", "variance", "--compensation", "least_squares", "--dry-run",
    )  # fmt: skip
    assert {g["compensation"] for g in found["groups"]} == {"least_squares"}
    found = from_json(
        run, "prune", "net.py:make", *SHAPE, "--calibration", "net:batches", "-c", "taylor", "--loss", "net:loss", "-n"
    )
    assert found["asked"]["criterion"] == "taylor"


def test_a_dry_run_reports_and_writes_nothing(run: Any, project: pathlib.Path) -> None:
    before = sorted(os.listdir(project))
    real = from_json(run, "prune", "net.py:make", *SHAPE, "--target", "macs", "-n", "-o", "small.stp")
    assert (real["dry_run"], real["output"]) == (True, None)
    assert 0.35 < real["macs"]["left"] <= 0.5
    assert sorted(each for each in os.listdir(project) if each != "__pycache__") == before
    assert "dry run: nothing was written" in run("prune", "net.py:make", *SHAPE, "-n")[1]


def test_nothing_is_overwritten_without_force(run: Any) -> None:
    pathlib.Path("small.stp").write_text("mine")
    _, err = run("prune", "net.py:make", *SHAPE, "-o", "small.stp", code=2)
    assert "'small.stp' exists already; --force overwrites it" in err
    assert pathlib.Path("small.stp").read_text() == "mine"
    run("prune", "net.py:make", *SHAPE, "-o", "small.stp", "--force")
    assert stp_fx.load("small.stp", net()).get_parameter("head.weight").shape == (10, 8)


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["net.py:make", *SHAPE], 2, "give --output FILE, or --dry-run"),
        (["net.py:make", *SHAPE, "-o", "small.onnx"], 2, "must end in .stp"),
        (["net.py:make", *SHAPE, "-o", "none/small.stp"], 2, "there is no folder 'none'"),
        (["net.py:make", *SHAPE, "-n", "-r", "1.5"], 2, "`ratio` is the fraction to remove, in [0, 1)"),
        (["net.py:make", *SHAPE, "-n", "-c", "magnitud"], 2, "magnitude"),
        (["net.py:make", *SHAPE, "-n", "--ignore", "stm"], 2, "did you mean 'stem"),
        (["net.py:make", *SHAPE, "-n", "-c", "variance"], 2, "calibration"),
        (["net.py:make", *SHAPE, "-n", "--ratios", "stem"], 2, "is not NAME=RATIO"),
        (["net.py:make", *SHAPE, "-n", "--calibration", "net.py:number"], 2, "it has to give batches"),
        (["net.py:make", *SHAPE, "-n", "--calibration", "net.py:batches", "--batches", "0"], 2, "--batches must be at least 1"),
        (["net.py:make", *SHAPE, "-n", "--loss", "net.py:module.stem.weight"], 2, "has to be a function"),
        (["net.py:make", *SHAPE, "-n", "--device", "nowhere"], 2, "--device: 'nowhere' cannot be used"),
        (["net.py:make", *SHAPE, "-n", "-t", "macs", "-r", "0.99", "--max-ratio", "0.5"], 1, "the smallest in reach is"),
        (["net.py:nothing_to_prune", "-i", "1,4", "-n"], 1, "no channel that can be removed"),
    ],
)
def test_what_prune_cannot_do(run: Any, argv: list[str], code: int, said: str) -> None:
    out, err = run("prune", *argv, code=code)
    assert out == ""
    assert said in err


def test_a_failed_check_writes_nothing(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from stp_fx.cli import prune

    def ruined(gm: Any, **options: Any) -> Any:
        pruned = stp_fx.prune_graph(gm)
        with torch.no_grad():
            pruned.get_parameter("head.bias").fill_(float("nan"))
        return pruned

    monkeypatch.setattr(prune, "prune_graph", ruined)
    _, err = run("prune", "net.py:make", *SHAPE, "-o", "small.stp", code=1)
    assert "gives NaN or infinite outputs where the original does not; nothing was written" in err
    assert not pathlib.Path("small.stp").exists()


# -- compare ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(run: Any) -> str:
    run("prune", "net.py:make", *SHAPE, "-o", "small.stp")
    return "small.stp"


def test_compare(run: Any, small: str) -> None:
    out, _ = run("compare", "net.py:make", small, *SHAPE)
    assert "size on disk" in out
    assert "latency" not in out
    found = from_json(run, "compare", "net.py:make", small, *SHAPE, "--latency", "--threads", "1")
    assert found["seconds"]["before"] > 0
    assert found["seconds"]["threads"] == 1
    assert found["params"]["after"] == stp_fx.cost(stp_fx.load(small, net())).params
    markdown, _ = run("compare", "net.py:make", small, *SHAPE, "--markdown")
    assert "| body.weight:0 | 8/16 | 50% |" in markdown
    run("compare", "net.py:make", small, *SHAPE, "--plot", "kept.png")
    assert pathlib.Path("kept.png").read_bytes().startswith(b"\x89PNG")


def test_compare_takes_the_inputs_that_the_file_recorded(run: Any, small: str) -> None:
    with_inputs = from_json(run, "compare", "net.py:make", small, *SHAPE)
    without = from_json(run, "compare", "net.py:make", small)
    assert without == with_inputs
    run("explore", "net.py:make", "--pruned", small, "-o", "page.html")


def test_markdown_is_not_broken_into_lines(run: Any, small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    markdown, _ = run("compare", "net.py:make", small, *SHAPE, "--markdown")
    assert "| group | channels | left | MACs | parameters | compensated |" in markdown.splitlines()


def test_compare_as_a_check(run: Any, small: str) -> None:
    run("compare", "net.py:make", small, *SHAPE, "--at-most", "macs=0.5", "--at-most", "size=0.9")
    out, err = run("compare", "net.py:make", small, *SHAPE, "--at-most", "params=0.1", code=1)
    assert "MACs" in out
    assert "--at-most asked for params=0.1" in err
    _, err = run("compare", "net.py:make", small, *SHAPE, "--at-most", "flops=0.1", code=2)
    assert "unknown cost 'flops'; known: macs, params, size, latency" in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["none.stp"], "none.stp"),
        (["net.py"], "net.py"),
        (["small.stp", "-a", "width=12"], "stem"),
        (["small.stp", "--json", "--markdown"], "two forms of one report"),
        (["small.stp", "--latency", "--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_what_compare_cannot_do(run: Any, small: str, argv: list[str], said: str) -> None:
    _, err = run("compare", "net.py:make", *argv, *SHAPE, code=2)
    assert said in err


# -- sweep, draw ------------------------------------------------------------------------------------------------------


def test_sweep(run: Any) -> None:
    out, _ = run("sweep", "net.py:make", *SHAPE)
    assert [line.split()[0] for line in out.splitlines()[2:]] == [f"0.{k}" for k in range(1, 10)]
    found = from_json(run, "sweep", "net.py:make", *SHAPE, "--at", "0.25,0.5", "--scope", "global")
    assert [entry["ratio"] for entry in found["entries"]] == [0.25, 0.5]
    assert found["entries"][1]["channels"] == {"before": 24, "removed": 12}
    assert found["entries"][1]["macs"]["after"] < found["entries"][0]["macs"]["after"]
    found = from_json(run, "sweep", "net.py:make", *SHAPE, "--at", "0.5", "-c", "variance", "--data", "net.py:batches")
    assert found["entries"][0]["channels"]["removed"] == 12


def test_a_sweep_of_optimal_allocations_is_a_front(run: Any) -> None:
    options = ("--at", "0.2,0.5", "--target", "macs", "--allocation", "optimal")
    found = from_json(run, "sweep", "net.py:make", *SHAPE, *options, "--data", "net.py:batches")
    damages = [entry["damage"] for entry in found["entries"]]
    assert 0 < damages[0] < damages[1]
    assert "damage" in run("sweep", "net.py:make", *SHAPE, *options, "--data", "net.py:batches")[0].splitlines()[0]
    assert "give --data MODULE:NAME" in run("sweep", "net.py:make", *SHAPE, *options, code=2)[1]
    _, err = run("prune", "net.py:make", *SHAPE, "--dry-run", "--allocation", "optimal", code=2)
    assert "--allocation optimal measures damages: give --calibration MODULE:NAME" in err


def test_sensitivity(run: Any) -> None:
    found = from_json(run, "sweep", "net.py:make", *SHAPE, "-s", "--data", "net.py:batches", "--at", "0.5")
    assert set(found["losses"]) == {"stem.weight:0", "body.weight:0"}
    assert all(len(values) == 1 for values in found["losses"].values())
    out, _ = run("sweep", "net.py:make", *SHAPE, "-s", "--data", "net.py:batches", "--ignore", "stem")
    assert "stem.weight:0" not in out
    assert "0.75" in out


def test_numbers_that_json_has_not_are_null(run: Any) -> None:
    found = from_json(
        run, "sweep", "net.py:make", *SHAPE, "-s", "--data", "net.py:batches", "--loss", "net.py:infinite", "--at", "0.5"
    )
    assert found["baseline"] is None
    assert found["losses"]["stem.weight:0"] == [None]


def test_sensitivity_as_curves(run: Any) -> None:
    pytest.importorskip("matplotlib")
    run("sweep", "net.py:make", *SHAPE, "-s", "--data", "net.py:batches", "--at", "0.5", "--plot", "curves.svg")
    assert "<svg" in pathlib.Path("curves.svg").read_text()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["-s"], "give --data MODULE:NAME"),
        (["--plot", "a.png"], "--plot draws the results of --sensitivity"),
        (["--at", "0.5,1"], "is no list of ratios"),
        (["-s", "--data", "net.py:batches", "--plot", "a.gif"], "must end in .png"),
    ],
)
def test_what_sweep_cannot_do(run: Any, argv: list[str], said: str) -> None:
    assert said in run("sweep", "net.py:make", *SHAPE, *argv, code=2)[1]


def test_draw(run: Any) -> None:
    out, _ = run("draw", "net.py:make", *SHAPE, "-o", "net.dot")
    assert out == "net.dot\n"
    assert "stem" in pathlib.Path("net.dot").read_text()
    assert from_json(run, "draw", "net.py:make", *SHAPE, "-o", "net.dot")["output"] == "net.dot"
    assert "must end in .svg" in run("draw", "net.py:make", *SHAPE, "-o", "net.gif", code=2)[1]
    run("draw", "net.py:make", *SHAPE, "-o", "combined.dot", "--view", "combined", "--fold", "0")
    assert "forced shape match" in pathlib.Path("combined.dot").read_text()
    assert "got -1" in run("draw", "net.py:make", *SHAPE, "-o", "net.dot", "--fold", "-1", code=2)[1]
    assert "unknown view 'sideways'" in run("draw", "net.py:make", *SHAPE, "-o", "net.dot", "--view", "sideways", code=2)[1]


def test_explore(run: Any) -> None:
    out, _ = run("explore", "net.py:make", *SHAPE, "-o", "net.html")
    assert out == "net.html\n"
    assert "<title>net.py:make</title>" in pathlib.Path("net.html").read_text()
    run("prune", "net.py:make", *SHAPE, "--ratio", "0.5", "-o", "half.stp")
    run("prune", "net.py:make", *SHAPE, "--ratio", "0.5", "-o", "half.json")
    for option in (("--pruned", "half.stp", "--latency"), ("--plan", "half.json")):
        found = from_json(run, "explore", "net.py:make", *SHAPE, "-o", "net.html", *option)
        assert (found["output"], found["groups"]) == ("net.html", 2)
        assert "stp_fx_plan" in pathlib.Path("net.html").read_text()
    assert "must end in .html" in run("explore", "net.py:make", *SHAPE, "-o", "net.svg", code=2)[1]
    both = run("explore", "net.py:make", *SHAPE, "-o", "net.html", "--pruned", "half.stp", "--plan", "half.json", code=2)[1]
    assert "give one of them" in both
    assert "cannot be read" in run("explore", "net.py:make", *SHAPE, "-o", "net.html", "--plan", "no.json", code=2)[1]
    assert "not a plan" in run("explore", "net.py:make", *SHAPE, "-o", "net.html", "--plan", "net.py", code=2)[1]


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_unexpected_failures_are_3_and_debug_shows_where(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from stp_fx.cli import analyze

    def fails(gm: Any) -> Any:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(analyze, "cost", fails)
    _, err = run("analyze", "net.py:make", *SHAPE, code=3)
    assert err == "stp-fx: unexpected ZeroDivisionError: a defect (--debug shows where)\n"
    _, err = run("analyze", "net.py:make", *SHAPE, "--debug", code=3)
    assert "Traceback" in err


def test_an_interrupt_is_130(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from stp_fx.cli import analyze

    def stopped(gm: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(analyze, "cost", stopped)
    assert run("analyze", "net.py:make", *SHAPE, code=130)[1] == "stp-fx: interrupted\n"


def test_verbose_says_what_is_done_on_standard_error(run: Any) -> None:
    out, err = run("prune", "net.py:make", *SHAPE, "-n", "-v", "--json")
    assert "Prune 4/8 channels of stem.weight:0" in err
    json.loads(out)


def test_as_a_process_with_a_reader_that_leaves(project: pathlib.Path) -> None:
    """One process for what only a process shows: `python -m`, the current folder, a closed pipe, encodings."""
    reader, writer = os.pipe()
    os.close(reader)
    folder = "ignore:Implicitly cleaning up:ResourceWarning"  # older torch leaves one, which it makes when it is imported
    older = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)
    warns = ["-W", "error", *(["-W", folder] if older else [])]
    command = [sys.executable, *warns, "-m", "stp_fx", "analyze", "net:make", *SHAPE]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(stp_fx.__file__).parents[1]), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, cwd=project, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_auto_says_what_it_chose_and_why(run: Any) -> None:
    _, err = run("prune", "net.py:make", *SHAPE, "-c", "auto", "-n")
    assert "criterion 'auto' is Magnitude: no calibration data" in err
    data = ("--calibration", "net.py:batches")
    found = from_json(run, "prune", "net.py:make", *SHAPE, "-c", "auto", "-n", *data, "--compensation", "least_squares")
    assert found["notes"][0].startswith("criterion 'auto' is Reconstruction: compensation 'least_squares'")
    assert found["asked"]["criterion"] == "auto"
    _, err = run("prune", "net.py:make", *SHAPE, "-c", "auto", "-n", *data, "--loss", "net:loss", code=2)
    assert "`loss` is for criteria that read gradients" in err


def test_keys_and_values_count_as_memory(run: Any) -> None:
    decoder = ("prune", "net.py:Causal", "-i", "2,5,8", "-n", "-r", "0.4", "--products", "outer")
    cache = ("--cache-tokens", "1024", "--cache-batch", "4")
    found = from_json(run, *decoder, "-t", "memory", *cache)
    assert (found["asked"]["cache_tokens"], found["asked"]["cache_batch"]) == (1024, 4)
    assert found["groups"][0]["units"]["after"] == 2, "of 4 heads, whose keys and values are nearly all of the memory"
    _, err = run(*decoder, *cache, code=2)
    assert "give target='memory' with it" in err
    _, err = run("prune", "net.py:make", *SHAPE, "-n", "-t", "memory", *cache, code=2)
    assert "no self-attention of the graph is causal or has a mask" in err
