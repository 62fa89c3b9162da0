"""CompiledModule: called like the model it was made from, and says so where it cannot be."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import wsp_compiler
from wsp_compiler import PassBase, PruneRule, PruningPlan, Rewrites, errors
from wsp_compiler.codegen import layer
from wsp_compiler.passes.base import SPARSE_BGEMM, is_op
from wsp_compiler.runtime import CompiledModule

from .reference import (
    TOLERANCE,
    assert_close,
    assert_untouched,
    pruned_convolution,
    relative_error,
    snapshot,
)

LAST = torch.channels_last
APART = wsp_compiler.pipeline.without("assign_layout").without("merge_stages")
"""The pipeline whose three stages stay three kernels."""


def dense(model: nn.Module, **options: Any) -> CompiledModule:
    """Compiled with all weights kept, so that it must equal the model."""
    return wsp_compiler.compile(model.eval(), 0, method="dense", **options)


def conv(channels: int = 16, filters: int = 16) -> nn.Conv2d:
    return nn.Conv2d(channels, filters, 3, padding=1)


def assert_like_eager(compiled: CompiledModule, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Values, dtype, device and strides of the model's."""
    with torch.no_grad():
        expected = model(*args, **kwargs)
    y = compiled(*args, **kwargs)
    assert (y.dtype, y.device, y.stride()) == (expected.dtype, expected.device, expected.stride())
    assert relative_error(y, expected) < 1e-5
    return y


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a layer gets kernels for a new kind of input."""
    calls: list[int] = []
    monkeypatch.setattr(layer, "on_build", [lambda: calls.append(1)])
    return calls


# --- inputs and outputs -------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A basic block, whose add and activations are fused."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.conv2, self.norm2 = (
            conv(),
            nn.BatchNorm2d(16),
            conv(),
            nn.BatchNorm2d(16),
        )
        for norm in (self.norm1, self.norm2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            norm.running_mean.normal_()  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += x
        return self.relu(y)


@pytest.mark.parametrize("weights_last", [False, True], ids=["weights", "weights_channels_last"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice", "expand", "transpose"])
def test_memory_format_dtype_and_device_are_eagers(layout: str, weights_last: bool):
    model = Residual().eval()
    if weights_last:
        model = model.to(memory_format=LAST)
    base = torch.randn(3, 16, 7, 10)
    x = {
        "contiguous": base,
        "channels_last": base.contiguous(memory_format=LAST),
        "slice": base[1:, :, ::2, 1:],
        "expand": base[:1].expand(4, 16, 7, 10),
        "transpose": base.transpose(2, 3),
    }[layout]
    before = x.clone()
    assert_like_eager(dense(model), model, x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype: torch.dtype):
    """Measured against float64, no worse than twice eager's own error (and eager's rounding is the floor)."""
    model = Residual().eval()
    x = torch.randn(2, 16, 7, 10).to(dtype)
    with torch.no_grad():
        truth = model.double()(x.double())
        model.to(dtype)
        expected = model(x)
    y = dense(model)(x)
    assert (y.dtype, y.stride()) == (dtype, expected.stride())
    assert relative_error(y, truth) < max(2 * relative_error(expected, truth), 2e-3)


def test_residual_and_activation_are_fused_and_the_plan_holds():
    """With pruning: the truth is composed from the kept weights, batch norm and the residual in float64."""
    model, x = Residual().eval(), torch.randn(2, 16, 7, 10)
    compiled = wsp_compiler.compile(model, 0.5, example_inputs=x)
    assert [layer.activation for layer in compiled.layers()] == ["relu", "relu"]
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        y = pruned_convolution(x, model.conv1, compiled.plan["conv1"].keep, 2)
        y = double.norm1(y).relu()
        y = double.norm2(pruned_convolution(y, model.conv2, compiled.plan["conv2"].keep, 2))
        assert_close(compiled(x), (y + x).relu(), TOLERANCE["fp32", 2])


class Pyramid(nn.Module):
    """A head shared by two sizes, keyword arguments, a dict of tensors and tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(conv(), nn.ReLU(), conv(16, 20))

    def forward(self, large: Tensor, small: Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        a, b = self.head(large), self.head(small)
        return {"large": a * scale, "both": (a.mean(), b)}


def test_shared_heads_keyword_arguments_and_nested_outputs(builds: list[int]):
    model = Pyramid().eval()
    compiled = dense(model)
    for scale in (1.0, 0.5):
        inputs = {"small": torch.randn(2, 16, 5, 6), "large": torch.randn(2, 16, 10, 12), "scale": scale}
        with torch.no_grad():
            expected = model(**inputs)
        y = compiled(**inputs)
        assert list(y) == ["large", "both"]
        assert isinstance(y["both"], tuple)
        assert relative_error(y["large"], expected["large"]) < 1e-5
        assert relative_error(y["both"][0], expected["both"][0]) < 1e-4
        assert relative_error(y["both"][1], expected["both"][1]) < 1e-5
    assert len(builds) == 4
    assert len(list(compiled.layers())) == 4
    assert sorted(compiled.plan) == ["head.0", "head.2"]
    assert sum(line.startswith("head.2 ") for line in compiled.report().splitlines()) == 1


def test_tied_weights_and_a_module_called_twice():
    first, second = conv(), conv()
    second.weight = first.weight
    model = nn.Sequential(first, nn.ReLU(), second, first)
    compiled = dense(model)
    assert sorted(compiled.plan) == ["0", "2"]
    assert_like_eager(compiled, model, torch.randn(2, 16, 6, 6))
    pruned = wsp_compiler.compile(model, 0.5)
    assert torch.equal(pruned.plan["0"].keep, pruned.plan["2"].keep)


def test_an_image_without_a_batch():
    model, x = conv().eval(), torch.randn(16, 7, 9)
    compiled = dense(model)
    y = assert_like_eager(compiled, model, x)
    assert y.shape == (16, 7, 9)
    apart = dense(model, passes=APART)
    assert_close(apart(x), y, 1e-6)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_every_batch_size_uses_the_same_kernels(batch: int, builds: list[int]):
    model = nn.Sequential(conv(), nn.ReLU(), conv())
    compiled = dense(model, example_inputs=torch.randn(2, 16, 6, 6))
    assert len(builds) == 2
    assert_like_eager(compiled, model, torch.randn(batch, 16, 6, 6))
    assert len(builds) == 2


def test_a_new_image_size_builds_once_more(builds: list[int]):
    model = conv()
    compiled = dense(model)
    for height, width, total in ((6, 6, 1), (6, 7, 2), (6, 6, 2), (9, 6, 3), (6, 7, 3)):
        assert_like_eager(compiled, model, torch.randn(1, 16, height, width))
        assert len(builds) == total


# --- contexts -----------------------------------------------------------------------------------------------


def test_inference_mode():
    model, x = Residual().eval(), torch.randn(2, 16, 7, 10)
    compiled = dense(model)
    with torch.inference_mode():
        assert_like_eager(compiled, model, x)
        inside = torch.randn(2, 16, 7, 10)
        assert_like_eager(compiled, model, inside)
    assert not compiled(x).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype):
    model, x = nn.Sequential(conv(), Residual()).eval(), torch.randn(2, 16, 7, 10)
    compiled = dense(model)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        expected, y = model(x), compiled(x)
    assert y.dtype == expected.dtype
    assert relative_error(y, truth) < max(2 * relative_error(expected, truth), 2e-3)
    assert compiled(x).dtype == torch.float32


def test_inputs_that_require_grad_are_refused():
    compiled = dense(conv())
    x = torch.randn(1, 16, 6, 6, requires_grad=True)
    with pytest.raises(errors.InputError, match=r"(?s)requires grad.*wsp_compiler.prune"):
        compiled(x)
    with torch.no_grad():
        y = compiled(x)
    assert not y.requires_grad
    assert torch.equal(y, compiled(x.detach()))


def test_the_users_model_is_untouched():
    model, x = Residual().eval(), torch.randn(2, 16, 7, 10)
    before = snapshot(model)
    compiled = wsp_compiler.compile(model, 0.7, example_inputs=x)
    compiled(x)
    assert_untouched(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.enable_grad():
        model(x).sum().backward()
    assert model.conv1.weight.grad is not None


# --- determinism and threads --------------------------------------------------------------------------------


def test_the_same_input_gives_bitwise_the_same_output_on_any_number_of_threads():
    model = nn.Sequential(conv(16, 40), nn.ReLU(), conv(40, 24))
    for tile in (2, 4):
        compiled = wsp_compiler.compile(model.eval(), 0.6, tile=tile)
        x = torch.randn(3, 16, 13, 20)
        expected = compiled(x)
        assert torch.equal(compiled(x), expected)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(compiled(x), expected)
        torch.set_num_threads(2)
        assert torch.equal(compiled(x[1:2]), expected[1:2])


def test_eight_python_threads_call_one_module_at_once():
    model = nn.Sequential(conv(16, 32), nn.ReLU(), conv(32, 16)).eval()
    compiled = wsp_compiler.compile(model, 0.5)
    inputs = [torch.randn(1 + i % 3, 16, 6 + i % 2, 9) for i in range(8)]  # two sizes, built under contention

    def call(x: Tensor) -> list[Tensor]:
        return [compiled(x) for _ in range(10)]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(call, inputs))
    for x, found in zip(inputs, results, strict=True):
        expected = compiled(x)
        assert all(torch.equal(y, expected) for y in found)
        assert relative_error(expected, compiled.graph_module(x)) < 1e-5


# --- not finite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_visible(value: float, last: bool):
    """Everywhere eager's output is not finite; and tiles that do not see the value are untouched."""
    model = nn.Sequential(conv(), nn.ReLU6(), conv()).eval()
    x = torch.randn(2, 16, 12, 12).contiguous(memory_format=LAST if last else torch.contiguous_format)
    compiled = dense(model[0])
    clean = compiled(x)
    x[1, 3, 5, 6] = value
    with torch.no_grad():
        expected = model[0](x)
    y = compiled(x)
    assert not torch.isfinite(expected[1, :, 4:7, 5:8]).any()
    assert not torch.isfinite(y[~torch.isfinite(expected)]).any()
    assert torch.equal(y[0], clean[0])
    assert torch.equal(y[1, :, 8:], clean[1, :, 8:])
    if value != value:  # an activation does not hide NaN
        with torch.no_grad():
            expected = model(x)
        assert torch.isnan(dense(model)(x)[torch.isnan(expected)]).all()


# --- conversions, copies, training --------------------------------------------------------------------------


def test_conversions_that_change_nothing_pass():
    compiled = dense(nn.Sequential(conv(), nn.Conv2d(16, 4, 1)))
    assert compiled.to("cpu") is compiled
    assert compiled.to(torch.float32) is compiled
    assert compiled.float() is compiled
    assert compiled.cpu() is compiled
    assert compiled.eval() is compiled
    assert compiled.requires_grad_(False) is compiled


CHANGES: dict[str, Callable[[CompiledModule], Any]] = {
    "half": lambda compiled: compiled.half(),
    "bfloat16": lambda compiled: compiled.to(torch.bfloat16),
    "double": lambda compiled: compiled.double(),
    "meta": lambda compiled: compiled.to("meta"),
    "channels_last": lambda compiled: compiled.to(memory_format=LAST),
    "train": lambda compiled: compiled.train(),
    "requires_grad": lambda compiled: compiled.requires_grad_(),
    "load_state_dict": lambda compiled: compiled.load_state_dict(compiled.state_dict()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_conversions_say_what_to_do(change: str):
    model = nn.Sequential(conv(), nn.Conv2d(16, 4, 1)).eval()
    compiled, before, x = dense(model), snapshot(model), torch.randn(1, 16, 6, 6)
    expected = compiled(x)
    with pytest.raises(errors.CompiledModuleError, match=r"\n  fix: .*compile"):
        CHANGES[change](compiled)
    assert_untouched(model, before)
    assert torch.equal(compiled(x), expected)


COPIES: dict[str, Callable[[CompiledModule], CompiledModule]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", COPIES)
def test_copies(way: str):
    model, x = Residual().eval(), torch.randn(2, 16, 7, 10)
    compiled = wsp_compiler.compile(model, 0.5, example_inputs=x)
    expected = compiled(x)
    twin = COPIES[way](compiled)
    assert torch.equal(twin(x), expected)
    assert twin.plan == compiled.plan
    assert twin.report() == compiled.report()
    assert relative_error(twin.graph_module(x), expected) < 1e-5
    other = torch.randn(1, 16, 5, 5)
    assert torch.equal(twin(other), compiled(other))


def test_pickling_says_what_to_save_instead():
    model, x = conv().eval(), torch.randn(2, 16, 7, 10)
    compiled = wsp_compiler.compile(model, 0.5)
    for save in (pickle.dumps, lambda module: torch.save(module, io.BytesIO())):
        with pytest.raises(errors.CompiledModuleError, match=r"state_dict\(\) and compiled.plan.to_json\(\)"):
            save(compiled)
    weights, plan = io.BytesIO(), compiled.plan.to_json()
    torch.save(model.state_dict(), weights)
    weights.seek(0)
    fresh = conv().eval()
    fresh.load_state_dict(torch.load(weights, weights_only=True))
    assert torch.equal(wsp_compiler.compile(fresh, plan=PruningPlan.from_json(plan))(x), compiled(x))


# --- inputs that do not fit ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 17, 6, 6), r"\[N, 16, H, W\], got \[2, 17, 6, 6\].*fix: give it 16 channels"),
        (torch.randn(6, 6), r"got \[6, 6\]"),
        (torch.randn(1, 16, 6, 6).double(), r"torch.float32, got torch.float64.*fix: convert"),
        (torch.randn(1, 16, 6, 6).half(), r"torch.float32, got torch.float16"),
        (torch.ones(1, 16, 6, 6, dtype=torch.int64), r"got torch.int64"),
        (torch.randn(1, 16, 6, 6, device="meta"), r"on cpu, got one on meta"),
        (torch.randn(1, 16, 6, 6).numpy(), r"got ndarray"),
        (torch.randn(1, 16, 2, 6), r"2x6 input is smaller than the 3x3 filter"),
    ],
)
@pytest.mark.parametrize("merged", [True, False], ids=["merged", "apart"])
def test_inputs_that_do_not_fit_are_named(x: Any, message: str, merged: bool):
    model = nn.Sequential(nn.Identity(), nn.Conv2d(16, 16, 3)).eval()
    passes = None if merged else APART
    with pytest.raises(errors.InputError, match=rf"(?s)convolution 1: .*{message}"):
        dense(model, passes=passes)(x)


# --- the stages apart ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("direction", "tile"), [("row", 2), ("column", 4)])
def test_three_separate_kernels_give_what_one_gives(direction: str, tile: int):
    model, x = Residual().eval(), torch.randn(3, 16, 13, 20)
    options: dict[str, Any] = {"direction": direction, "tile": tile, "example_inputs": x}
    merged = wsp_compiler.compile(model, 0.5, **options)
    separate = wsp_compiler.compile(model, 0.5, passes=APART, **options)
    assert len(list(separate.layers())) == 2
    calls = [node for node in separate.executable.graph_module.graph.nodes if node.op == "call_module"]
    assert len([node for node in calls if "kernels" in node.target]) == 6
    assert relative_error(separate(x), merged(x)) < 1e-6
    assert separate(x[:0]).shape == (0, 16, 13, 20)
    text = separate.kernel_source("conv1")
    assert all(f"{stage}_stage" in text for stage in ("input", "gemm", "output"))


@dataclass(frozen=True)
class ScaleV(PassBase):
    """Doubles V between the stages: no kernel pair fits any more, so the stages run in PyTorch."""

    name: str = field(default="scale_v", init=False)

    def run(self, gm: fx.GraphModule, plan: PruningPlan) -> Rewrites:
        for node in list(gm.graph.nodes):
            if is_op(node, SPARSE_BGEMM):
                with gm.graph.inserting_before(node):
                    doubled = gm.graph.call_function(torch.mul, (node.args[0], 2.0))
                node.replace_input_with(node.args[0], doubled)
        return Rewrites(1)


def test_stages_that_a_pass_connected_differently_keep_their_meaning():
    model, x = conv().eval(), torch.randn(2, 16, 7, 9)
    passes = wsp_compiler.pipeline.after("lower_winograd", ScaleV())
    compiled = dense(model, passes=passes)
    assert not list(compiled.layers())
    expected = F.conv2d(x, 2 * model.weight, model.bias, padding=1).detach()
    assert_close(compiled(x), expected, 1e-5)


# --- what it tells ------------------------------------------------------------------------------------------


def test_kernel_source():
    model = nn.Sequential(conv(), nn.ReLU(), nn.Conv2d(16, 16, 1))
    compiled = dense(model)
    with pytest.raises(
        errors.CompiledModuleError, match=r"(?s)before shapes are known.*call the module once"
    ):
        compiled.kernel_source("0")
    compiled(torch.randn(1, 16, 6, 6))
    text = compiled.kernel_source("0")
    assert "define" in text
    assert "winograd_conv2d" in text
    assert "fmul" in text
    with pytest.raises(errors.CompiledModuleError, match=r"(?s)kernel 1x1, not 3x3.*lowered are: 0"):
        compiled.kernel_source("2")
    with pytest.raises(errors.CompiledModuleError, match="no such convolution"):
        compiled.kernel_source("9")


def test_the_report_names_every_convolution_and_counts_its_multiplies():
    model = nn.Sequential(
        conv(16, 32),
        nn.Conv2d(32, 16, 1),
        nn.Conv2d(16, 16, 3, stride=2),
        nn.Conv2d(16, 20, 3),
        nn.Conv2d(20, 8, 3),
    ).eval()
    compiled = wsp_compiler.compile(model, 0.75, tile=2, rules=[PruneRule("3", method="dense", tile=4)])
    compiled(torch.randn(3, 16, 11, 14))
    rows = {line.split()[0]: line for line in compiled.report().splitlines()[2:7]}
    lines = [rows[str(index)].split() for index in range(5)]
    tiles = 3 * 6 * 7  # of 2x2, batch 3
    kept = 8  # of 32 filters, 16 channels, 16 positions
    assert [*lines[0][1:8], *lines[0][9:12]] == [  # without the estimated error
        "32x16", "@", "11x14", "pruned", "BWSP-R", "F(2x2)", "0.2500",
        f"{3 * 11 * 14 * 32 * 16 * 9 / 1e6:.3g}M", f"{tiles * 16 * 32 * 16 / 1e6:.3g}M",
        f"{tiles * 16 * kept * 16 / 1e3:.3g}k",
    ]  # fmt: skip
    assert lines[0][12:] == ["cpu", "?", "?"]
    assert "kernel 1x1, not 3x3" in rows["1"]
    assert "stride 2x2, not 1" in rows["2"]
    assert lines[3][4:7] == ["Winograd", "dense", "F(4x4)"]
    assert "8 channels, fewer than 16" in rows["4"]
    total = 16 * 32 * 16 + 36 * 20 * 16
    left = 16 * kept * 16 + 36 * 20 * 16
    assert (
        f"kept {left} of {total} Winograd weights: achieved pr = {1 - left / total:.4f}" in compiled.report()
    )
    assert compiled.achieved_pr == pytest.approx(1 - left / total)
    assert "2 of 5 convolutions run as Winograd" in compiled.report()
    assert repr(compiled.plan["0"].pr) == "0.75"


def test_the_graph_runs_in_plain_pytorch():
    model, x = Residual().eval(), torch.randn(2, 16, 7, 10)
    compiled = wsp_compiler.compile(model, 0.5, tile=4)
    assert isinstance(compiled.graph_module, fx.GraphModule)
    assert "winograd_conv2d" in compiled.graph_module.code
    assert_close(compiled(x), compiled.graph_module(x), 1e-4)


def test_a_models_own_attribute_named_kernels_is_kept() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernels = nn.ModuleList([nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1)])

        def forward(self, x: Tensor) -> Tensor:
            return self.kernels[1](self.kernels[0](x))

    model, x = Named().eval(), torch.randn(1, 16, 9, 9)
    compiled = wsp_compiler.compile(model, method="dense", example_inputs=(x,))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_an_unbatched_call_with_a_scalar_residual_keeps_its_dtype() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3)
            self.register_buffer("shift", torch.tensor(0.5, dtype=torch.float32))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.shift

    model = Shifted().eval()
    model.conv.bfloat16()
    x = torch.randn(16, 8, 8).bfloat16()
    compiled = wsp_compiler.compile(model, method="dense")
    with torch.no_grad():
        expected = model(x)
    assert compiled(x).dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(compiled(x).float(), expected.float(), rtol=0.1, atol=0.05)
