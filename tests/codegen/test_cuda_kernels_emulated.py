"""The three CUDA kernels of a layer together, executed on the CPU emulator, against float64."""

from __future__ import annotations

import pytest
import torch

from ..cuda_emulator import is_available
from .emulation import TOLERANCE, assert_close, emulate_layer, make_case

pytestmark = pytest.mark.skipif(not is_available(), reason="the emulator needs g++ on x86-64")

CASES = {
    "fp32": dict(),
    "fp32 F4 contiguous residual": dict(tile=4, input_last=False, output_last=False, residual=True),
    "fp16": dict(dtype="float16", precision="fp16"),
    "fp16 F4 contiguous relu6": dict(
        dtype="float16", precision="fp16", tile=4, input_last=False, output_last=False, activation="relu6"
    ),
    "bf16 residual prelu": dict(dtype="bfloat16", precision="bf16", residual=True, activation="prelu"),
    "tf32 F4 relu": dict(precision="tf32", tile=4, activation="relu"),
    "fp32 columns": dict(direction="column", method="wsp", input_last=False),
    "fp16 columns": dict(direction="column", dtype="float16", precision="fp16"),
    "tf32 odd channels, unbalanced columns": dict(
        direction="column", method="wsp", precision="tf32", pr=0.8, channels=37
    ),
    "tf32 unbalanced rows, several filter blocks": dict(method="wsp", pr=0.2, precision="tf32", filters=70),
    "fp16 filters, three channels": dict(
        method="fp", precision="fp16", dtype="float16", filters=100, channels=3, height=13, width=20, batch=1
    ),
    "bf16 dense, one pixel": dict(method="dense", precision="bf16", height=1, width=1, batch=1),
    "fp16 one filter, no padding": dict(
        dtype="float16", precision="fp16", filters=1, padding=(0, 2), channels=40, output_last=False
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name: str) -> None:
    case = make_case(**CASES[name])  # type: ignore[arg-type]
    y = emulate_layer(case)["y"]
    tolerance = TOLERANCE[case.spec.precision, case.spec.tile]
    assert_close(y, case.truth("output"), tolerance)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_order_of_threads_does_not_matter(precision: str) -> None:
    dtype = "float16" if precision == "fp16" else "float32"
    case = make_case(precision=precision, dtype=dtype, input_last=False)
    forward = emulate_layer(case, order="forward")["y"]
    reverse = emulate_layer(case, order="reverse")["y"]
    assert torch.equal(forward, reverse)


def test_a_missing_wait_is_caught() -> None:
    """Negative control: the emulator sees a cp.async whose wait is too weak."""
    case = make_case(dtype="float16", precision="fp16", channels=200)

    def weaken(kind: str, text: str) -> str:
        if kind != "sparse_bgemm":
            return text
        assert "cp.async.wait_group 1;" in text
        return text.replace("cp.async.wait_group 1;", "cp.async.wait_group 3;")

    y = emulate_layer(case, edit=weaken)["y"].double()
    truth = case.truth("output")
    assert not float((y - truth).norm() / truth.norm()) < 2e-3


def test_a_missing_barrier_is_caught() -> None:
    """Negative control: without barriers the staged transpose reads what nobody has written yet."""
    case = make_case(dtype="float16", precision="fp16", input_last=False)

    def remove(kind: str, text: str) -> str:
        return text.replace("tvm_builtin_cuda_cta_sync();", ";") if kind == "input_transform" else text

    truth = case.truth("output")
    for order in ("forward", "reverse"):
        y = emulate_layer(case, edit=remove, order=order)["y"].double()
        if not float((y - truth).norm() / truth.norm()) < 2e-3:
            return
    pytest.fail("a kernel without barriers gave the right result")


def test_float16_stays_finite_for_the_largest_inputs() -> None:
    """F(4x4) grows inputs up to a hundredfold; V is stored scaled."""
    case = make_case(dtype="float16", precision="fp16", tile=4, method="dense", filters=4)
    case.x.fill_(60000.0)
    case.site.weight.mul_(1e-3)
    y = emulate_layer(case)["y"]
    assert torch.isfinite(y).all()
    assert_close(y, case.truth("output"), 1e-2)


@pytest.mark.parametrize("tile", [2, 4])
def test_float16_keeps_its_accuracy_on_small_inputs(tile: int) -> None:
    """The scale that avoids overflow must not push ordinary small activations into subnormals."""
    case = make_case(
        dtype="float16", precision="fp16", tile=tile, method="dense", filters=16, height=6, width=6
    )
    case.x.mul_(1e-3)
    case.site.bias.zero_()
    assert_close(emulate_layer(case)["y"], case.truth("output"), TOLERANCE["fp16", tile])


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_nan_propagates_through_the_activation(precision: str) -> None:
    dtype = {"fp16": "float16", "bf16": "bfloat16"}.get(precision, "float32")
    case = make_case(precision=precision, dtype=dtype, method="dense", activation="relu", height=4, width=4)
    case.x[0, 3, 0, 0] = float("nan")
    y = emulate_layer(case)["y"]
    assert torch.isnan(y[0, :, :2, :2]).all()
    assert torch.isfinite(y[1]).all()
