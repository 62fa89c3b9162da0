"""assign_layout: channels_last between lowered layers, the model's own format where values leave."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import wsp_compiler
from wsp_compiler.passes.base import CONV2D, WINOGRAD_CONV2D, arguments, is_op


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)))
        self.last = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.convs(x) + x)
        return self.last(y), torch.sigmoid(y)


def test_inside_a_chain_channels_last_and_the_models_format_at_its_exit() -> None:
    model = Chain().eval()
    x = torch.randn(2, 16, 12, 10)
    compiled = wsp_compiler.compile(model, method="dense", example_inputs=(x,), check=True)
    nodes = [node for node in compiled.graph_module.graph.nodes if is_op(node, WINOGRAD_CONV2D)]
    assert [arguments(node)["channels_last"] for node in nodes] == [True, True, False, False]
    origin = arguments(nodes[0])["x"]
    assert arguments(nodes[2])["like"] is origin
    assert arguments(nodes[3]).get("like") is None
    for layout in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=layout)
        with torch.no_grad():
            expected = model(given)
        for ours, eager in zip(compiled(given), expected, strict=True):
            assert ours.stride() == eager.stride()
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
        for ours, eager in zip(compiled.graph_module(given), expected, strict=True):
            assert ours.stride() == eager.stride()


def test_the_report_counts_the_conversions_that_are_left() -> None:
    model, x = Classifier(shows=True).eval(), torch.randn(1, 3, 40, 40)
    text = wsp_compiler.compile(model, method="dense", example_inputs=x).report()
    said = "images converted between layouts, unless the model is channels_last: 1 copied (x for first)"
    assert f"pass assign_layout: 1 rewrites, 2 declined; {said}; 1 inside kernels" in text


def test_does_not_fire_where_others_read_the_value() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Softmax(1), nn.Conv2d(16, 16, 3)).eval()
    compiled = wsp_compiler.compile(model, method="dense")
    record = next(record for record in compiled.record.passes if record.name == "assign_layout")
    assert record.rewrites.count == 0
    reasons = {reason for _, reason in record.rewrites.declined}
    assert reasons == {"read by an operation that needs the model's format"}


def test_does_not_fire_on_channels_last_weights() -> None:
    model = (
        nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)).eval().to(memory_format=torch.channels_last)
    )
    compiled = wsp_compiler.compile(model, method="dense")
    record = next(record for record in compiled.record.passes if record.name == "assign_layout")
    assert record.rewrites.count == 0
    assert compiled(torch.randn(1, 16, 9, 9)).is_contiguous(memory_format=torch.channels_last)


def test_weights_of_one_channel_count_as_channels_last() -> None:
    """With a size-1 dimension both formats are contiguous; PyTorch decides by the strides."""
    model = nn.Conv2d(1, 16, 3, padding=1).eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 1, 8, 8)
    rule = wsp_compiler.PruneRule(".*")
    with torch.no_grad():
        assert wsp_compiler.compile(model, method="dense", rules=[rule])(x).stride() == model(x).stride()


def test_does_nothing_where_stages_are_not_merged() -> None:
    model = Chain().eval()
    passes = wsp_compiler.pipeline.without("merge_stages")
    compiled = wsp_compiler.compile(model, method="dense", passes=passes)
    record = next(record for record in compiled.record.passes if record.name == "assign_layout")
    assert record.rewrites.count == 0
    x = torch.randn(1, 16, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x)[0], model(x)[0], rtol=1e-4, atol=1e-5)


class Classifier(nn.Module):
    """Vendor's and lowered convolutions, pooling between them, and a reader that hides or shows the format."""

    def __init__(self, shows: bool) -> None:
        super().__init__()
        self.first, self.pool = nn.Conv2d(3, 16, 7, stride=2), nn.MaxPool2d(2)
        self.conv, self.down = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 24, 1, stride=2)
        self.shows = shows

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.relu(self.conv(self.pool(self.first(x)))))
        return y.view(y.shape[0], -1) if self.shows else torch.flatten(y, 1)


def test_whole_networks_stay_channels_last_up_to_flatten() -> None:
    model, x = Classifier(shows=False).eval(), torch.randn(2, 3, 40, 40)
    compiled = wsp_compiler.compile(model, method="dense", example_inputs=x, check=True)
    nodes = [node for node in compiled.graph_module.graph.nodes if node.target in (WINOGRAD_CONV2D, CONV2D)]
    assert [arguments(node)["channels_last"] for node in nodes] == [True] * 3
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_reader_that_shows_the_format_keeps_it() -> None:
    """Tensor.view fails on a channels_last image: everything before it up to a lowered layer has to be plain."""
    model, x = Classifier(shows=True).eval(), torch.randn(2, 3, 40, 40)
    compiled = wsp_compiler.compile(model, method="dense", example_inputs=x, check=True)
    nodes = [node for node in compiled.graph_module.graph.nodes if node.target in (WINOGRAD_CONV2D, CONV2D)]
    assert [arguments(node)["channels_last"] for node in nodes] == [True, False, False]
    assert str(arguments(nodes[1])["like"]) == "x"
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
