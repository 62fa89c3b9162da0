"""The command line: inspect, compile, and one clear message for every mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import wsp_compiler.__main__ as command
from wsp_compiler import PruneRule, PruningPlan
from wsp_compiler.__main__ import load_model, main, parse_rule

MODULE = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 4, 1))

def broken():
    raise KeyError("no such block")

def number():
    return 3

size = 7
"""
SMALL = "cli_networks:make"


@pytest.fixture(autouse=True)
def _networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module with model functions in the working directory, which is searched."""
    (tmp_path / "cli_networks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "cli_networks", raising=False)


def test_inspect_lists_every_convolution(capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["path", "weight", "input", "verdict"]
    assert [line.split(maxsplit=3) for line in lines[2:5]] == [
        ["0", "16x3x3x3", "?", "eligible"],
        ["2", "16x16x3x3", "?", "eligible"],
        ["3", "4x16x1x1", "?", "kernel 1x1, not 3x3"],
    ]
    assert lines[-1] == "2 of 3 convolutions are eligible"
    assert main(["inspect", SMALL, "--shape", "2,3,10,12"]) == 0
    assert "2x16x8x10" in capsys.readouterr().out


def test_inspect_a_torchvision_model(capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", "torchvision:resnet18"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "13 of 20 convolutions are eligible"
    assert "layer2.0.downsample.0" in out


def test_compile_reports_and_writes_the_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    file = tmp_path / "plan.json"
    arguments = ["compile", SMALL, "--pr", "0.5", "--shape", "1,3,10,12", "--report", "--plan", str(file)]
    arguments += ["--method", "wsp", "--direction", "column", "--tile", "4", "--precision", "bf16"]
    assert main([*arguments, "--rule", "0:method=fp,pr=0.25,tile=2", "--check"]) == 0
    captured = capsys.readouterr()
    assert "WSP-C" in captured.out
    assert "2 of 3 convolutions run as Winograd" in captured.out
    assert "a call on [1, 3, 10, 12] took" in captured.out
    plan = PruningPlan.from_json(file.read_text())
    # four of 16 filters, and one whose place a carrier of constants has
    assert (plan["0"].pattern, plan["0"].pr, plan["0"].tile) == ("FP", 5 / 16, 2)
    assert (plan["2"].pattern, plan["2"].pr, plan["2"].tile) == ("WSP-C", 0.5, 4)


def test_uneven_ratios(tmp_path: Path):
    file = tmp_path / "plan.json"
    arguments = ["compile", SMALL, "--pr", "0.5", "--shape", "1,3,10,12", "--rule", "0:tile=2"]
    assert main([*arguments, "--pr-scope", "global", "--plan", str(file)]) == 0
    ratios = [entry.pr for entry in PruningPlan.from_json(file.read_text()).values()]
    assert len(ratios) == 2
    assert min(ratios) <= 0.5 <= max(ratios)


def test_compile_without_report_is_short(capsys: pytest.CaptureFixture[str]):
    target = '{"kind": "llvm", "mcpu": "x86-64-v3"}'
    assert main(["compile", SMALL, "--shape", "1,3,10,12", "--target", target]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0] == f"{SMALL}: 1 of 3 convolutions run as Winograd"
    assert "compiled for cpu (x86-64-v3)" in lines[1]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_are_loaded(suffix: str, tmp_path: Path):
    model = load_model(SMALL)
    nn.init.constant_(model[2].weight, 0.125)  # type: ignore[index]
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(model.state_dict(), file)
    else:
        torch.save({"state_dict": model.state_dict()}, file)
    other = load_model(SMALL)
    command.load_weights(other, file)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert main(["compile", SMALL, "--shape", "1,3,10,12", "--weights", str(file)]) == 0


def test_rules():
    assert parse_rule("layer1.*:pr=0.5,tile=4") == PruneRule("layer1.*", pr=0.5, tile=4)
    assert parse_rule("(?:a|b): method=fp") == PruneRule("(?:a|b)", method="fp")
    assert parse_rule("a:tile=auto,block=32") == PruneRule("a", tile="auto", block=32)
    assert parse_rule("x:skip") == PruneRule("x", skip=True)
    assert parse_rule("x:direction=column,skip=false") == PruneRule("x", direction="column")


MISTAKES = {
    "no such torchvision model": (["torchvision:resnet81"], "near names: resnet18"),
    "no colon": (["resnet18"], "torchvision:NAME or package.module:callable"),
    "no module": (["cli_nets:make"], "cannot import 'cli_nets'"),
    "relative module": ([".nets:make"], "cannot import '.nets'"),
    "no such function": (["cli_networks:mak"], "near names: make"),
    "not callable": (["cli_networks:size"], "no callable 'size'"),
    "function that fails": (["cli_networks:broken"], "KeyError: 'no such block'"),
    "not a model": (["cli_networks:number"], "returned a int"),
    "pr": ([SMALL, "--pr", "1"], "pr=1.0"),
    "method": ([SMALL, "--method", "bswp"], "did you mean 'bwsp'"),
    "tile": ([SMALL, "--tile", "3"], "unknown tile 3"),
    "tune": ([SMALL, "--tune", "slowly"], "unknown tune 'slowly'"),
    "block": ([SMALL, "--block", "0"], "block=0"),
    "scope": ([SMALL, "--pr-scope", "globl"], "did you mean 'global'"),
    "latency": ([SMALL, "--target-latency", "0"], "target_latency=0.0 is not a positive number"),
    "unknown times": ([SMALL, "--target-latency", "9"], "tune='fast', which measures them"),
    "precision": ([SMALL, "--precision", "tf32"], "use 'fp32' or 'bf16'"),
    "importance": ([SMALL, "--method", "fp", "--importance", "hrank"], "pass calibration, or use another"),
    "target": ([SMALL, "--target", "gpu"], "unknown target 'gpu'"),
    "target JSON": ([SMALL, "--target", "{kind"], "malformed JSON"),
    "rule": ([SMALL, "--rule", "0"], "write 'REGEX:key=value,...'"),
    "rule key": ([SMALL, "--rule", "0:ratio=0.5"], "at 'ratio=0.5'"),
    "rule value": ([SMALL, "--rule", "0:tile=big"], "at 'tile=big'"),
    "rule flag": ([SMALL, "--rule", "0:skip=maybe"], "at 'skip=maybe'"),
    "rule range": ([SMALL, "--rule", "0:pr=2"], "pr=2.0"),
    "rule without match": ([SMALL, "--rule", "conv1:pr=0.5"], "matches no convolution"),
    "shape": ([SMALL, "--shape", "1,3,a,b"], "malformed shape '1,3,a,b'"),
    "negative shape": ([SMALL, "--shape", "1,3,-8,8"], "malformed shape"),
    "unfit shape": ([SMALL, "--shape", "1,4,8,8"], "example_inputs"),
    "no weights file": ([SMALL, "--weights", "nowhere.pt"], "cannot load nowhere.pt (FileNotFoundError"),
    "no safetensors file": ([SMALL, "--weights", "cli_networks.safetensors"], "cannot load"),
    "not weights": ([SMALL, "--weights", "cli_networks.py"], "cannot load cli_networks.py"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_give_one_message_and_exit_code_2(mistake: str, capsys: pytest.CaptureFixture[str]):
    arguments, message = MISTAKES[mistake]
    shape = [] if "--shape" in arguments else ["--shape", "1,3,8,8"]
    assert main(["compile", *arguments, *shape]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert "\n  fix: " in captured.err
    assert "Traceback" not in captured.err


def test_weights_of_another_model_and_an_unwritable_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    assert main(["compile", SMALL, "--weights", "linear.pt"]) == 2
    assert "Missing key(s)" in capsys.readouterr().err
    assert (
        main(["compile", SMALL, "--shape", "1,3,10,12", "--plan", str(tmp_path / "none" / "plan.json")]) == 2
    )
    assert "--plan: cannot write it" in capsys.readouterr().err


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]):
    for arguments in ([], ["compile"], ["explode", SMALL], ["compile", SMALL, "--pr", "much"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "usage: python -m wsp_compiler" in capsys.readouterr().err


def test_python_dash_m(tmp_path: Path):
    """As a process of its own: exit code, stdout for results, stderr for mistakes."""
    run = [sys.executable, "-m", "wsp_compiler"]
    root = str(Path(command.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    good = subprocess.run(
        [*run, "inspect", SMALL], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert (good.returncode, good.stderr) == (0, "")
    assert "2 of 3 convolutions are eligible" in good.stdout
    bad = subprocess.run(
        [*run, "inspect", "cli_networks:mak"], capture_output=True, text=True, env=environment
    )
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: model: cli_networks has no callable 'mak'\n  fix: near names: make\n"


def test_plans_are_plain_json(tmp_path: Path):
    file = tmp_path / "plan.json"
    assert main(["compile", SMALL, "--shape", "1,3,10,12", "--plan", str(file)]) == 0
    assert json.loads(file.read_text())["sites"][0]["path"] == "2"
