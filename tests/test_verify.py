"""verify: check=True notices what a pass changes, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from tests.graphs import Lowering, as_double, conv, lowering, randomise_norms
from tests.reference import pruned_convolution as reference
from wsp_compiler.errors import PassError
from wsp_compiler.passes import pipeline, run_pipeline
from wsp_compiler.passes.base import OUTPUT_TRANSFORM, is_op, set_argument
from wsp_compiler.plan import PruningPlan
from wsp_compiler.verify import PlannedInterpreter, make_check, pruned_convolution

X = torch.randn(2, 4, 7, 6)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Threads that wait for each other make small operations slow on a busy machine; undone in conftest."""
    torch.set_num_threads(1)


def block() -> nn.Module:
    return randomise_norms(nn.Sequential(conv(4, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 4)))


@pytest.mark.parametrize("method", ["dense", "wsp", "bwsp", "fp"])
@pytest.mark.parametrize("direction", ["row", "column"])
@pytest.mark.parametrize("tile", [2, 4])
def test_the_default_pipeline_passes(method: str, direction: str, tile: int) -> None:
    case = lowering(block(), method=method, direction=direction, tile=tile, pr=0.5)
    run_pipeline(pipeline, case.gm, case.plan, check=make_check(case.gm, case.plan, (X,)))
    assert "winograd_conv2d" in case.calls


@pytest.mark.parametrize(("padding", "bias"), [((1, 1), True), ((0, 2), False)])
def test_pruned_convolution(padding: tuple[int, int], bias: bool) -> None:
    layer = nn.Conv2d(4, 6, 3, padding=padding, bias=bias).requires_grad_(False)
    plan = lowering(layer, method="bwsp", pr=0.5).plan[""]
    actual = pruned_convolution(X.double(), layer, plan)
    torch.testing.assert_close(actual, reference(X, layer, plan.keep, 2), rtol=1e-5, atol=1e-5)


def test_planned_convolutions_are_pruned_before_they_are_lowered() -> None:
    case = lowering(nn.Sequential(conv(), nn.ReLU()).requires_grad_(False), method="fp", pr=0.5)
    y = PlannedInterpreter(as_double(case.gm), case.plan).run(X.double())
    expected = reference(X, case.model[0], case.plan["0"].keep, 2).relu()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def output(case: Lowering) -> Any:
    return next(node for node in case.gm.graph.nodes if is_op(node, OUTPUT_TRANSFORM))


def forget_activation(case: Lowering) -> None:
    set_argument(output(case), "activation", "none")


def wrong_weights(case: Lowering) -> None:
    site = next(module for module in case.gm.modules() if hasattr(module, "row_offset"))
    site.weight = site.weight * (1 + 1e-4)


def other_shape(case: Lowering) -> None:
    _replace_result(case, lambda y: y[:, :1])


def more_outputs(case: Lowering) -> None:
    _replace_result(case, lambda y: (y, y))


def fails(case: Lowering) -> None:
    _replace_result(case, lambda y: torch.cat([y, y[:, :, :1]]))


def _replace_result(case: Lowering, function: Any) -> None:
    (node,) = (node for node in case.gm.graph.nodes if node.op == "output")
    with case.gm.graph.inserting_before(node):
        node.args = (case.gm.graph.call_function(function, (node.args[0],)),)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (forget_activation, "changed output 0: relative error"),
        (wrong_weights, "changed output 0: relative error"),
        (other_shape, r"changed the outputs' shapes from \[\[2, 4, 7, 6\]\] to \[\[2, 1, 7, 6\]\]"),
        (more_outputs, "changed the outputs' shapes"),
        (fails, "the graph fails in float64: RuntimeError"),
    ],
)
def test_a_changed_meaning_is_reported_with_the_pass(damage: Any, what: str) -> None:
    case = lowering(block())
    check = make_check(case.gm, case.plan, (X,))
    case.through("fuse_epilogue")
    check(case.gm, "fuse_epilogue")
    damage(case)
    case.gm.recompile()
    with pytest.raises(PassError, match=what) as caught:
        check(case.gm, "mine")
    assert caught.value.where == "pass mine"
    assert "WSP_DUMP" in caught.value.fix


class Special(nn.Module):
    """Returns NaN, infinity, integers, and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.conv(x.mul_(2))
        return {
            "nan": torch.log(-y.abs() - 1),
            "inf": y / 0,
            "index": y.argmax(1),
            "text": "a",
            "zero": y * 0,
        }


def test_special_values_are_compared_too() -> None:
    case = lowering(Special().eval())
    x = X.clone()
    check = make_check(case.gm, case.plan, (x,))
    run_pipeline(pipeline, case.gm, case.plan, check=check)
    assert torch.equal(x, X)
    for node in case.gm.graph.nodes:
        if node.target is torch.log:
            node.target = torch.abs
    case.gm.recompile()
    with pytest.raises(PassError, match=r"changed output 0: relative error (inf|nan)"):
        check(case.gm, "mine")


def test_random_numbers_do_not_count_as_changes() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x + torch.rand_like(x))

    case = lowering(Noise().eval())
    run_pipeline(pipeline, case.gm, case.plan, check=make_check(case.gm, case.plan, (X,)))


def test_half_precision_models_are_checked_in_float64() -> None:
    case = lowering(block().half())
    run_pipeline(pipeline, case.gm, case.plan, check=make_check(case.gm, case.plan, (X.half(),)))
    assert case.gm(X.half()).dtype == torch.float16


def test_the_graph_and_the_inputs_are_left_alone() -> None:
    case = lowering(block())
    before = {name: tensor.clone() for name, tensor in case.gm.state_dict().items()}
    make_check(case.gm, case.plan, (X,))(case.gm, "nothing")
    after = case.gm.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype
        for name, tensor in before.items()
    )
    assert X.dtype == torch.float32


def test_the_plan_of_the_graph_at_hand_counts() -> None:
    """Shrunken graphs come with a plan of their own."""
    case = lowering(block(), method="wsp", pr=0.5)
    check = make_check(case.gm, case.plan, (X,))
    check(case.gm, "nothing", case.plan)
    with pytest.raises(PassError, match="pass mine: changed output 0"):
        check(case.gm, "mine", PruningPlan())


def test_a_model_that_fails_on_the_inputs() -> None:
    case = lowering(block())
    with pytest.raises(PassError, match="the graph fails in float64"):
        make_check(case.gm, case.plan, (torch.randn(2, 3, 7, 7),))


def test_errors_of_nan_are_not_let_through() -> None:
    case = lowering(nn.Sequential(conv()))
    check = make_check(case.gm, case.plan, (X,))
    with torch.no_grad():
        case.gm.get_submodule("0").bias = nn.Parameter(torch.full((4,), math.nan))
    with pytest.raises(PassError, match="relative error"):
        check(case.gm, "mine")


def test_the_interpreter_takes_inputs_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(input=x)

    case = lowering(Named().eval())
    assert isinstance(case.gm, fx.GraphModule)
    with torch.no_grad():
        y = PlannedInterpreter(case.gm, case.plan).run(X)
        torch.testing.assert_close(y, case.model(X), rtol=1e-4, atol=1e-5)
