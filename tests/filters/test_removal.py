"""removal: which channels leave under a plan, and what stands for their constants."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.filters.nets import Grouped, Residual, conv, planned, randomised
from wsp_compiler.filters.removal import Fold, Removal, find_removal, folds_into_bias, pruned_filters
from wsp_compiler.options import PruneRule


class Pair(nn.Module):
    """Two convolutions with an activation between them; biases as asked for."""

    def __init__(self, bias: list[float], activation: Any = F.relu, **options: Any) -> None:
        super().__init__()
        self.a, self.activation, self.b = conv(3, 6), activation, conv(6, 4, **options)
        with torch.no_grad():
            self.a.bias.copy_(torch.tensor(bias))  # type: ignore[union-attr]
            self.a.weight.mul_(4.0 ** torch.arange(6).view(-1, 1, 1, 1))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.activation(self.a(x)))


def removal_of(model: nn.Module, *rules: PruneRule, **options: Any) -> tuple[Removal, dict[str, Fold]]:
    """What leaves, and what the readers do about it by node name."""
    traced, plan = planned(model, *rules, importance="l2", **options)
    found = find_removal(traced.units[""], plan)
    return found, {node.name: fold for node, fold in found.folds.items()}


def gone(removal: Removal, path: str) -> list[int]:
    return [
        index
        for number in sorted(removal.removed)
        for name, index in [removal.coupling.filters[number]]
        if name == path
    ]


ONLY_A = (PruneRule("b", method="dense"),)


def test_silent_channels_leave_without_a_trace() -> None:
    removal, folds = removal_of(Pair([-1.0] * 6), *ONLY_A)
    assert gone(removal, "a") == [0, 1, 2]  # the smallest filters
    fold = folds["b"]
    assert fold.carrier is None
    assert fold.stay.tolist() == [3, 4, 5]
    assert not fold.constant.any()
    assert not removal.reasons


def test_the_loudest_channel_is_the_carrier_where_the_reader_pads() -> None:
    """It has the place of one filter."""
    removal, folds = removal_of(Pair([0.5, 2.0, -1.0, 1.0, 0.0, 0.0]), *ONLY_A)
    assert gone(removal, "a") == [0, 2, 3]
    assert folds["b"].carrier == (1, 2.0)
    assert folds["b"].constant.tolist() == [0.5, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert folds["b"].stay.tolist() == [1, 4, 5]


@pytest.mark.parametrize("options", [{"padding": 0}, {"padding_mode": "circular"}])
def test_the_bias_takes_constants_where_nothing_is_padded_with_zeros(options: Any) -> None:
    removal, folds = removal_of(Pair([0.5, 2.0, -1.0, 1.0, 0.0, 0.0], **options), *ONLY_A)
    assert gone(removal, "a") == [0, 1, 2]
    assert folds["b"].carrier is None
    assert folds["b"].constant.tolist() == [0.5, 2.0, 0.0, 0.0, 0.0, 0.0]


def test_not_if_the_reader_is_pruned_in_the_winograd_domain() -> None:
    """A constant image then gives a pattern within each tile, which no bias is."""
    rules = (PruneRule("b", method="wsp"),)
    _, folds = removal_of(Pair([0.5, 2.0, -1.0, 1.0, 0.0, 0.0], padding=0), *rules)
    assert folds["b"].carrier == (1, 2.0)
    _, plan = planned(Pair([0.0] * 6, padding=0), *rules)
    model = Pair([0.0] * 6, padding=0)
    assert not folds_into_bias(model.b, "b", plan)
    assert folds_into_bias(model.b, "not planned", plan)
    assert folds_into_bias(nn.Linear(3, 3), "b", plan)


class Two(nn.Module):
    """One image read twice, once behind an activation that silences it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 6), conv(6, 4), conv(6, 4)
        with torch.no_grad():
            self.a.bias.copy_(torch.tensor([-3.0, -1.0, -2.0, -1.0, -1.0, -1.0]))  # type: ignore[union-attr]
            self.a.weight.mul_(4.0 ** torch.arange(6).view(-1, 1, 1, 1))
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        return self.b(F.relu(y)), self.c(y)


def test_every_reader_sees_its_own_constants() -> None:
    removal, folds = removal_of(Two(), PruneRule("[bc]", method="dense"))
    assert gone(removal, "a") == [1, 2, 3]
    assert folds["c"].carrier == (0, -3.0)
    assert folds["b"].carrier is None
    assert not folds["b"].constant.any()
    assert folds["b"].stay.tolist() == folds["c"].stay.tolist() == [0, 4, 5]


def test_what_is_tied_to_unpruned_filters_stays_and_says_why() -> None:
    removal, _ = removal_of(randomised(Residual()), PruneRule("stem", skip=True))
    assert gone(removal, "b") == gone(removal, "c") == []
    assert removal.reasons["b"] == "their channels are tied to those of stem, whose filters are not pruned"
    assert removal.reasons["out"] == "their channels are read by output"
    assert set(removal.reasons) == {"b", "c", "out"}


def test_filters_that_tied_ones_keep_stay() -> None:
    traced, plan = planned(randomised(Residual()))
    plan["b"].keep[:] = True
    found = find_removal(traced.units[""], plan)
    assert gone(found, "c") == []
    assert found.reasons["c"] == "filters that its channels are tied to are kept"


def test_constants_that_a_padded_grouped_convolution_reads_stay() -> None:
    model = Grouped()
    with torch.no_grad():
        model.b.bias.copy_(torch.linspace(-1, 1, 12))  # type: ignore[union-attr]
    removal, _ = removal_of(randomised(model))
    pruned = (~pruned_filters(planned(model)[1])["b"]).nonzero().flatten().tolist()
    loud = [index for index in pruned if any(model.b.bias[index % 4 + 4 * group] > 0 for group in range(3))]  # type: ignore[index]
    assert loud
    assert not set(gone(removal, "b")) & set(loud)
    assert "zero padding" in removal.reasons["b"]


def test_before_calibration_every_constant_counts() -> None:
    model = Pair([-1.0] * 6)
    traced, plan = planned(model, *ONLY_A, importance="l2")
    gm = traced.units[""]
    assert find_removal(gm, plan).sizes(gm) == {"a": (3, 3), "b": (4, 3)}
    assert find_removal(gm, plan, loud=True).sizes(gm) == {"a": (4, 3), "b": (4, 4)}


def test_sizes() -> None:
    model = randomised(Residual())
    traced, plan = planned(model)
    sizes = find_removal(traced.units[""], plan).sizes(traced.units[""])
    assert sizes == {"stem": (5, 3), "a": (3, 5), "b": (5, 3), "c": (5, 5), "out": (4, 5)}
    assert all(math.prod(size) for size in sizes.values())


def test_kernels_get_their_multiple_of_channels_where_pruned_ones_suffice() -> None:
    traced, plan = planned(Pair([-1.0] * 6), *ONLY_A, importance="l2")
    gm = traced.units[""]
    assert find_removal(gm, plan, multiple=1).sizes(gm) == {"a": (3, 3), "b": (4, 3)}
    removal = find_removal(gm, plan, multiple=4)
    assert removal.sizes(gm) == {"a": (4, 3), "b": (4, 4)}
    assert set(removal.reasons) == {"a"}
    assert "fill up a multiple of 4" in removal.reasons["a"]
    (fold,) = removal.folds.values()
    assert fold.stay.tolist() == [0, 3, 4, 5]
    assert find_removal(gm, plan, multiple=6).sizes(gm) == {}
    assert find_removal(gm, plan, multiple=8).sizes(gm) == {"a": (3, 3), "b": (4, 3)}  # out of reach


def test_the_vendors_layers_lose_all_pruned_channels() -> None:
    traced, plan = planned(Pair([-1.0] * 6), PruneRule("b", pr=0.0), importance="l2")
    sites = {path: replace(entry, winograd=False) for path, entry in plan.sites.items()}
    plan = replace(plan, sites=sites)
    gm = traced.units[""]
    assert find_removal(gm, plan, multiple=4).sizes(gm)["a"] == (3, 3)


def test_what_a_kernel_reads_is_filled_up_where_the_vendor_writes_it() -> None:
    traced, plan = planned(Pair([-1.0] * 6), *ONLY_A, importance="l2")
    plan = replace(plan, sites=plan.sites | {"a": replace(plan["a"], winograd=False)})
    gm = traced.units[""]
    assert find_removal(gm, plan, multiple=4).sizes(gm) == {"a": (4, 3), "b": (4, 4)}


class Beside(nn.Module):
    """A convolution reads two others' channels side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(3, 8), conv(16, 4)
        for bias in (self.a.bias, self.b.bias):
            nn.init.constant_(bias, -1.0)  # type: ignore[arg-type]
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1))


def test_channels_that_stay_already_count() -> None:
    """6 channels of each are kept; those of "a" are filled up to 8 for its own kernel, "b" runs without one."""
    rules = (PruneRule("[ab]", method="fp", pr=0.25), PruneRule("c", method="dense"))
    traced, plan = planned(Beside(), *rules, importance="l2")
    plan = replace(plan, sites=plan.sites | {"b": replace(plan["b"], winograd=False)})
    gm = traced.units[""]
    assert find_removal(gm, plan).sizes(gm) == {"a": (6, 3), "b": (6, 3), "c": (4, 12)}
    assert find_removal(gm, plan, multiple=4).sizes(gm) == {}
