"""adaptive: balance where it is faster and costs little; patterns of single layers exchanged."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from wsp_compiler.adaptive import choose_patterns, with_methods
from wsp_compiler.options import CompileOptions, PruneRule
from wsp_compiler.sites import find_sites


def test_balance_is_bought_where_it_gains_most_time_for_the_error() -> None:
    errors = {"a": (10.0, 10.4), "b": (10.0, 10.3), "c": (10.0, 30.0)}
    times = {"a": (100.0, 50.0), "b": (100.0, 90.0), "c": (100.0, 10.0)}
    assert choose_patterns(errors, times, 0.02) == {"a": "bwsp", "b": "wsp", "c": "wsp"}  # 0.6 may be added
    assert choose_patterns(errors, times, 0.03) == {"a": "bwsp", "b": "bwsp", "c": "wsp"}
    assert choose_patterns(errors, times, 1.0) == dict.fromkeys("abc", "bwsp")
    assert choose_patterns(errors, times, 0.0) == dict.fromkeys("abc", "wsp")


def test_without_a_gain_in_time_rows_stay_unbalanced() -> None:
    errors = {"a": (1.0, 1.0), "b": (1.0, 0.9), "c": (1.0, 1.0), "d": (1.0, 1.0)}
    times = {"a": (100.0, 100.0), "b": None, "c": (101.0, 100.0)}
    assert choose_patterns(errors, times) == dict.fromkeys("abcd", "wsp")
    assert choose_patterns({}, {}) == {}


def test_what_is_better_and_faster_is_taken() -> None:
    assert choose_patterns({"a": (1.0, 0.5)}, {"a": (2.0, 1.0)}, 0.0) == {"a": "bwsp"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(16, 16, 3)
        self.b = nn.Conv2d(16, 16, 3)
        self.thin = nn.Conv2d(16, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.thin(self.b(self.a(x)))


@pytest.mark.parametrize("rules", [(), (PruneRule("b", pr=0.75), PruneRule("[ab]", tile=4))])
def test_methods_of_single_layers(rules: tuple[PruneRule, ...]) -> None:
    model = Net().eval()
    convolutions = {path: conv for path, conv in model.named_modules() if isinstance(conv, nn.Conv2d)}
    options = CompileOptions(0.5, "wsp", rules=rules)
    plan = with_methods(find_sites(model), convolutions, options, {"b": "bwsp"})
    assert {path: entry.method for path, entry in plan.items()} == {"a": "wsp", "b": "bwsp"}
    assert "3 channels" in plan.left_alone["thin"]
    if rules:
        assert (plan["b"].pr, plan["b"].tile, plan["a"].tile) == (0.75, 2, 4)


def test_a_rule_that_names_a_method_wins() -> None:
    model = Net().eval()
    convolutions = {path: conv for path, conv in model.named_modules() if isinstance(conv, nn.Conv2d)}
    options = CompileOptions(0.5, "wsp", rules=(PruneRule("a", method="fp"), PruneRule("b", skip=True)))
    plan = with_methods(find_sites(model), convolutions, options, {"a": "bwsp", "b": "bwsp"})
    assert {path: entry.method for path, entry in plan.items()} == {"a": "fp"}
