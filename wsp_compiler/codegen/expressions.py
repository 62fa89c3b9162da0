"""Straight-line TensorIR for small constant matrices, dtype conversion and the epilogue.

These helpers run while TVMScript is parsed: they build expressions and emit stores.
"""

from __future__ import annotations

from typing import Any

from wsp_compiler.codegen.tvm_import import T
from wsp_compiler.winograd import Matrix

Expression = Any


def splat(value: float, lanes: int) -> Expression:
    """The float32 constant ``value`` in every lane."""
    return T.float32(value) if lanes == 1 else T.Broadcast(T.float32(value), lanes)


def linear_combination(coefficients: tuple[float, ...], terms: list[Expression], lanes: int) -> Expression:
    """sum_i coefficients[i] * terms[i] without multiplications by 0, 1 and -1."""
    result: Expression = None
    for coefficient, term in zip(coefficients, terms, strict=True):
        if coefficient == 0:
            continue
        scaled = term if abs(coefficient) == 1 else term * splat(abs(coefficient), lanes)
        if result is None:
            result = scaled if coefficient > 0 else splat(0.0, lanes) - scaled
        else:
            result = result + scaled if coefficient > 0 else result - scaled
    return splat(0.0, lanes) if result is None else result


def emit_transform(matrix: Matrix, source: Any, scratch: Any, result: Any, lanes: int = 1) -> None:
    """Emit result = matrix @ source @ matrix^T for flat register buffers.

    ``source`` holds [p, p], ``scratch`` at least [q, p], ``result`` [q, q]; matrix is [q, p].
    """
    q, p = len(matrix), len(matrix[0])
    for i in range(q):
        for j in range(p):
            column = [source[k * p + j] for k in range(p)]
            T.buffer_store(scratch, linear_combination(matrix[i], column, lanes), [i * p + j])
    for i in range(q):
        for j in range(q):
            row = [scratch[i * p + k] for k in range(p)]
            T.buffer_store(result, linear_combination(matrix[j], row, lanes), [i * q + j])


def vector(dtype: str, lanes: int) -> str:
    """Name of a vector type: vector("float32", 8) is "float32x8"."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def _splat_uint(value: int, lanes: int) -> Expression:
    return T.uint32(value) if lanes == 1 else T.Broadcast(T.uint32(value), lanes)


def round_to_bfloat16(value: Expression, lanes: int) -> Expression:
    """The upper 16 bits (in a uint32) of float32 ``value`` rounded to nearest even; NaN stays NaN."""
    bits = T.reinterpret(vector("uint32", lanes), value)
    odd = (bits >> _splat_uint(16, lanes)) & _splat_uint(1, lanes)
    rounded = (bits + _splat_uint(0x7FFF, lanes) + odd) >> _splat_uint(16, lanes)
    # Not value != value, which TVM simplifies to false.
    nan = (bits & _splat_uint(0x7FFFFFFF, lanes)) > _splat_uint(0x7F800000, lanes)
    return T.Select(nan, _splat_uint(0x7FC0, lanes), rounded)


def bfloat16_values(value: Expression, lanes: int) -> Expression:
    """float32 ``value`` rounded to a bfloat16 number, as float32."""
    return T.reinterpret(vector("float32", lanes), round_to_bfloat16(value, lanes) << _splat_uint(16, lanes))


def tf32_values(value: Expression, lanes: int = 1) -> Expression:
    """float32 ``value`` rounded to nearest even at tf32's 10 mantissa bits; Inf and NaN stay as they are."""
    bits = T.reinterpret(vector("uint32", lanes), value)
    odd = (bits >> _splat_uint(13, lanes)) & _splat_uint(1, lanes)
    rounded = (bits + _splat_uint(0xFFF, lanes) + odd) & _splat_uint(0xFFFFE000, lanes)
    finite = (bits & _splat_uint(0x7F800000, lanes)) < _splat_uint(0x7F800000, lanes)
    return T.reinterpret(vector("float32", lanes), T.Select(finite, rounded, bits))


STORAGE = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}
"""Element type of the buffer that holds each dtype; bfloat16 travels as its bits."""


def to_float(value: Expression, dtype: str, lanes: int = 1) -> Expression:
    """A loaded element (or vector) of ``dtype`` as float32."""
    if dtype == "float16":
        return T.cast(value, vector("float32", lanes))
    if dtype == "bfloat16":
        wide = T.cast(value, vector("uint32", lanes)) << _splat_uint(16, lanes)
        return T.reinterpret(vector("float32", lanes), wide)
    return value


def from_float(value: Expression, dtype: str, lanes: int = 1) -> Expression:
    """float32 as an element (or vector) to store as ``dtype``."""
    if dtype == "float16":
        return T.cast(value, vector("float16", lanes))
    if dtype == "bfloat16":
        return T.cast(round_to_bfloat16(value, lanes), vector("uint16", lanes))
    return value


def activate(value: Expression, activation: str, slope: Expression, lanes: int = 1) -> Expression:
    """The activation of ops.ACTIVATIONS; comparisons are written so that NaN passes through."""
    zero = splat(0.0, lanes)
    if activation == "relu":
        return T.Select(value < zero, zero, value)
    if activation == "relu6":
        six = splat(6.0, lanes)
        return T.Select(value < zero, zero, T.Select(value > six, six, value))
    if activation == "prelu":
        return T.Select(value < zero, value * slope, value)
    return value
