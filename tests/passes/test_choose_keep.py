"""choose_keep: SitePlans on the nodes, `keep` buffers in the module, nothing decided."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from tests.graphs import Lowering, conv, lowering
from wsp_compiler.ops import WinogradSite
from wsp_compiler.options import PruneRule
from wsp_compiler.passes import ChooseKeep
from wsp_compiler.passes.choose_keep import SITE_PLAN, site_module_name
from wsp_compiler.trace import SITE


def planned(case: Lowering) -> dict[str, str]:
    """path -> pattern of every annotated node."""
    return {
        node.meta[SITE]: node.meta[SITE_PLAN].pattern
        for node in case.gm.graph.nodes
        if SITE_PLAN in node.meta
    }


def test_before_and_after() -> None:
    model = nn.Sequential(conv(), nn.ReLU(), conv(4, 6))
    case = lowering(model, method="bwsp", pr=0.5, rules=(PruneRule("2", method="fp"),))
    before = case.calls
    assert case.run(ChooseKeep()).count == 2
    assert case.calls == before == ["Conv2d", "ReLU", "Conv2d"]
    assert planned(case) == {"0": "BWSP-R", "2": "FP"}
    for path, entry in case.plan.items():
        site = case.gm.get_submodule(site_module_name(case.gm, path))
        assert isinstance(site, WinogradSite)
        assert torch.equal(site.keep, entry.keep)
        assert [name for name, _ in site.named_buffers()] == ["keep"]


def test_what_is_not_planned_is_declined_with_the_plans_reason() -> None:
    model = nn.Sequential(conv(), conv(stride=2), conv())
    case = lowering(model, rules=(PruneRule("2", skip=True),))
    rewrites = case.run(ChooseKeep())
    assert rewrites.count == 1
    assert rewrites.declined == (("1", "stride 2x2, not 1"), ("2", "skipped by PruneRule('2')"))


def test_a_convolution_that_the_plan_does_not_know_is_declined() -> None:
    case = lowering(nn.Sequential(conv(), conv()))
    del case.plan.sites["1"]
    assert case.run(ChooseKeep()).declined == (("1", "not in the plan"),)


def test_twice_is_as_once() -> None:
    case = lowering(nn.Sequential(conv(), nn.ReLU(), conv()))
    first = case.run(ChooseKeep())
    sites = [id(module) for module in case.gm.modules() if isinstance(module, WinogradSite)]
    assert case.run(ChooseKeep()) == first
    assert [id(module) for module in case.gm.modules() if isinstance(module, WinogradSite)] == sites


class Confusing(nn.Module):
    """Paths that differ only in dots and underscores, and names that the compiler uses."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Module()
        self.a.b = conv()
        self.a_b = conv()
        self.conv = conv()
        self.winograd = nn.Module()
        self.winograd.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.winograd.conv(self.conv(self.a_b(self.a.b(x))))


def test_confusing_names_do_not_mix_up_convolutions() -> None:
    model = Confusing()
    before = [path for path, _ in model.named_modules()]
    case = lowering(model)
    x = torch.randn(1, 4, 6, 6)
    case.run(ChooseKeep())
    names = [site_module_name(case.gm, path) for path in case.plan]
    assert len(set(names)) == 4
    case.assert_equals_model(x)
    case.through("merge_stages").assert_equals_model(x)
    assert [path for path, _ in model.named_modules()] == before


def test_a_shared_convolution_has_one_site() -> None:
    shared = conv()
    case = lowering(nn.Sequential(shared, nn.ReLU(), shared))
    assert case.run(ChooseKeep()).count == 2
    assert sum(isinstance(module, WinogradSite) for module in case.gm.modules()) == 1


def test_the_root_convolution() -> None:
    case = lowering(conv())
    assert case.run(ChooseKeep()).count == 1
    assert planned(case) == {"": "dense"}


def test_filters_left_to_the_vendor_are_declined() -> None:
    case = lowering(nn.Sequential(conv(), conv()), method="fp", pr=0.5)
    case.plan.sites["1"] = replace(case.plan["1"], winograd=False)
    rewrites = case.run(ChooseKeep())
    assert rewrites.declined == (("1", "its kept filters are left to the vendor's library"),)
    assert planned(case) == {"0": "FP"}
