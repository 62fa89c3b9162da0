"""fold_batch_norm: batch norm after a lowered convolution becomes scaled rows and a bias."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.graphs import Lowering, as_double, conv, lowering, randomise_norms
from tests.reference import pruned_convolution
from wsp_compiler.ops import WinogradSite
from wsp_compiler.passes import FoldBatchNorm
from wsp_compiler.passes.base import OUTPUT_TRANSFORM, is_op, set_argument, site_of
from wsp_compiler.passes.fold_batch_norm import batch_norm_scale_and_shift

STAGES = ["input_transform", "sparse_bgemm", "output_transform"]


def lowered(model: nn.Module, **options: Any) -> Lowering:
    return lowering(randomise_norms(model), **options).through("lower_winograd")


def output_nodes(case: Lowering) -> list[Any]:
    return [node for node in case.gm.graph.nodes if is_op(node, OUTPUT_TRANSFORM)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_before_and_after(bias: bool, affine: bool) -> None:
    case = lowered(
        nn.Sequential(conv(4, 6, bias=bias), nn.BatchNorm2d(6, affine=affine, eps=1e-2), nn.ReLU())
    )
    assert case.calls == [*STAGES, "BatchNorm2d", "ReLU"]
    assert case.run(FoldBatchNorm()).count == 1
    assert case.calls == [*STAGES, "ReLU"]
    case.assert_equals_model(torch.randn(2, 4, 7, 5))
    assert case.run(FoldBatchNorm()).count == 0
    assert case.calls == [*STAGES, "ReLU"]


@pytest.mark.parametrize("method", ["wsp", "bwsp", "fp"])
@pytest.mark.parametrize("direction", ["row", "column"])
@pytest.mark.parametrize("tile", [2, 4])
def test_row_scaling_commutes_with_pruning(method: str, direction: str, tile: int) -> None:
    model = nn.Sequential(conv(6, 5), nn.BatchNorm2d(5)).requires_grad_(False)
    case = lowered(model, method=method, direction=direction, tile=tile, pr=0.5)
    assert case.run(FoldBatchNorm()).count == 1
    x = torch.randn(1, 6, 7, 7).double()
    expected = as_double(model[1])(pruned_convolution(x, model[0], case.plan["0"].keep, tile))
    actual = as_double(case.gm)(x)
    assert float((actual - expected).norm()) <= 1e-6 * float(expected.norm())


def test_a_pruned_filter_becomes_a_constant() -> None:
    model = nn.Sequential(conv(4, 8), nn.BatchNorm2d(8)).requires_grad_(False)
    case = lowered(model, method="fp", pr=0.5)
    case.run(FoldBatchNorm())
    constant = ~case.plan["0"].keep.flatten()
    y = case.gm(torch.randn(2, 4, 6, 6))[:, constant]
    expected = as_double(model[1])(model[0].bias.double().view(1, 8, 1, 1))[:, constant]
    torch.testing.assert_close(y, expected.float().expand_as(y))


def test_scale_and_shift() -> None:
    norm = randomise_norms(nn.BatchNorm2d(3, eps=0.1)).double()
    scale, shift = batch_norm_scale_and_shift(norm)
    x = torch.randn(2, 3, 4, 4).double()
    torch.testing.assert_close(norm(x), x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1))
    assert batch_norm_scale_and_shift(norm.half())[0].dtype == torch.float64


class TwoNorms(nn.Module):
    """One convolution, called twice, each time followed by a batch norm of its own."""

    def __init__(self, third: bool = False) -> None:
        super().__init__()
        self.conv = conv()
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.third = third

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.conv(torch.tanh(self.first(self.conv(x)))))
        return torch.sigmoid(self.conv(y)) if self.third else y


@pytest.mark.parametrize("third", [False, True])
def test_a_shared_convolution_gets_weights_for_each_batch_norm(third: bool) -> None:
    case = lowered(TwoNorms(third))
    assert case.run(FoldBatchNorm()).count == 2
    sites = {site_of(case.gm, node)[0] for node in output_nodes(case)}
    assert len(sites) == 2 + third
    for node in output_nodes(case):
        reads = {str(arg.target).rpartition(".")[0] for arg in node.all_input_nodes if arg.op == "get_attr"}
        assert len(reads) == 1  # rows, bias of one and the same site
    case.assert_equals_model(torch.randn(1, 4, 6, 6))
    assert sum(isinstance(module, WinogradSite) for module in case.gm.modules()) == 2 + third


def test_a_shared_convolution_and_a_shared_batch_norm() -> None:
    both = nn.Sequential(conv(), nn.BatchNorm2d(4))
    case = lowered(nn.Sequential(both, nn.ReLU(), both))
    assert case.run(FoldBatchNorm()).count == 2
    case.assert_equals_model(torch.randn(1, 4, 6, 6))


class Branch(nn.Module):
    """The convolution's result is also used without the batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + torch.sigmoid(y)


class Custom(nn.BatchNorm2d):
    """Not a leaf of torch.fx, but it can be one in a graph made by hand."""

    __module__ = "torch.nn.custom"

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def hooked(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    norm.register_forward_hook(lambda module, args, output: output * 2)
    return norm


def patched(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    norm.forward = types.MethodType(lambda self, x: x * 2, norm)
    return norm


@pytest.mark.parametrize(
    ("model", "node", "reason"),
    [
        (Branch(), "norm", "output_transform_default has other users"),
        (nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)), "1", "batch statistics"),
        (nn.Sequential(conv(), hooked(nn.BatchNorm2d(4))), "1", "it has forward hooks"),
        (nn.Sequential(conv(), patched(nn.BatchNorm2d(4))), "1", "its forward is replaced"),
        (nn.Sequential(conv(), Custom(4)), "1", "Custom is not a plain BatchNorm2d"),
    ],
)
def test_does_not_fire(model: nn.Module, node: str, reason: str) -> None:
    case = lowered(model)
    calls = case.calls
    rewrites = case.run(FoldBatchNorm())
    assert rewrites.count == 0
    ((where, why),) = rewrites.declined
    assert where == node
    assert reason in why
    assert case.calls == calls
    case.assert_equals_model(torch.randn(2, 4, 6, 6))


def test_does_not_fire_in_train_mode() -> None:
    case = lowered(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    case.gm.get_submodule("1").train()
    assert case.run(FoldBatchNorm()).declined == (("1", "it normalises with batch statistics"),)


@pytest.mark.parametrize("kind", ["activation", "residual"])
def test_does_not_fire_after_an_epilogue(kind: str) -> None:
    case = lowered(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    (output,) = output_nodes(case)
    x = next(iter(case.gm.graph.nodes))
    set_argument(output, kind, "relu" if kind == "activation" else x)
    rewrites = case.run(FoldBatchNorm())
    assert rewrites.declined == (("1", "an activation or residual add comes between"),)


def test_does_not_fire_when_a_custom_pass_rewired_the_stages() -> None:
    case = lowered(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    (output,) = output_nodes(case)
    M = output.kwargs.get("M", output.args[0] if output.args else None)
    with case.gm.graph.inserting_before(output):
        doubled = case.gm.graph.call_function(torch.mul, (M, 2))
    set_argument(output, "M", doubled)
    rewrites = case.run(FoldBatchNorm())
    assert rewrites.declined == (("1", "its stages are not directly connected"),)


def test_other_batch_norms_are_not_looked_at() -> None:
    case = lowered(
        nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(4), conv(4, 4, stride=2), nn.BatchNorm2d(4))
    )
    assert case.run(FoldBatchNorm()).declined == ()


def test_an_input_passed_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = conv(), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(input=self.conv(x))

    case = lowered(Named())
    assert case.run(FoldBatchNorm()).count == 1
    case.assert_equals_model(torch.randn(1, 4, 5, 5))


def test_the_users_batch_norm_is_not_touched() -> None:
    model = randomise_norms(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    before = [tensor.clone() for tensor in model.state_dict().values()]
    lowered_case = lowering(model).through("fold_batch_norm")
    assert "BatchNorm2d" not in lowered_case.calls
    for tensor, value in zip(model.state_dict().values(), before, strict=True):
        assert torch.equal(tensor, value)
