"""Straight-line Winograd transforms on CUDA registers: packed pairs (float16, bfloat16) or single float32 values.

A *register* is 32 bits wide: two channels or two tiles of a 16-bit type, or one float32. The transforms are Lavin &
Gray's, factored into even and odd parts; the powers of two in them are those of
:mod:`wsp_compiler.codegen.position_scales`.

The functions run while TVMScript is parsed and emit statements; destinations are buffer elements.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from wsp_compiler.codegen.tvm_import import T

Register = Any


def packed_bits(value: float, precision: str) -> int:
    """The 16-bit pattern of ``value``, twice."""
    half = struct.pack("<e", value) if precision == "fp16" else struct.pack("<f", value)[2:]
    return int.from_bytes(half + half, "little")


@dataclass(frozen=True)
class PackedArithmetic:
    """Two float16 or bfloat16 values per register; every operation rounds once."""

    precision: str

    @property
    def dtype(self) -> str:
        """Type of a register in TensorIR."""
        return "uint32"

    @property
    def suffix(self) -> str:
        """Type suffix of the PTX instructions."""
        return "f16x2" if self.precision == "fp16" else "bf16x2"

    def constant(self, value: float) -> Register:
        """``value`` in both halves."""
        return T.uint32(packed_bits(value, self.precision))

    def _emit(self, name: str, d: Register, *operands: Register) -> None:
        T.evaluate(T.ptx[f"{name}.{self.suffix}"](d, *operands))

    def add(self, d: Register, a: Register, b: Register) -> None:
        """d = a + b."""
        self.fma(d, a, 1.0, b) if self.precision == "bf16" else self._emit("add", d, a, b)

    def sub(self, d: Register, a: Register, b: Register) -> None:
        """d = a - b."""
        self.fma(d, b, -1.0, a) if self.precision == "bf16" else self._emit("sub", d, a, b)

    def scale(self, d: Register, a: Register, factor: float) -> None:
        """d = factor * a."""
        if self.precision == "bf16":
            self.fma(d, a, factor, self.constant(-0.0))
        else:
            self._emit("mul", d, a, self.constant(factor))

    def fma(self, d: Register, a: Register, factor: float | Register, b: Register) -> None:
        """d = factor * a + b."""
        times = self.constant(factor) if isinstance(factor, float) else factor
        self._emit("fma.rn", d, a, times, b)

    def activate(self, d: Register, activation: str, slope: Register) -> None:
        """d = activation(d); NaN stays NaN."""
        zero = self.constant(0.0)
        if activation == "prelu":
            negative = T.alloc_local((1,), "uint32")
            self._emit("min.NaN", negative[0], d, zero)
            self._emit("max.NaN", d, d, zero)
            self.fma(d, negative[0], slope, d)
        elif activation in ("relu", "relu6"):
            self._emit("max.NaN", d, d, zero)
            if activation == "relu6":
                self._emit("min.NaN", d, d, self.constant(6.0))


@dataclass(frozen=True)
class FloatArithmetic:
    """One float32 value per register."""

    @property
    def dtype(self) -> str:
        """Type of a register in TensorIR."""
        return "float32"

    def constant(self, value: float) -> Register:
        """``value``."""
        return T.float32(value)

    def _store(self, d: Register, value: Any) -> None:
        T.buffer_store(d.source, value, list(d.indices))

    def add(self, d: Register, a: Register, b: Register) -> None:
        """d = a + b."""
        self._store(d, a + b)

    def sub(self, d: Register, a: Register, b: Register) -> None:
        """d = a - b."""
        self._store(d, a - b)

    def scale(self, d: Register, a: Register, factor: float) -> None:
        """d = factor * a."""
        self._store(d, a * T.float32(factor))

    def fma(self, d: Register, a: Register, factor: float | Register, b: Register) -> None:
        """d = factor * a + b (the compiler contracts it)."""
        times = T.float32(factor) if isinstance(factor, float) else factor
        self._store(d, a * times + b)

    def activate(self, d: Register, activation: str, slope: Register) -> None:
        """d = activation(d); NaN stays NaN."""
        zero, six = T.float32(0.0), T.float32(6.0)
        if activation == "prelu":
            self._store(d, T.Select(d < zero, d * slope, d))
        elif activation in ("relu", "relu6"):
            self._store(d, T.Select(d < zero, zero, d))
            if activation == "relu6":
                self._store(d, T.Select(d > six, six, d))


Arithmetic = PackedArithmetic | FloatArithmetic


def arithmetic_for(precision: str) -> Arithmetic:
    """The arithmetic of the transforms when the matrix products are done in ``precision``."""
    return PackedArithmetic(precision) if precision in ("fp16", "bf16") else FloatArithmetic()


def emit_input_transform(ops: Arithmetic, m: int, d: list[Register], s: float, t: Any) -> None:
    """d = s * B^T d in place for one line of m + 2 registers; ``t`` is scratch of 5 registers."""
    if m == 2:
        x0, x1, x2, x3 = d
        if s == 1.0:
            ops.sub(x0, x0, x2)
            ops.sub(x3, x3, x1)
            ops.add(t[0], x1, x2)
            ops.sub(x2, x2, x1)
        else:  # products with a power of two are exact: each output still rounds once
            ops.scale(t[1], x2, s)
            ops.scale(t[2], x1, -s)
            ops.scale(t[3], x2, -s)
            ops.fma(t[0], x1, s, t[1])
            ops.fma(x2, x1, -s, t[1])
            ops.fma(x0, x0, s, t[3])
            ops.fma(x3, x3, s, t[2])
        T.buffer_store(x1.source, t[0], list(x1.indices))
        return
    x0, x1, x2, x3, x4, x5 = d
    fourth, third, fifth = x4, x3, x5
    if s != 1.0:
        ops.scale(t[3], x4, s)
        ops.scale(t[4], x3, s)
        ops.scale(x5, x5, s)
        fourth, third = t[3], t[4]
    ops.fma(t[0], x2, -4.0 * s, fourth)  # even part of rows 1 and 2
    ops.fma(t[1], x1, -4.0 * s, third)  # odd part
    ops.fma(t[2], x2, -5.0 * s, fourth)
    ops.fma(x0, x0, 4.0 * s, t[2])
    ops.fma(t[2], x3, -5.0 * s, fifth)
    ops.fma(x5, x1, 4.0 * s, t[2])
    ops.fma(t[2], x2, -1.0 * s, fourth)  # even part of rows 3 and 4
    ops.fma(x4, x1, -1.0 * s, third)  # half of the odd part
    ops.fma(x3, x4, 2.0, t[2])
    ops.fma(x4, x4, -2.0, t[2])
    ops.add(x1, t[0], t[1])
    ops.sub(x2, t[0], t[1])


def emit_output_transform(ops: Arithmetic, m: int, d: list[Register], o: list[Register], t: Any) -> None:
    """o[m] = OUTPUT_SCALE A^T D^-1 d[m + 2]; ``t`` is scratch of 4 registers, ``o`` may alias the front of d."""
    if m == 2:
        m0, m1, m2, m3 = d
        ops.add(t[0], m1, m2)
        ops.sub(t[1], m1, m2)
        ops.add(o[0], m0, t[0])
        ops.add(o[1], t[1], m3)
        return
    m0, m1, m2, m3, m4, m5 = d
    ops.add(t[0], m1, m2)
    ops.sub(t[1], m1, m2)
    ops.add(t[2], m3, m4)
    ops.sub(t[3], m3, m4)
    ops.add(o[0], m0, t[2])
    ops.fma(o[0], o[0], 0.5, t[0])
    ops.fma(m5, m5, 2.0, t[1])
    ops.fma(o[3], t[3], 4.0, m5)
    ops.add(o[1], t[1], t[3])
    ops.fma(o[2], t[2], 2.0, t[0])
