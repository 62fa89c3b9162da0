"""layout_cut: the chosen layouts cost least of all that are allowed."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, fx, nn

import wsp_compiler
from wsp_compiler.passes.base import CONV2D, WINOGRAD_CONV2D, arguments, is_op
from wsp_compiler.passes.layout_cut import LOWERED_LOSS, VENDOR_LOSS, choose_layouts, is_free, prefers

CHANNELS = 16


def conv() -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)


def vendor() -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, 1)


class Branches(nn.Module):
    """Two branches of unlike preferences that meet, and a residual from before both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(), vendor(), conv(), vendor()

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x), torch.relu(self.b(torch.softmax(x, 1)))
        return self.d(torch.max_pool2d(self.c(left + right), 2)) + x.mean()


class Shown(nn.Module):
    """The middle value is also read by something that shows its format."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(), vendor(), conv()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.a(x))
        z = torch.relu(self.b(y))
        return torch.flatten(self.c(z), 1), z.transpose(2, 3)


class Shortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = torch.relu(self.a(torch.softmax(x, 1)) + torch.sigmoid(residual))
        return torch.flatten(self.b(y) + y, 1)


MODELS = {
    "branches": Branches,
    "shown": Shown,
    "shortcut": Shortcut,
    "vendor": lambda: nn.Sequential(vendor()),
}


def lowered(model: nn.Module) -> fx.GraphModule:
    """The graph as the pass meets it."""
    passes = wsp_compiler.pipeline.without("assign_layout")
    compiled = wsp_compiler.compile(model.eval(), method="dense", passes=passes)
    assert isinstance(compiled.graph_module, fx.GraphModule)
    return compiled.graph_module


KEEPING = {"relu", "add", "sigmoid", "max_pool2d"}


def cost(gm: fx.GraphModule, last: set[fx.Node]) -> float:
    """What a choice costs, told apart from the implementation: by walking over all readers."""
    total = 0.0
    for node in gm.graph.nodes:
        if is_op(node, WINOGRAD_CONV2D):
            total += 0 if node in last else LOWERED_LOSS
            residual = arguments(node)["residual"]
            total += isinstance(residual, fx.Node) and (residual in last) != (node in last)
            continue
        images = [value for value in node.all_input_nodes if value.op != "get_attr"]
        keeps = getattr(node.target, "__name__", "") in KEEPING
        if is_op(node, CONV2D) or keeps:
            if node not in last and any(value in last for value in images):
                return float("inf")
            if is_op(node, CONV2D):
                total += 0 if node in last else VENDOR_LOSS
            elif (images[0] in last) != (node in last):
                return float("inf")
            total += sum(value not in last for value in images if node in last)
        elif node in last or (node.target is not torch.flatten and any(value in last for value in images)):
            return float("inf")
    return total


@pytest.mark.parametrize("name", MODELS)
def test_no_other_choice_costs_less(name: str):
    gm = lowered(MODELS[name]())
    nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert len(nodes) <= 12
    best = min(
        cost(gm, set(chosen))
        for size in range(len(nodes) + 1)
        for chosen in itertools.combinations(nodes, size)
    )
    found = choose_layouts(gm)
    assert cost(gm, set(found.channels_last)) == best < float("inf")


def test_conversions_are_told_by_what_they_cost():
    gm = lowered(Shown())
    found = choose_layouts(gm)
    a, c = (node for node in gm.graph.nodes if is_free(node))
    (b,) = (node for node in gm.graph.nodes if prefers(gm, node))
    assert a not in found.channels_last  # read by b, whose result is shown
    assert b not in found.channels_last
    assert c in found.channels_last
    assert not found.copies
    assert [reader for _, reader in found.inside] == [c]


def test_a_vendors_convolution_behind_a_reader_that_shows_the_format_copies_its_input():
    model = nn.Sequential(nn.Softmax(1), vendor(), conv(), nn.Flatten())
    gm = lowered(model)
    found = choose_layouts(gm)
    ((value, reader),) = found.copies
    assert prefers(gm, reader)
    assert "softmax" in value.name or value.op == "call_module"
    assert len(found.channels_last) == 2
