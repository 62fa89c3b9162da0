"""Choices: plans between the two, which layers have a choice, and total balanced speedup."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.abwsp.problem import PATHS, plans
from wsp_compiler import PruneRule
from wsp_compiler.abwsp.choices import Choices, LayerPair
from wsp_compiler.refits import NormStatistics, SiteRefit


def test_a_plan_takes_each_layer_from_its_pattern() -> None:
    wsp, bwsp = plans()
    choices = Choices(wsp, bwsp, {})
    assert choices.layers == PATHS
    plan = choices.plan("0110")
    assert list(plan) == list(wsp)
    sources = (wsp, bwsp, bwsp, wsp)
    for path, source in zip(PATHS, sources, strict=True):
        assert plan[path] == source[path]
        assert plan.errors[path] == source.errors[path]
    assert plan.left_alone == wsp.left_alone
    assert choices.methods("0110") == dict(zip(PATHS, ("wsp", "bwsp", "bwsp", "wsp"), strict=True))
    assert choices.plan("0000").sites == wsp.sites


def test_refits_follow_and_norms_do_not() -> None:
    wsp, bwsp = plans()
    for plan, value in ((wsp, 1.0), (bwsp, 2.0)):
        entry = plan["conv1"]
        plan.refits["conv1"] = SiteRefit(
            torch.full((entry.kept_weights,), value), torch.zeros(entry.shape[1])
        )
        plan.norms["norm1"] = NormStatistics(torch.zeros(16), torch.ones(16))
    choices = Choices(wsp, bwsp, {})
    assert choices.plan("1000").refits["conv1"] == bwsp.refits["conv1"]
    assert choices.plan("0111").refits["conv1"] == wsp.refits["conv1"]
    assert not choices.plan("0000").norms
    given = {"norm2": NormStatistics(torch.ones(16), torch.ones(16))}
    assert choices.plan("0000", given).norms == given


def test_total_speedup_is_of_sums() -> None:
    wsp, bwsp = plans()
    choices = Choices(wsp, bwsp, {"conv1": LayerPair(10, 5), "conv3": LayerPair(30, 24)})
    assert choices.total_speedup("0000") == 1
    assert choices.total_speedup("1000") == pytest.approx(40 / 35)
    assert choices.total_speedup("1111") == pytest.approx(40 / 29)
    assert choices.total_speedup("0101") == 1  # of layers without a time nothing is known
    assert Choices(wsp, bwsp, {}).total_speedup("1111") == 1


def test_layers_without_a_choice() -> None:
    rules = [PruneRule("conv1", method="dense"), PruneRule("conv2", pr=0.0), PruneRule("conv3", method="fp")]
    choices = Choices(*plans(rules=tuple(rules)), {})
    assert choices.layers == ("conv4",)
    assert choices.plan("1")["conv1"].method == "dense"
    with pytest.raises(ValueError, match="argument"):
        choices.plan("11")


def test_a_layer_that_balance_does_not_make_faster_has_no_choice() -> None:
    wsp, bwsp = plans()
    pairs = {"conv1": LayerPair(10, 10), "conv2": LayerPair(10, 11), "conv3": LayerPair(10, 9)}
    choices = Choices(wsp, bwsp, pairs)
    assert choices.layers == ("conv3", "conv4")
    plan = choices.plan("11")
    assert [plan[path].method for path in ("conv1", "conv2", "conv3", "conv4")] == [
        "wsp",
        "wsp",
        "bwsp",
        "bwsp",
    ]
    assert choices.total_speedup("01") == 1  # nothing is known of conv4
    assert choices.total_speedup("10") == pytest.approx(30 / 29)  # the others take their time as WSP


def test_a_layer_that_one_plan_prunes_is_pruned() -> None:
    wsp, bwsp = plans()
    reason = "the dense convolution is faster"
    fewer = replace(
        wsp,
        sites={path: entry for path, entry in wsp.sites.items() if path != "conv2"},
        left_alone={**wsp.left_alone, "conv2": reason},
    )
    choices = Choices(fewer, bwsp, {})
    assert choices.layers == ("conv1", "conv3", "conv4")
    plan = choices.plan("000")
    assert plan["conv2"] == bwsp["conv2"]
    assert "conv2" not in plan.left_alone
