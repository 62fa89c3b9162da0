"""Expression builders, executed on the CPU: scalar and vector, against PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from wsp_compiler.codegen.build import build
from wsp_compiler.codegen.expressions import (
    STORAGE,
    activate,
    bfloat16_values,
    emit_transform,
    from_float,
    linear_combination,
    splat,
    tf32_values,
    to_float,
    vector,
)
from wsp_compiler.codegen.targets import cpu_target
from wsp_compiler.codegen.tvm_import import T
from wsp_compiler.winograd import transform

LANES = [1, 8]
HALF = [
    pytest.param("float16", torch.float16, id="float16"),
    pytest.param("bfloat16", torch.bfloat16, id="bfloat16"),
]


def evaluate(
    expression: Callable[[Any], Any], x: Tensor, lanes: int, source: str = "float32", result: str = "float32"
) -> Tensor:
    """``expression`` applied to every element of x (a multiple of 8), ``lanes`` at a time."""
    count = x.numel() // lanes
    stored, loaded = STORAGE[result], STORAGE[source]

    @T.prim_func
    def apply(
        a: T.Buffer((x.numel(),), loaded, align=4),  # type: ignore[valid-type]
        b: T.Buffer((x.numel(),), stored, align=4),  # type: ignore[valid-type]
    ):
        for i in T.serial(count):
            b.vstore([i * lanes], expression(a.vload([i * lanes], dtype=vector(loaded, lanes))))

    dtypes = {"float32": torch.float32, "float16": torch.float16, "uint16": torch.uint16}
    y = torch.empty(x.shape, dtype=dtypes[stored])
    build(lambda text: apply, "apply", cpu_target(), (apply.script(),)).function(x.contiguous(), y)
    return y


def numbers() -> Tensor:
    """Ordinary numbers, halfway cases, subnormals, signed zeros, infinities and kinds of NaN: a multiple of 8."""
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 3.3e38, 65520.0, -65519.0, 6.0])
    patterns = torch.tensor(
        [0x7FFFFFFF, -1, 0x7F800001, 0x3F808000, 0x3F818000, 0x3F801000], dtype=torch.int32
    )
    return torch.cat([special, patterns.view(torch.float32), 3 * torch.randn(240)])


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit by bit, apart from what kind of NaN."""
    a, b = a.contiguous(), b.contiguous()
    nan = torch.isnan(a)
    bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return bool((nan == torch.isnan(b)).all()) and torch.equal(a[~nan].view(bits), b[~nan].view(bits))


@pytest.mark.parametrize("lanes", LANES)
def test_rounding_to_bfloat16_is_pytorchs(lanes: int):
    x = numbers()
    y = evaluate(lambda value: bfloat16_values(value, lanes), x, lanes)
    assert same(y, x.bfloat16().float())


@pytest.mark.parametrize("lanes", LANES)
def test_rounding_to_tf32_keeps_ten_bits_to_nearest_even(lanes: int):
    x = numbers()
    y = evaluate(lambda value: tf32_values(value, lanes), x, lanes)
    finite = torch.isfinite(x)
    assert same(y[~finite], x[~finite])
    y, x = y[finite], x[finite]
    assert bool((y.view(torch.int32) & 0x1FFF == 0).all())
    _, exponent = torch.frexp(x.double())
    step = torch.ldexp(torch.ones_like(x, dtype=torch.float64), exponent - 11)
    normal = (x.abs() >= 2.0**-126) & torch.isfinite(y)
    even = torch.round(x.double() / step) * step  # torch rounds half to even
    assert torch.equal(y[normal].double(), even[normal])


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize(("name", "dtype"), HALF)
def test_loads_and_stores_of_half_types(name: str, dtype: torch.dtype, lanes: int):
    x = numbers()
    stored = evaluate(lambda value: from_float(value, name, lanes), x, lanes, result=name)
    assert same(stored.view(dtype), x.to(dtype))
    halves = x.to(dtype)
    held = halves.view(torch.uint16) if dtype == torch.bfloat16 else halves
    loaded = evaluate(lambda value: to_float(value, name, lanes), held, lanes, source=name)
    assert same(loaded, halves.float())


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "prelu": lambda x: F.leaky_relu(x, 0.25),
}


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_pass_nan_on(name: str, lanes: int):
    x = numbers()
    y = evaluate(lambda value: activate(value, name, splat(0.25, lanes), lanes), x, lanes)
    expected = ACTIVATIONS[name](x)
    assert torch.equal(torch.isnan(y), torch.isnan(x))
    assert torch.equal(y[~torch.isnan(x)], expected[~torch.isnan(x)])


def test_linear_combinations_multiply_only_where_they_must():
    a, b = T.Var("a", "float32"), T.Var("b", "float32")
    texts = {
        coefficients: str(linear_combination(coefficients, [a, b], 1))
        for coefficients in ((1.0, 1.0), (1.0, -1.0), (0.0, 1.0), (-1.0, 0.0), (4.0, -5.0), (0.0, 0.0))
    }
    assert ["*" in text for text in texts.values()] == [False, False, False, False, True, False]
    assert "b" in texts[0.0, 1.0]
    assert "a" not in texts[0.0, 1.0]
    assert not {"a", "b"} & set(texts[0.0, 0.0].replace("T.float32", ""))


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("name", ["BT", "AT"])
def test_transforms_equal_matrix_products(name: str, tile: int):
    winograd = transform(tile)
    matrix = getattr(winograd, name)
    p, q = winograd.input_side, len(matrix)
    registers = {"disable_lower_builtin": True}

    @T.prim_func
    def apply(
        a: T.Buffer((p * p,), "float32", align=4),  # type: ignore[valid-type]
        b: T.Buffer((q * q,), "float32", align=4),  # type: ignore[valid-type]
    ):
        d = T.alloc_buffer((p * p,), "float32", scope="local", annotations=registers)
        t = T.alloc_buffer((p * p,), "float32", scope="local", annotations=registers)
        o = T.alloc_buffer((p * p,), "float32", scope="local", annotations=registers)
        for i in T.unroll(p * p):
            d[i] = a[i]
        emit_transform(matrix, d, t, o)
        for i in T.unroll(q * q):
            b[i] = o[i]

    x, y = torch.randn(p, p), torch.empty(q * q)
    build(lambda text: apply, "apply", cpu_target(), (apply.script(),)).function(x.reshape(-1), y)
    M = winograd.tensor(name, torch.float64)
    assert torch.allclose(y.view(q, q).double(), M @ x.double() @ M.T, rtol=1e-4, atol=1e-4)
