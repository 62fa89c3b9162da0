"""lower_winograd: every planned convolution becomes the three stages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.graphs import as_double, conv, lowering
from tests.reference import pruned_convolution
from wsp_compiler.ops import WinogradSite
from wsp_compiler.passes import ChooseKeep, LowerWinograd
from wsp_compiler.passes.base import OUTPUT_TRANSFORM, WSP_OPS, arguments, is_op, site_of
from wsp_compiler.trace import SITE

STAGES = ["input_transform", "sparse_bgemm", "output_transform"]


def test_before_and_after() -> None:
    model = nn.Sequential(conv(), nn.Sigmoid(), conv(4, 6, stride=2), conv(6, 5, bias=False))
    case = lowering(model)
    case.run(ChooseKeep())
    assert case.calls == ["Conv2d", "Sigmoid", "Conv2d", "Conv2d"]
    rewrites = case.run(LowerWinograd())
    assert (rewrites.count, rewrites.declined) == (2, ())
    assert case.calls == [*STAGES, "Sigmoid", "Conv2d", *STAGES]
    paths = [node.meta[SITE] for node in case.gm.graph.nodes if node.target in WSP_OPS]
    assert paths == ["0"] * 3 + ["3"] * 3
    case.assert_equals_model(torch.randn(2, 4, 7, 9))


@pytest.mark.parametrize("padding", [0, (0, 2), "same", "valid"])
@pytest.mark.parametrize("tile", [2, 4])
def test_meaning_is_kept(padding: str | int | tuple[int, int], tile: int) -> None:
    case = lowering(nn.Sequential(nn.Conv2d(3, 5, 3, padding=padding)), tile=tile)
    case.through("lower_winograd").assert_equals_model(torch.randn(2, 3, 7, 10))


@pytest.mark.parametrize("method", ["wsp", "bwsp", "fp"])
@pytest.mark.parametrize("direction", ["row", "column"])
def test_only_kept_weights_are_stored_and_used(method: str, direction: str) -> None:
    model = nn.Sequential(conv(6, 5)).requires_grad_(False)
    case = lowering(model, method=method, direction=direction, pr=0.5).through("lower_winograd")
    x = torch.randn(1, 6, 7, 7)
    y = as_double(case.gm)(x.double())
    expected = pruned_convolution(x, model[0], case.plan["0"].keep, 2)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    (site,) = (module for module in case.gm.modules() if isinstance(module, WinogradSite))
    assert site.weight.numel() == case.plan["0"].kept_weights < 16 * 30


def test_without_choose_keep_nothing_happens() -> None:
    case = lowering(nn.Sequential(conv()))
    assert case.run(LowerWinograd()).count == 0
    assert case.calls == ["Conv2d"]


def test_twice_is_as_once() -> None:
    case = lowering(nn.Sequential(conv(), conv())).through("lower_winograd")
    calls, buffers = case.calls, [id(b) for b in case.gm.buffers()]
    assert case.run(ChooseKeep()).count == 0
    assert case.run(LowerWinograd()).count == 0
    assert case.calls == calls
    assert [id(b) for b in case.gm.buffers()] == buffers


def test_both_calls_of_a_shared_convolution_read_one_site() -> None:
    shared = conv()
    case = lowering(nn.Sequential(shared, nn.Tanh(), shared)).through("lower_winograd")
    outputs = [node for node in case.gm.graph.nodes if is_op(node, OUTPUT_TRANSFORM)]
    assert len(outputs) == 2
    assert site_of(case.gm, outputs[0])[1] is site_of(case.gm, outputs[1])[1]
    case.assert_equals_model(torch.randn(1, 4, 5, 5))


def test_an_input_passed_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(input=x)

    lowering(Named()).through("lower_winograd").assert_equals_model(torch.randn(1, 4, 5, 5))


def test_a_parametrized_convolution() -> None:
    model = nn.Sequential(parametrizations.weight_norm(conv()))
    lowering(model).through("merge_stages").assert_equals_model(torch.randn(1, 4, 5, 5))


@pytest.mark.parametrize("last", [False, True])
def test_the_weights_memory_format_is_passed_on(last: bool) -> None:
    model = nn.Sequential(conv())
    if last:
        model.to(memory_format=torch.channels_last)
    case = lowering(model).through("lower_winograd")
    (output,) = (node for node in case.gm.graph.nodes if is_op(node, OUTPUT_TRANSFORM))
    assert arguments(output)["channels_last"] is last
    x = torch.randn(2, 4, 5, 5)
    assert case.gm(x).stride() == model(x).stride()


def test_one_image_without_a_batch() -> None:
    lowering(nn.Sequential(conv())).through("merge_stages").assert_equals_model(torch.randn(4, 6, 7))


def test_the_models_weights_are_not_written() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(4))
    before = [tensor.clone() for tensor in model.state_dict().values()]
    lowering(model).through("merge_stages")
    for tensor, value in zip(model.state_dict().values(), before, strict=True):
        assert torch.equal(tensor, value)


def test_no_bias_is_a_bias_of_zero() -> None:
    case = lowering(nn.Sequential(conv(bias=False))).through("lower_winograd")
    (site,) = (module for module in case.gm.modules() if isinstance(module, WinogradSite))
    assert torch.equal(site.bias, torch.zeros(4))
