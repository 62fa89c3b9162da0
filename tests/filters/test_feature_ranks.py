"""feature_ranks: what is ranked stands behind batch norm and activation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wsp_compiler
from tests.filters.nets import conv, randomised
from tests.reference import assert_untouched, snapshot
from wsp_compiler.calibration import networks_of
from wsp_compiler.errors import OptionError
from wsp_compiler.filters.feature_ranks import feature_ranks, what_follows
from wsp_compiler.pruning.hrank import ranks
from wsp_compiler.trace import trace


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.relu = conv(3, 16), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        self.b, self.c = conv(16, 16), conv(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.a(x)))
        z = F.relu6(self.b(y), inplace=True)
        return self.c(y + z)


def net() -> nn.Module:
    return randomised(Net())


def calls(count: int = 2) -> list[Any]:
    return [((torch.randn(3, 3, 9, 11),), {}) for _ in range(count)]


def test_ranks_of_maps_behind_norm_and_activation() -> None:
    model, data = net(), calls()
    before = snapshot(model)
    traced = trace(model)
    steps: list[str] = []
    found = feature_ranks(networks_of(traced, data), traced.units, ["a", "b"], steps.append)
    assert steps == ["a", "a", "b", "b"]
    reference: Any = copy.deepcopy(model)
    with torch.no_grad():
        y = [F.relu(reference.norm(reference.a(args[0]))) for args, _ in data]
        z = [F.relu6(reference.b(value)) for value in y]
    for path, maps in (("a", y), ("b", z)):
        expected = torch.cat([ranks(value) for value in maps]).double().mean(0)
        torch.testing.assert_close(found[path].total / found[path].images, expected)
        assert found[path].images == 6
    assert_untouched(model, before)


def test_nothing_follows_where_an_image_branches_off() -> None:
    traced = trace(net())
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(what_follows(traced.units, "c")(x), x)
    assert torch.equal(what_follows({}, "c")(x), x)
    y = x.repeat(1, 4, 1, 1)
    assert not torch.equal(what_follows(traced.units, "b")(y), y)
    assert float(y.min()) < 0  # not written into


def test_compile_keeps_the_filters_of_high_rank() -> None:
    model, images = net(), torch.randn(6, 3, 10, 10)
    with torch.no_grad():  # filters whose maps are nearly silent
        model.norm.bias[:8] = -30.0  # type: ignore[union-attr, index]
        model.a.weight[:8] *= 5  # type: ignore[union-attr, index, operator]
    options: dict[str, Any] = {
        "method": "fp",
        "calibration": images,
        "pr_scope": "layer",
        "importance": "hrank",
    }
    rules = [wsp_compiler.PruneRule("a", pr=0.5), wsp_compiler.PruneRule("[bc]", skip=True)]
    compiled = wsp_compiler.compile(model, 0.5, rules=rules, **options)
    assert not compiled.plan["a"].keep[0, :8].any()
    assert compiled.plan.refits.keys() == {"a"}


def test_it_needs_calibration_and_filters() -> None:
    with pytest.raises(OptionError, match="needs sample inputs") as caught:
        wsp_compiler.compile(net(), 0.5, method="fp", importance="hrank")
    assert "calibration" in caught.value.fix
    images = torch.randn(2, 3, 8, 8)
    with pytest.raises(OptionError, match="method='wsp'"):
        wsp_compiler.compile(net(), 0.5, method="wsp", importance="hrank", calibration=images)
    rule = wsp_compiler.PruneRule("b", method="wwp")
    with pytest.raises(OptionError, match="method='wwp'") as caught:
        wsp_compiler.compile(net(), 0.5, method="fp", rules=[rule], importance="hrank", calibration=images)
    assert "method='fp'" in caught.value.fix
    with pytest.raises(OptionError, match="abwsp"):
        wsp_compiler.compile(net(), 0.5, importance="hrank", calibration=images)
