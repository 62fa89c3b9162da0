"""frontier: the same values as running from the beginning, however little is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.graphs import randomise_norms
from tests.reference import assert_untouched, snapshot
from wsp_compiler.activations import Replay
from wsp_compiler.errors import InputError
from wsp_compiler.frontier import Frontier
from wsp_compiler.options import CompileOptions
from wsp_compiler.plan import PruningPlan, make_plan
from wsp_compiler.sites import collect_sites
from wsp_compiler.trace import TracedModel, trace


class Net(nn.Module):
    """Residuals, in-place activations, a shared convolution, a strided one with its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a = nn.Conv2d(16, 16, 3, padding=1)
        self.a_norm = nn.BatchNorm2d(16)
        self.shared = nn.Conv2d(16, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 16, 3, stride=2)
        self.down_norm = nn.BatchNorm2d(16)
        self.b = nn.Conv2d(16, 16, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = F.relu(self.stem(x), inplace=True)
        y = y + F.relu_(self.a_norm(self.a(y)))
        y = self.shared(self.shared(y) * scale)
        return self.b(F.relu(self.down_norm(self.down(y)), inplace=True))


def parts() -> tuple[TracedModel, PruningPlan, list[torch.Tensor]]:
    model = randomise_norms(Net())
    traced = trace(model)
    assert list(traced.units) == [""]
    convolutions = {path: m for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    plan = make_plan(collect_sites(traced), convolutions, CompileOptions(pr=0.5))
    return traced, plan, [torch.randn(2, 3, 9, 9), torch.randn(1, 3, 7, 8)]


ORDER = [("a", True), ("shared", True), ("down_norm", False), ("b", True)]


@pytest.mark.parametrize("kept_bytes", [0, 20_000, 2**30])
def test_equals_running_from_the_beginning(kept_bytes: int) -> None:
    traced, plan, inputs = parts()
    before = snapshot(traced.model)
    calls = [((x,), {}) for x in inputs]
    graph = Frontier(traced.units[""], traced.calls[""], calls, kept_bytes)
    replay = Replay(traced.model, calls)
    assert graph.order(plan) == replay.order(plan) == ORDER
    for path, convolution in ORDER:
        for index in range(len(inputs)):
            for pruned in (False, True):
                output = convolution and not pruned
                actual = graph.capture(path, index, pruned=pruned, output=output)
                expected = replay.capture(path, index, pruned=pruned, output=output)
                assert torch.allclose(actual, expected, atol=1e-6), (path, index, pruned)
        for networks in (graph, replay):  # the pruned networks differ from here on
            module = networks.module(path, pruned=True)
            if convolution:
                forward = module.forward
                module.__dict__["forward"] = lambda input, forward=forward: 0.5 * forward(input)
    assert sum(standing.bytes for standing in graph._standing.values()) <= kept_bytes
    assert_untouched(traced.model, before)


def test_going_back_starts_again() -> None:
    traced, _, inputs = parts()
    graph = Frontier(traced.units[""], traced.calls[""], [((inputs[0],), {})])
    first = graph.capture("a", 0, pruned=False, output=True).clone()
    graph.capture("b", 0, pruned=False, output=False)
    assert torch.equal(graph.capture("a", 0, pruned=False, output=True), first)
    assert torch.equal(graph.capture("a", 0, pruned=False, output=True), first)


def test_values_nobody_needs_are_dropped() -> None:
    traced, _, inputs = parts()
    graph = Frontier(traced.units[""], traced.calls[""], [((inputs[0],), {})])
    graph.capture("b", 0, pruned=False, output=False)
    (standing,) = graph._standing.values()
    assert standing.bytes == 2 * 16 * 4 * 4 * 4  # the input of b alone


def test_failures_name_the_batch() -> None:
    traced, _, inputs = parts()
    graph = Frontier(traced.units[""], traced.calls[""], [((inputs[0],), {}), ((inputs[0][:, :2],), {})])
    graph.capture("a", 0, pruned=False, output=True)
    with pytest.raises(InputError, match=r"fails on batch 1, shapes \[\[2, 2, 9, 9\]\]"):
        graph.capture("a", 1, pruned=False, output=True)


@pytest.mark.parametrize("kept_bytes", [0, 2**30])
def test_finishing_with_another_output_leaves_the_rest_alone(kept_bytes: int) -> None:
    traced, plan, inputs = parts()
    calls = [((x,), {}) for x in inputs]
    graph = Frontier(traced.units[""], traced.calls[""], calls, kept_bytes)
    replay = Replay(traced.model, calls)
    expected = [traced.model(x) for x in inputs]
    for path in [path for path, convolution in graph.order(plan) if convolution]:
        for index in range(len(inputs)):
            y = graph.capture(path, index, pruned=False, output=True).clone()
            assert torch.allclose(graph.finish(path, index, y, pruned=False), expected[index], atol=1e-6)
            changed = graph.finish(path, index, 3 * y, pruned=False)
            assert not torch.allclose(changed, expected[index], atol=1e-3)
            assert torch.allclose(changed, replay.finish(path, index, 3 * y, pruned=False), atol=1e-6)
    assert torch.equal(
        graph.capture("b", 0, pruned=False, output=True), replay.capture("b", 0, pruned=False, output=True)
    )
    # going back is possible, and the other network is another
    y = replay.capture("a", 0, pruned=False, output=True)
    assert torch.allclose(graph.finish("a", 0, y, pruned=False), expected[0], atol=1e-6)
    forward = graph.module("b", pruned=True).forward
    graph.module("b", pruned=True).__dict__["forward"] = lambda input: 0.5 * forward(input)
    assert torch.allclose(graph.finish("a", 0, y, pruned=True), 0.5 * expected[0], atol=1e-6)


def test_finishing_names_the_batch_that_fails() -> None:
    traced, _, inputs = parts()
    graph = Frontier(traced.units[""], traced.calls[""], [((inputs[0][:, :2],), {})])
    with pytest.raises(InputError, match="fails on batch 0"):
        graph.finish("a", 0, torch.zeros(2, 16, 9, 9), pruned=True)
