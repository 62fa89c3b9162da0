"""bfloat16 dot products of AVX512_BF16: two channels in one 32-bit word, multiplied and summed in float32.

TVM's pipeline turns every bfloat16 type into float32, so that its own call of ``llvm.x86.avx512bf16.*`` does not
pass LLVM's verifier. The two instructions are therefore functions of LLVM text over float32 vectors, linked into the
kernel and inlined; weights are still read by the multiply itself (``vdpbf16ps (mem){1to16}``).
"""

from __future__ import annotations

from typing import Any

from wsp_compiler.codegen.cpu_emit import B, Expression, hold
from wsp_compiler.codegen.tvm_import import T

FEATURE = "avx512bf16"
"""LLVM's name of the instructions."""
LANES = 16
"""The vectors that the kernels use them with; half vectors of products exist too."""

_DOT = """
declare <{lanes} x float> @llvm.x86.avx512bf16.dpbf16ps.{bits}(<{lanes} x float>, <{pairs} x bfloat>, <{pairs} x bfloat>)
define weak_odr hidden <{lanes} x float> @wsp_dot{lanes}(<{lanes} x float> %sum, <{lanes} x float> %a, <{lanes} x float> %b) alwaysinline {{
  %x = bitcast <{lanes} x float> %a to <{pairs} x bfloat>
  %y = bitcast <{lanes} x float> %b to <{pairs} x bfloat>
  %r = call <{lanes} x float> @llvm.x86.avx512bf16.dpbf16ps.{bits}(<{lanes} x float> %sum, <{pairs} x bfloat> %x, <{pairs} x bfloat> %y)
  ret <{lanes} x float> %r
}}
"""  # fmt: skip  # noqa: E501
_INTERLEAVED = ", ".join(f"i32 {lane}, i32 {LANES + lane}" for lane in range(LANES))
_PAIR = f"""
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
define weak_odr hidden <16 x float> @wsp_pair16(<16 x float> %even, <16 x float> %odd) alwaysinline {{
  %both = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %odd, <16 x float> %even)
  %words = shufflevector <32 x bfloat> %both, <32 x bfloat> poison, <32 x i32> <{_INTERLEAVED}>
  %r = bitcast <32 x bfloat> %words to <16 x float>
  ret <16 x float> %r
}}
"""
_TEXT = _PAIR + "".join(_DOT.format(lanes=n, pairs=2 * n, bits=32 * n) for n in (LANES, LANES // 2))


def instructions() -> Any:
    """A context: inside, :func:`dot` and :func:`pair` may be emitted."""
    return B.attr(T.int32(0), "pragma_import_llvm", _TEXT)


def dot(total: Expression, a: Expression, b: Expression, lanes: int) -> Expression:
    """total + a0 * b0 + a1 * b1 in every lane; a and b are words of two bfloat16 values."""
    return T.call_pure_extern(f"float32x{lanes}", f"wsp_dot{lanes}", total, a, b)


def pair(even: Expression, odd: Expression) -> Expression:
    """Words of two float32 vectors rounded to bfloat16 (to nearest even; NaN stays NaN, subnormals become 0)."""
    return hold(T.call_pure_extern(f"float32x{LANES}", f"wsp_pair{LANES}", even, odd), LANES)
