"""CPU kernels in TensorIR: input transform, batched GEMM over kept rows, output transform, fused or apart.

Two ways to use several threads. "slices": each thread takes slices of the tiles through all stages, V and M staying
in its L2 cache. "stages": the threads share one slice and divide every stage between them: by channels, by blocks of
kept rows, by filters; for layers with few tiles and many weights, which are then read once, not once per thread.

Geometry and layouts: :mod:`wsp_compiler.codegen.cpu_geometry`.
"""

from __future__ import annotations

import contextlib
from typing import Any

from wsp_compiler.codegen import cpu_dot, cpu_stream
from wsp_compiler.codegen.cpu_emit import (
    B,
    Expression,
    bind,
    let,
    quotient,
    remainder,
    splat,
    store,
    view,
    wide,
)
from wsp_compiler.codegen.cpu_gemm import GemmStage
from wsp_compiler.codegen.cpu_geometry import Geometry
from wsp_compiler.codegen.cpu_input import InputStage
from wsp_compiler.codegen.cpu_output import OutputStage
from wsp_compiler.codegen.cpu_stream import can_stream
from wsp_compiler.codegen.expressions import STORAGE
from wsp_compiler.codegen.spec import CpuConfig, KernelSpec
from wsp_compiler.codegen.tvm_import import IRBuilder, T

ALL_STAGES = ("input", "gemm", "output")
ADDRESSES = (
    "x", "u", "block_position", "block_start", "column_offset", "column_row", "product_row",
    "bias", "slope", "residual", "y", "v", "m", "scratch",
)  # fmt: skip
WIDE = ("v_part", "m_part", "scratch_part")
STRIDES = tuple(f"{name}_{axis}" for name in ("x", "residual", "y") for axis in "nchw")
NARROW = ("images", "slice_images", "slice_rows", "ts", "blocks", "workers", "stream")
PARAMETERS = (*ADDRESSES, *STRIDES, *WIDE, *NARROW)
"""Parameters of every kernel, in order: addresses, strides and sizes in elements as int64, counts as int32.

``v_part``, ``m_part`` and ``scratch_part`` are what one thread (or, with the stages apart, one slice) has of each;
``slice_images`` > 1 only with ``slice_rows`` = all tile rows; ``ts`` as in the geometry; ``blocks`` of kept rows;
``stream`` = 1 stores outputs past the caches, in kernels that can.
"""


def make_cpu_kernel(
    spec: KernelSpec, config: CpuConfig, stages: tuple[str, ...] = ALL_STAGES, split: str = "slices"
) -> Any:
    """The PrimFunc that runs ``stages`` (a subset of :data:`ALL_STAGES`) of a layer, parallel over ``split``."""
    with IRBuilder() as builder, B.prim_func():
        B.func_name("winograd_cpu")
        B.func_attr({"tirx.noalias": True})
        given = {name: B.arg(name, T.int32() if name in NARROW else T.int64()) for name in PARAMETERS}
        with contextlib.ExitStack() as imported:
            if config.dot:
                imported.enter_context(cpu_dot.instructions())
            if can_stream(spec, config) and "output" in stages:
                imported.enter_context(cpu_stream.instructions())
            _Kernel(Geometry(spec, config), given, stages).emit(split)
    return builder.get()


class _Kernel:
    def __init__(self, geometry: Geometry, given: dict[str, Any], stages: tuple[str, ...]) -> None:
        self.geometry, self.given, self.stages = geometry, given, stages

    def emit(self, split: str) -> None:
        given, spec = self.given, self.geometry.spec
        self.slices_per_image = bind(quotient(spec.tiles[0] + given["slice_rows"] - 1, given["slice_rows"]))
        groups = bind(quotient(given["images"] + given["slice_images"] - 1, given["slice_images"]))
        slices = bind(groups * self.slices_per_image)
        workers = given["workers"]
        if split == "slices":
            with B.parallel(workers) as w, B.serial(quotient(slices - w + workers - 1, workers)) as turn:
                s = let(turn * workers + w)
                part = w if self.stages == ALL_STAGES else s
                for stage in self.stages:
                    self._stage(stage, s, part, w, None)
        else:
            with B.serial(slices) as s:
                for stage in self.stages:
                    with B.parallel(workers) as w:
                        self._stage(stage, s, T.int32(0), w, workers)

    def _stage(self, stage: str, s: Expression, part: Expression, w: Expression, workers: Expression) -> None:
        """One stage of slice ``s``; with ``workers``, only the w-th part of its items."""
        given, geometry = self.given, self.geometry
        spec, config = geometry.spec, geometry.config
        group, in_group = let(quotient(s, self.slices_per_image)), let(remainder(s, self.slices_per_image))
        image, row0 = let(group * given["slice_images"]), let(in_group * given["slice_rows"])
        rows = let(T.min(given["slice_rows"], spec.tiles[0] - row0))
        images = let(T.min(given["slice_images"], given["images"] - image))
        tiles, ts = let(images * rows * geometry.row), given["ts"]
        scratch = given["scratch"] + wide(w) * (given["scratch_part"] * 4)
        V = view(given["v"] + wide(part) * (given["v_part"] * 4))
        M = view(given["m"] + wide(part) * (given["m_part"] * 4))
        item = spec.dtype
        size = {"float32": 4}.get(item, 2)

        def share(count: Expression) -> tuple[Expression, Expression]:
            if workers is None:
                return T.int32(0), count
            each = let(quotient(count + workers - 1, workers))
            first = let(T.min(w * each, count))
            return first, let(T.min(first + each, count))

        if stage == "input":
            work = InputStage(
                geometry=geometry,
                X=view(given["x"], STORAGE[item], size),
                strides=tuple(given[f"x_{axis}"] for axis in "nchw"),
                V=V,
                line=view(scratch),
                S=view(scratch + geometry.line * 4),
                column_row=view(given["column_row"], "int32", 4),
                rows=given["slice_rows"],
                ts=ts,
            )
            first, last = share(T.int32(geometry.channel_blocks))
            with B.serial(last - first) as turn:
                work.emit(image, images, row0, rows, let(first + turn))
        elif stage == "gemm":
            gemm = GemmStage(
                geometry=geometry,
                U=view(given["u"], align=4),
                block_position=view(given["block_position"], "int32", 4),
                block_start=view(given["block_start"], "int64", 8),
                column_offset=view(given["column_offset"], "int32", 4),
                V=V,
                M=M,
                ts=ts,
            )
            first, last = share(given["blocks"])
            with B.serial(last - first) as turn:
                gemm.emit(let(first + turn), tiles)
        else:
            L = config.lanes
            output = OutputStage(
                geometry=geometry,
                M=M,
                ts=ts,
                product_row=view(given["product_row"], "int32", 4),
                bias=view(given["bias"]),
                slope=view(given["slope"]),
                R=view(given["residual"], STORAGE[item], size),
                residual_strides=tuple(given[f"residual_{axis}"] for axis in "nchw"),
                Y=view(given["y"], STORAGE[item], size),
                strides=tuple(given[f"y_{axis}"] for axis in "nchw"),
                O=view(scratch + geometry.line * 4),
                address=given["y"],
                stream=given["stream"] if can_stream(spec, config) else None,
            )
            with B.serial(
                quotient(ts, L)
            ) as vector:  # the row of zeros, which threads that share M all write alike
                store(M, given["blocks"] * config.rows * ts + vector * L, splat(0.0, L), L)
            vectors = let(quotient(tiles + L - 1, L))
            items = (
                let(vectors * geometry.filter_blocks) if spec.output_channels_last else geometry.filter_blocks
            )
            first, last = share(items)
            output.emit(image, row0, rows, tiles, first, last)
