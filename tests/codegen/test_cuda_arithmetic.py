"""The emitted transforms and operations, run on Python numbers instead of registers."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch
from torch import Tensor

from wsp_compiler.codegen import cuda_arithmetic
from wsp_compiler.codegen.cuda_arithmetic import (
    Arithmetic,
    FloatArithmetic,
    PackedArithmetic,
    arithmetic_for,
    emit_input_transform,
    emit_output_transform,
    packed_bits,
)
from wsp_compiler.codegen.position_scales import OUTPUT_SCALE, POSITION_SCALES, input_scale
from wsp_compiler.winograd import transform


class Buffer:
    """Registers."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def __getitem__(self, index: int) -> Place:
        assert 0 <= index < len(self.values)
        return Place(self, index)


class Place:
    """An element of a buffer: its present value where it is read, a place where it is written."""

    def __init__(self, source: Buffer, index: int) -> None:
        self.source, self.indices = source, (index,)

    def __float__(self) -> float:
        return self.source.values[self.indices[0]]

    def __add__(self, other: Any) -> float:
        return float(self) + float(other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> float:
        return float(self) - float(other)

    def __mul__(self, other: Any) -> float:
        return float(self) * float(other)

    def __lt__(self, other: Any) -> bool:
        return float(self) < float(other)

    def __gt__(self, other: Any) -> bool:
        return float(self) > float(other)


def _nan(a: float, b: float, choose: Any) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else choose(a, b)


class Instructions:
    """The part of TVMScript that the functions use; PTX on one number instead of two halves."""

    def __init__(self) -> None:
        self.used: set[str] = set()
        self.ptx = self

    float32 = float

    @staticmethod
    def uint32(bits: int) -> float:
        assert bits >> 16 == bits & 0xFFFF
        return Instructions.decode(bits)

    decode: Any = None

    @staticmethod
    def evaluate(value: None) -> None:
        assert value is None

    @staticmethod
    def buffer_store(source: Buffer, value: Any, indices: list[int]) -> None:
        source.values[indices[0]] = float(value)

    @staticmethod
    def alloc_local(shape: tuple[int], dtype: str) -> Buffer:
        return Buffer([math.nan] * shape[0])

    @staticmethod
    def Select(condition: bool, yes: Any, no: Any) -> float:
        return float(yes if condition else no)

    def __getitem__(self, name: str) -> Any:
        self.used.add(name)
        operation = name.rpartition(".")[0]

        def run(d: Place, *operands: Any) -> None:
            v = [float(operand) for operand in operands]
            results = {
                "add": lambda: v[0] + v[1],
                "sub": lambda: v[0] - v[1],
                "mul": lambda: v[0] * v[1],
                "fma.rn": lambda: v[0] * v[1] + v[2],
                "max.NaN": lambda: _nan(v[0], v[1], max),
                "min.NaN": lambda: _nan(v[0], v[1], min),
            }
            self.buffer_store(d.source, results[operation](), list(d.indices))

        return run


ARITHMETICS: list[Arithmetic] = [FloatArithmetic(), PackedArithmetic("fp16"), PackedArithmetic("bf16")]


@pytest.fixture(params=ARITHMETICS, ids=["float32", "fp16", "bf16"])
def ops(request: pytest.FixtureRequest) -> Arithmetic:
    return request.param


@pytest.fixture(autouse=True)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Instructions:
    made = Instructions()
    ops = request.getfixturevalue("ops") if "ops" in request.fixturenames else None
    half = isinstance(ops, PackedArithmetic) and ops.precision == "fp16"

    def decode(bits: int) -> float:
        low = (bits & 0xFFFF).to_bytes(2, "little")
        return struct.unpack("<e", low)[0] if half else struct.unpack("<f", b"\0\0" + low)[0]

    monkeypatch.setattr(Instructions, "decode", staticmethod(decode))
    monkeypatch.setattr(cuda_arithmetic, "T", made)
    return made


def run_input(ops: Arithmetic, m: int, scale: float) -> Tensor:
    """The matrix that the emitted input transform multiplies a line with."""
    columns: list[list[float]] = []
    for unit in torch.eye(m + 2).tolist():
        d = Buffer(unit)
        emit_input_transform(ops, m, [d[i] for i in range(m + 2)], scale, Buffer([math.nan] * 5))
        columns.append(d.values)
    return torch.tensor(columns, dtype=torch.float64).T


def run_output(ops: Arithmetic, m: int, aliased: bool) -> Tensor:
    columns: list[list[float]] = []
    for unit in torch.eye(m + 2).tolist():
        d = Buffer(unit)
        o = d if aliased else Buffer([math.nan] * m)
        emit_output_transform(
            ops, m, [d[i] for i in range(m + 2)], [o[i] for i in range(m)], Buffer([math.nan] * 4)
        )
        columns.append(o.values[:m])
    return torch.tensor(columns, dtype=torch.float64).T


@pytest.mark.parametrize("m", [2, 4])
def test_input_transform_is_a_multiple_of_winograds(ops: Arithmetic, m: int) -> None:
    BT = transform(m).tensor("BT", torch.float64)
    for scale in (1.0, input_scale(m, "fp16"), 0.5):
        assert torch.equal(run_input(ops, m, scale), scale * BT)


@pytest.mark.parametrize("aliased", [False, True])
@pytest.mark.parametrize("m", [2, 4])
def test_output_transform_takes_the_scales_back(ops: Arithmetic, m: int, aliased: bool) -> None:
    AT = transform(m).tensor("AT", torch.float64)
    D = torch.tensor(POSITION_SCALES[m], dtype=torch.float64)
    assert torch.equal(run_output(ops, m, aliased), OUTPUT_SCALE[m] * AT / D)


@pytest.mark.parametrize("m", [2, 4])
def test_a_convolution_in_one_dimension(ops: Arithmetic, m: int) -> None:
    """Both emitted transforms around D G g: the sums of products of three neighbours."""
    D = torch.tensor(POSITION_SCALES[m], dtype=torch.float64)
    g, d = torch.randn(3, dtype=torch.float64), torch.randn(m + 2, dtype=torch.float64)
    U, scale = D * (transform(m).tensor("G", torch.float64) @ g), input_scale(m, "fp16")
    y = run_output(ops, m, True) @ (U * (run_input(ops, m, scale) @ d)) / (OUTPUT_SCALE[m] * scale)
    torch.testing.assert_close(y, d.unfold(0, 3, 1) @ g)


VALUES = [-math.inf, -7.5, -0.25, 0.0, 3.0, 6.5, math.inf, math.nan]


@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "prelu"])
def test_activations(ops: Arithmetic, activation: str) -> None:
    results: list[float] = []
    for value in VALUES:
        d = Buffer([value])
        ops.activate(d[0], activation, 0.25)
        results += d.values
    functions = {
        "none": lambda x: x,
        "relu": torch.relu,
        "relu6": torch.nn.functional.relu6,
        "prelu": lambda x: torch.nn.functional.prelu(x, torch.tensor([0.25])),
    }
    expected = functions[activation](torch.tensor(VALUES))
    torch.testing.assert_close(torch.tensor(results), expected, rtol=0, atol=0, equal_nan=True)


def test_bfloat16_uses_what_compute_capability_8_has(instructions: Instructions) -> None:
    """Addition and multiplication of bfloat16 pairs came with 9.0; fma, min and max with 8.0."""
    ops = PackedArithmetic("bf16")
    for m in (2, 4):
        run_input(ops, m, 1.0)
        run_input(ops, m, 0.5)
        run_output(ops, m, True)
    for activation in ("relu6", "prelu"):
        ops.activate(Buffer([1.0])[0], activation, 0.5)
    assert instructions.used == {"fma.rn.bf16x2", "max.NaN.bf16x2", "min.NaN.bf16x2"}


def test_packed_constants() -> None:
    assert packed_bits(1.0, "fp16") == 0x3C003C00
    assert packed_bits(-0.0, "bf16") == 0x80008000
    assert packed_bits(6.0, "bf16") == 0x40C040C0


def test_which_arithmetic_goes_with_a_precision() -> None:
    assert arithmetic_for("fp16") == PackedArithmetic("fp16")
    assert arithmetic_for("bf16") == PackedArithmetic("bf16")
    assert arithmetic_for("tf32") == arithmetic_for("fp32") == FloatArithmetic()
    assert arithmetic_for("bf16").dtype == "uint32"
    assert arithmetic_for("fp32").dtype == "float32"
