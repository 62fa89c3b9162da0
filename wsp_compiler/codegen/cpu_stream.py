"""Stores past the caches, for outputs that the last one cannot hold.

An ordinary store first reads the line that it changes: memory moves twice as much as has to be written. TVM has no
such store, so it is a function of LLVM text, linked into the kernel and inlined. Whole, aligned cache lines only.
"""

from __future__ import annotations

from typing import Any

from wsp_compiler.codegen.cpu_emit import B, Expression
from wsp_compiler.codegen.spec import CpuConfig, KernelSpec
from wsp_compiler.codegen.tvm_import import T

LANES = 16
"""float32 values of a cache line: only vectors of that length are streamed."""
LEAST_BYTES = 4 << 20
"""Smaller outputs of one image are never streamed: the kernel does not need the code."""

_TEXT = """
declare void @llvm.x86.sse.sfence()
define weak_odr hidden i32 @wsp_stream16(i64 %address, <16 x float> %value) alwaysinline {
  %at = inttoptr i64 %address to ptr
  store <16 x float> %value, ptr %at, align 64, !nontemporal !0
  ret i32 0
}
define weak_odr hidden i32 @wsp_fence() alwaysinline {
  call void @llvm.x86.sse.sfence()
  ret i32 0
}
!0 = !{i32 1}
"""


def can_stream(spec: KernelSpec, config: CpuConfig) -> bool:
    """True if the kernel has both kinds of stores: whole lines of filters, of images that may exceed the caches."""
    height, width = spec.output_size
    lines = spec.output_channels_last and spec.dtype == "float32" and spec.filters % LANES == 0
    return lines and config.lanes == LANES and 4 * spec.filters * height * width >= LEAST_BYTES


def instructions() -> Any:
    """A context: inside, :func:`stream` and :func:`fence` may be emitted."""
    return B.attr(T.int32(0), "pragma_import_llvm", _TEXT)


def stream(address: Expression, value: Expression) -> None:
    """Store 16 float32 values at an int64 address that is a multiple of 64."""
    T.evaluate(T.call_extern("int32", "wsp_stream16", address, value))


def fence() -> None:
    """Make what was streamed visible before anything that is stored later."""
    T.evaluate(T.call_extern("int32", "wsp_fence"))
