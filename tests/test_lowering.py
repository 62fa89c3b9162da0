"""lowering: a user's passes run in their place, a wrong one is caught, every stage can be dumped."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import wsp_compiler
from tests.graphs import small_network
from tests.reference import assert_close, pruned_convolution
from wsp_compiler import PassBase, PruningPlan, Rewrites, errors
from wsp_compiler.ops import WinogradSite


@dataclass(frozen=True)
class ClampToRelu6(PassBase):
    """hardtanh(0, 6) -> relu6, which the epilogue can fuse."""

    name: str = field(default="clamp_to_relu6", init=False)

    def run(self, gm: fx.GraphModule, plan: PruningPlan) -> Rewrites:
        count = 0
        for node in gm.graph.nodes:
            if node.op == "call_module" and type(gm.get_submodule(node.target)) is nn.Hardtanh:
                gm.set_submodule(node.target, nn.ReLU6())
                count += 1
        return Rewrites(count)


@dataclass(frozen=True)
class Damage(PassBase):
    """Scales the stored weights: wrong on purpose."""

    name: str = field(default="damage", init=False)

    def run(self, gm: fx.GraphModule, plan: PruningPlan) -> Rewrites:
        for module in gm.modules():
            if isinstance(module, WinogradSite):
                module.weight.mul_(1.001)
        return Rewrites(1)


def test_a_users_pass_runs_before_lowering():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Hardtanh(0.0, 6.0)).eval()
    x = 4 * torch.randn(1, 16, 8, 8)
    passes = wsp_compiler.pipeline.before("lower_winograd", ClampToRelu6())
    compiled = wsp_compiler.compile(model, 0.3, passes=passes, example_inputs=x, check=True)
    names = [record.name for record in compiled.record.passes]
    assert names.index("clamp_to_relu6") < names.index("lower_winograd")
    assert [layer.activation for layer in compiled.layers()] == ["relu6"]
    truth = pruned_convolution(x, model[0], compiled.plan["0"].keep, 2).clamp(0, 6)  # type: ignore[arg-type]
    assert_close(compiled(x), truth, 1e-5)
    assert type(model[1]) is nn.Hardtanh


def test_a_wrong_pass_is_caught_and_named():
    passes = wsp_compiler.pipeline.after("lower_winograd", Damage())
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(errors.PassError, match=r"pass damage: .*relative error"):
        wsp_compiler.compile(small_network(), 0.5, passes=passes, example_inputs=x, check=True)
    wsp_compiler.compile(small_network(), 0.5, passes=passes, example_inputs=x)


def test_every_stage_is_dumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WSP_DUMP", str(tmp_path / "stages"))
    wsp_compiler.compile(small_network(), 0.5)
    texts = {file.name: file.read_text() for file in sorted((tmp_path / "stages").iterdir())}
    steps = ["traced", *(entry.name for entry in wsp_compiler.pipeline.ordered())]
    assert list(texts) == [f"{number:02d}_{name}.txt" for number, name in enumerate(steps)]
    assert "wsp" not in texts["00_traced.txt"]
    assert texts["02_lower_winograd.txt"].count("wsp.sparse_bgemm") == 2
    assert texts[list(texts)[-1]].count("wsp.winograd_conv2d") == 2


def test_checking_needs_inputs() -> None:
    with pytest.raises(errors.OptionError, match=r"(?s)check=True.*fix: pass example_inputs"):
        wsp_compiler.compile(small_network(), check=True)
