"""activations: the first input and output of a module, and the order of calls, with the model left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.reference import assert_untouched, snapshot
from wsp_compiler.activations import Replay, call_order, capture
from wsp_compiler.errors import InputError
from wsp_compiler.options import CompileOptions
from wsp_compiler.plan import make_plan
from wsp_compiler.sites import find_sites


class Net(nn.Module):
    """Defined in another order than called; writes in place; catches exceptions."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.middle_norm = nn.BatchNorm2d(16)
        self.ran_on = 0

    def forward(self, x: Tensor) -> Tensor:
        try:
            y = self.middle_norm(self.middle(self.first(x.mul_(2))))
            y = self.norm(torch.relu_(y)) if y.mean() < 1e9 else y
            y = self.last(y)
        except Exception:
            self.ran_on += 1
            raise
        self.ran_on += 1
        return y


def test_capture_ends_the_run() -> None:
    model, x = Net().eval(), torch.randn(1, 3, 5, 5)

    def run() -> Any:
        return model(x.clone())

    with torch.no_grad():
        y = capture(model.middle, run, output=True)
        assert model.ran_on == 0
        assert y is not None
        assert torch.equal(y, model.middle(model.first(2 * x)))
        given = capture(model.last, run, output=False)
        assert given is not None
        assert torch.equal(given, model.norm(model.middle_norm(y).relu()))
        assert capture(nn.Conv2d(3, 3, 3), run, output=True) is None
    assert not model.last._forward_pre_hooks
    assert not model.middle._forward_hooks


def test_call_order() -> None:
    model = Net().eval()
    named = [(name, getattr(model, name)) for name in ("last", "norm", "first", "middle", "middle_norm")]
    order = call_order(named, lambda: model(torch.randn(1, 3, 5, 5)))
    assert order == [
        ("first", False),
        ("middle", True),
        ("middle_norm", True),
        ("norm", False),
        ("last", False),
    ]


def test_replay_runs_both_networks() -> None:
    model = Net().eval()
    before = snapshot(model)
    convolutions = {"middle": model.middle, "last": model.last, "first": model.first}
    plan = make_plan(find_sites(model), convolutions, CompileOptions(pr=0.5))
    x = torch.randn(2, 3, 6, 6)
    networks = Replay(model, [((x,), {}), ((x[:1],), {})])
    assert networks.batches == 2
    assert networks.order(plan) == [("middle", True), ("norm", False), ("last", True)]
    networks.module("middle", pruned=True).__dict__["forward"] = lambda input: input * 0
    dense = networks.capture("last", 0, pruned=False, output=False)
    pruned = networks.capture("last", 0, pruned=True, output=False)
    assert dense.shape == pruned.shape == (2, 16, 6, 6)
    assert float(pruned[0, 0].std()) == 0 < float(dense[0, 0].std())
    assert torch.equal(
        networks.capture("last", 0, pruned=False, output=False), dense
    )  # x was not doubled again
    assert_untouched(model, before)


def test_failures_name_the_batch() -> None:
    networks = Replay(Net().eval(), [((torch.randn(1, 4, 5, 5),), {})])
    with pytest.raises(InputError, match=r"fails on batch 0, shapes \[\[1, 4, 5, 5\]\]"):
        networks.capture("last", 0, pruned=False, output=True)
    model = Net().eval()
    nn.init.constant_(model.first.weight, 1e30)
    networks = Replay(model, [((torch.full((1, 3, 5, 5), 1e30),), {})])
    with pytest.raises(InputError, match="middle: its input is NaN or infinite on calibration batch 0"):
        networks.capture("middle", 0, pruned=False, output=False)


def test_replay_finishes_with_another_output() -> None:
    model = Net().eval()
    before = snapshot(model)
    x = torch.randn(2, 3, 6, 6)
    networks = Replay(model, [((x,), {})])
    given = networks.capture("middle", 0, pruned=False, output=True)
    y = networks.finish("middle", 0, given, pruned=False)
    assert torch.equal(y, networks.capture("last", 0, pruned=False, output=True))
    zero = networks.finish("middle", 0, torch.zeros_like(given), pruned=False)
    hidden = model.norm(torch.relu(model.middle_norm(torch.zeros_like(given))))
    assert torch.allclose(zero, model.last(hidden))
    assert_untouched(model, before)
