"""The CPU kernels against float64: methods, tiles, precisions, ragged shapes, layouts, dtypes, epilogues."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import wsp_compiler
from wsp_compiler import PruneRule
from wsp_compiler.codegen import build
from wsp_compiler.codegen.build import lower
from wsp_compiler.codegen.cpu_configs import default_config
from wsp_compiler.codegen.cpu_winograd import ALL_STAGES, make_cpu_kernel
from wsp_compiler.codegen.spec import CpuConfig, KernelSpec
from wsp_compiler.codegen.targets import cpu_target, usable_lanes
from wsp_compiler.codegen.tvm_import import tvm
from wsp_compiler.runtime import CompiledModule

from ..reference import TOLERANCE, assert_close, pruned_convolution, relative_error

METHODS = [
    ("dense", "row"),
    ("fp", "row"),
    ("wsp", "row"),
    ("wsp", "column"),
    ("bwsp", "row"),
    ("bwsp", "column"),
]
RAGGED = [  # n, c, height, width, padding
    (24, 20, 7, 7, 1),
    (33, 17, 13, 20, (0, 2)),
    (16, 3, 9, 6, "same"),
    (1, 16, 5, 4, 1),
    (16, 16, 1, 1, 1),
]
EVERY = (PruneRule(".*"),)
"""A rule that names all layers, also those with few channels."""


def compile_all(model: nn.Module, pr: float, **options: object) -> CompiledModule:
    return wsp_compiler.compile(model, pr, rules=EVERY, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize(("method", "direction"), METHODS)
def test_ragged_shapes_equal_the_kept_weights_in_float64(method: str, direction: str, tile: int):
    for n, c, height, width, padding in RAGGED:
        conv = nn.Conv2d(c, n, 3, padding=padding, bias=n != 24).eval()  # type: ignore[arg-type]
        compiled = compile_all(conv, 0.6, method=method, direction=direction, tile=tile)
        site = compiled.plan[""]
        assert (site.kept_fraction == 1) == (method == "dense" or site.keep.all().item())
        for batch in (3, 1, 0):
            x = torch.randn(batch, c, height, width)
            expected = pruned_convolution(x, conv, site.keep, tile)
            assert_close(compiled(x), expected, TOLERANCE["fp32", tile])


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize(("method", "direction"), [("wsp", "row"), ("bwsp", "column"), ("dense", "row")])
def test_bfloat16_products_are_close_and_really_rounded(method: str, direction: str, tile: int):
    n, c, height, width, padding = RAGGED[1]
    conv = nn.Conv2d(c, n, 3, padding=padding).eval()  # type: ignore[arg-type]
    compiled = compile_all(conv, 0.5, method=method, direction=direction, tile=tile, precision="bf16")
    x = torch.randn(2, c, height, width)
    expected = pruned_convolution(x, conv, compiled.plan[""].keep, tile)
    y = compiled(x)
    assert y.dtype == torch.float32
    assert_close(y, expected, TOLERANCE["bf16", tile])
    assert relative_error(y, expected) > TOLERANCE["fp32", tile]


@pytest.mark.parametrize("pr", [0.0, 0.95])
def test_any_share_of_kept_weights(pr: float):
    conv = nn.Conv2d(20, 40, 3, padding=1).eval()
    x = torch.randn(2, 20, 11, 8)
    for method, direction in (("fp", "row"), ("bwsp", "column")):
        compiled = compile_all(conv, pr, method=method, direction=direction)
        expected = pruned_convolution(x, conv, compiled.plan[""].keep, 2)
        assert_close(compiled(x), expected, TOLERANCE["fp32", 2])
        if pr == 0:
            assert relative_error(compiled(x), conv(x)) < 1e-5


LAYOUTS: dict[str, Callable[[int, int, int, int], Tensor]] = {
    "contiguous": lambda n, c, h, w: torch.randn(n, c, h, w),
    "channels_last": lambda n, c, h, w: torch.randn(n, c, h, w).contiguous(memory_format=torch.channels_last),
    "slice": lambda n, c, h, w: torch.randn(n + 1, c + 2, h + 2, w + 3)[1:, 1:-1, 2:, 1:-2],
    "strided": lambda n, c, h, w: torch.randn(n, c, 2 * h, 3 * w)[:, :, ::2, ::3],
    "expand": lambda n, c, h, w: torch.randn(1, c, h, 1).expand(n, c, h, w),
    "transpose": lambda n, c, h, w: torch.randn(n, c, w, h).transpose(2, 3),
    "channels_last_slice": lambda n, c, h, w: torch.randn(n, h, w, c + 5).permute(0, 3, 1, 2)[:, 3:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_layout_are_read_in_place(layout: str):
    conv = nn.Conv2d(19, 21, 3, padding=1).eval()
    compiled = compile_all(conv, 0.5)
    x = LAYOUTS[layout](3, 19, 6, 9)
    before = x.clone()
    expected = pruned_convolution(x, conv, compiled.plan[""].keep, 2)
    assert_close(compiled(x), expected, TOLERANCE["fp32", 2])
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("layout", "tile"), [("contiguous", 4), ("channels_last", 2)])
def test_half_precision_models_keep_their_dtype(dtype: torch.dtype, layout: str, tile: int):
    """The result is rounded once; float16 is computed in fp32 on the CPU, bfloat16 in bf16."""
    conv = nn.Conv2d(19, 21, 3, padding=1).eval().to(dtype)
    x = LAYOUTS[layout](2, 19, 6, 9).to(dtype)
    compiled = compile_all(conv, 0.5, tile=tile)
    y = compiled(x)
    assert y.dtype == dtype
    expected = pruned_convolution(x, conv, compiled.plan[""].keep, tile)
    assert_close(y, expected, 1e-3 if dtype == torch.float16 else TOLERANCE["bf16", tile])


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "prelu": lambda: nn.PReLU(21),
    "prelu_shared": nn.PReLU,
}


class Epilogue(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(19, 21, 3, padding=1)
        self.same = nn.Identity()  # what a module returns is a tensor: a placeholder could be a number
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.activation(self.conv(x) + self.same(residual))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_epilogues_are_fused_and_right(name: str, last: bool):
    model = Epilogue(ACTIVATIONS[name]()).eval()
    if name == "prelu":
        nn.init.uniform_(model.activation.weight, -1.0, 1.0)  # type: ignore[arg-type]
    layout = torch.channels_last if last else torch.contiguous_format
    x = (4 * torch.randn(2, 19, 6, 9)).contiguous(memory_format=layout)
    residuals = [  # the last two are added by PyTorch, outside the kernel
        torch.randn(2, 21, 6, 9),
        torch.randn(2, 21, 6, 9).contiguous(memory_format=torch.channels_last),
        torch.randn(1, 21, 6, 9).expand(2, 21, 6, 9),
        torch.randn(21, 1, 1),
        torch.randn(2, 21, 6, 9).double(),
    ]
    compiled = compile_all(model, 0.4, example_inputs=(x, residuals[0]))
    assert [layer.activation != "none" for layer in compiled.layers()] == [True]
    for residual in residuals:
        plain = pruned_convolution(x, model.conv, compiled.plan["conv"].keep, 2)
        with torch.no_grad():
            expected = model.activation.double()(plain + residual.double())
            model.activation.float()
        y = compiled(x, residual)
        assert y.dtype == residual.dtype
        assert_close(y, expected, TOLERANCE["fp32", 2])


def test_the_avx2_code_runs_and_is_right():
    conv = nn.Conv2d(19, 21, 3, padding=1).eval()
    x = torch.randn(2, 19, 6, 9)
    for tile in (2, 4):
        compiled = compile_all(conv, 0.5, tile=tile, target={"kind": "llvm", "mcpu": "x86-64-v3"})
        expected = pruned_convolution(x, conv, compiled.plan[""].keep, tile)
        assert_close(compiled(x), expected, TOLERANCE["fp32", tile])
        (layer,) = compiled.layers()
        (cpu,) = layer._state["layers"].values()
        code = lower(make_cpu_kernel(cpu.spec, cpu.config), "probe", cpu.target).host.inspect_source("asm")
        assert "%ymm" in code
        assert "%zmm" not in code
        assert "vfmadd" in code


@pytest.mark.parametrize(("cpu", "lanes"), [("x86-64", 4), ("x86-64-v3", 8), ("x86-64-v4", 16)])
def test_ragged_shapes_on_every_instruction_set(cpu: str, lanes: int):
    """What this machine's own CPU model adds to them is run by all other tests."""
    if platform.machine() not in ("x86_64", "AMD64") or lanes > usable_lanes():
        pytest.skip("this machine does not run them")
    for (n, c, height, width, padding), tile in zip(RAGGED, (2, 4, 2, 4, 2), strict=True):
        conv = nn.Conv2d(c, n, 3, padding=padding).eval()  # type: ignore[arg-type]
        compiled = compile_all(conv, 0.6, tile=tile, target={"kind": "llvm", "mcpu": cpu})
        x = torch.randn(2, c, height, width)
        x = x.contiguous(memory_format=torch.channels_last) if n % 2 else x
        expected = pruned_convolution(x, conv, compiled.plan[""].keep, tile)
        assert_close(compiled(x), expected, TOLERANCE["fp32", tile])
        (layer,) = compiled.layers()
        assert layer.target.lanes == lanes


@pytest.mark.parametrize("stages", [ALL_STAGES, *((stage,) for stage in ALL_STAGES)])
def test_accumulators_stay_in_registers(stages: tuple[str, ...]):
    """No heap workspace inside the kernel: scratch comes from the caller."""
    spec = KernelSpec(
        filters=32,
        channels=32,
        height=8,
        width=8,
        padding=(1, 1),
        tile=4,
        dtype="float32",
        precision="fp32",
        input_channels_last=False,
        output_channels_last=False,
        columns_pruned=False,
        rows_pruned=True,
        residual=False,
        activation="relu",
    )
    target = cpu_target()
    config = CpuConfig(lanes=target.lanes, rows=4, vectors=2)
    lowered = lower(make_cpu_kernel(spec, config, stages), "probe", target)
    assert "TVMBackendAllocWorkspace" not in lowered.host.inspect_source("ll")


@pytest.mark.parametrize("last", [False, True])
def test_neon_code_is_vectorised(last: bool, monkeypatch: pytest.MonkeyPatch):
    """Text only: this machine need not run it."""
    if "aarch64" not in [str(name) for name in tvm.target.codegen.llvm_get_targets()]:
        pytest.skip("this LLVM does not generate AArch64 code")
    neon = tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"})
    monkeypatch.setattr(build, "tvm_target", lambda target: neon)
    spec = KernelSpec(
        filters=40, channels=24, height=14, width=14, padding=(1, 1), tile=2, dtype="float32", precision="fp32",
        input_channels_last=last, output_channels_last=last, columns_pruned=False, rows_pruned=True,
        residual=True, activation="relu",
    )  # fmt: skip
    config = default_config(spec, 4, [8] * 16)
    assert config.rows * config.vectors + config.vectors < 32
    text = lower(make_cpu_kernel(spec, config), "probe", cpu_target()).host.inspect_source("asm")
    multiplies = re.findall(r"fmla\s+v\d+\.4s, v\d+\.4s, v\d+\.(?:4s|s\[\d\])", text)
    assert len(multiplies) >= config.rows * config.vectors
    assert "TVMBackendAllocWorkspace" not in text
