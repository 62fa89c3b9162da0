"""site_plan: names and JSON of one convolution's plan (tests/test_plan.py has the rest)."""

from __future__ import annotations

import json

import pytest
import torch

from wsp_compiler.errors import PlanError
from wsp_compiler.options import METHODS
from wsp_compiler.pruning import PATTERNS
from wsp_compiler.site_plan import UNDIRECTED, SitePlan, site_from_json, site_to_json


def test_the_undirected_methods_are_those_of_the_patterns() -> None:
    assert {name for name, pattern in PATTERNS.items() if not pattern.uses_direction} == set(UNDIRECTED)
    assert set(PATTERNS) == set(METHODS)


def test_json_and_back() -> None:
    entry = SitePlan("a.b", "bwsp", "row", 2, 0.5, torch.rand(16, 6, 1) < 0.5, (16, 6, 3), block=3)
    again = site_from_json(json.loads(json.dumps(site_to_json(entry))))
    assert again == entry
    assert torch.equal(again.keep, entry.keep)
    assert (again.pattern, again.block) == ("BWSP-R/3", 3)
    assert entry.kept_weights == int(entry.keep.sum()) * 3


def test_a_keep_of_another_shape_is_an_error() -> None:
    with pytest.raises(PlanError, match="broadcastable"):
        SitePlan("a", "wsp", "row", 2, 0.5, torch.ones(16, 5, 1, dtype=torch.bool), (16, 6, 3))


def test_single_weights_are_kept_by_wwp_alone() -> None:
    keep = torch.rand(16, 6, 3) < 0.5
    entry = SitePlan("a", "wwp", "row", 2, 0.5, keep, (16, 6, 3))
    assert entry.pattern == "WWP"
    assert entry.kept_weights == int(keep.sum())
    again = site_from_json(json.loads(json.dumps(site_to_json(entry))))
    assert again == entry
    assert torch.equal(again.keep, keep)
    with pytest.raises(PlanError, match="neither whole rows nor whole columns"):
        SitePlan("a", "wsp", "row", 2, 0.5, keep, (16, 6, 3))
    with pytest.raises(PlanError, match="not bool and broadcastable"):
        SitePlan("a", "wwp", "row", 2, 0.5, keep[:, :5], (16, 6, 3))


def test_only_filters_may_be_left_to_the_vendor() -> None:
    keep = torch.tensor([True, False, True]).view(1, 3, 1)
    entry = SitePlan("a", "fp", "row", 2, 0.5, keep, (16, 3, 3), winograd=False)
    again = site_from_json(json.loads(json.dumps(site_to_json(entry))))
    assert not again.winograd
    assert again == entry
    older = {name: value for name, value in site_to_json(entry).items() if name != "winograd"}
    assert site_from_json(older).winograd
    assert site_from_json(older) != entry
    with pytest.raises(PlanError, match="no other form than Winograd"):
        SitePlan("a", "wsp", "row", 2, 0.5, keep, (16, 3, 3), winograd=False)
