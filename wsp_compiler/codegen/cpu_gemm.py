"""CPU batched GEMM: M = U V for every block of kept rows, the vectors' lanes being neighbouring tiles.

A register block is ``rows`` kept rows x ``vectors`` vectors of tiles. Since lanes are tiles, kept rows need no padding
to the vector width, and rows are scalars that the multiply broadcasts from memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from wsp_compiler.codegen.cpu_dot import dot
from wsp_compiler.codegen.cpu_emit import B, Buffer, Expression, let, load, quotient, registers, splat, store
from wsp_compiler.codegen.cpu_geometry import POSITION_PADDING, Geometry
from wsp_compiler.codegen.tvm_import import T


@dataclass(frozen=True)
class GemmStage:
    """What the stage reads and writes.

    Attributes:
        geometry: see there.
        U: packed kept rows, [block][column][rows], or [block][pair of columns][rows] of words.
        block_position: int32 [blocks]; block_start: int64 [blocks], a block's first element of U.
        column_offset: int32 [p*p + 1], kept columns before each position.
        V, M: see the geometry; ts: length of a tile line.
    """

    geometry: Geometry
    U: Buffer
    block_position: Buffer
    block_start: Buffer
    column_offset: Buffer
    V: Buffer
    M: Buffer
    ts: Expression

    def emit(self, block: Expression, tiles: Expression) -> None:
        """Multiply one block of kept rows with all ``tiles`` of the slice."""
        config, spec = self.geometry.config, self.geometry.spec
        L, wide_block = config.lanes, config.lanes * config.vectors
        k = let(self.block_position[block])
        start = let(self.block_start[block])
        if spec.columns_pruned:
            depth = let(self.column_offset[k + 1] - self.column_offset[k])
            first_row = let(self.column_offset[k] + k)  # every position has one more row, for pruned columns
        else:
            depth, first_row = self.geometry.depth, let(k * self.geometry.depth)
        V0 = let(first_row * self.ts + k * POSITION_PADDING)
        M0 = let(block * config.rows * self.ts)
        whole = let(quotient(tiles, wide_block))
        with B.serial(whole) as turn:
            self._multiply(start, depth, V0, M0, turn * wide_block, config.vectors, L)
        rest = let(tiles - whole * wide_block)
        half = L // 2 if L > 4 else 0
        singles = let(quotient(rest + (L - 1 - half), L))
        with B.serial(singles) as turn:
            self._multiply(start, depth, V0, M0, whole * wide_block + turn * L, 1, L)
        if half:
            with B.If(singles * L < rest), B.Then():
                self._multiply(start, depth, V0, M0, whole * wide_block + singles * L, 1, half)

    def _multiply(
        self,
        start: Expression,
        depth: Expression,
        V0: Expression,
        M0: Expression,
        q: Expression,
        vectors: int,
        lanes: int,
    ) -> None:
        rows, pairs = self.geometry.config.rows, self.geometry.config.dot
        q = let(q)
        sums = registers(rows * vectors, lanes)
        for i in range(rows * vectors):
            B.buffer_store(sums, splat(0.0, lanes), [i])
        with B.serial(depth) as c:
            tiles = [load(self.V, V0 + c * self.ts + q + v * lanes, lanes) for v in range(vectors)]
            u = let(start + T.cast(c * rows, "int64"))
            for i in range(rows):
                weight = splat(load(self.U, u + i, 1), lanes)
                for v in range(vectors):
                    at = i * vectors + v
                    product = (
                        dot(sums[at], tiles[v], weight, lanes) if pairs else sums[at] + weight * tiles[v]
                    )
                    B.buffer_store(sums, product, [at])
        for i in range(rows):
            for v in range(vectors):
                store(self.M, M0 + i * self.ts + q + v * lanes, sums[i * vectors + v], lanes)
