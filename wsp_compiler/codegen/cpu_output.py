"""CPU output stage: A^T M A of every tile, then + bias, + residual, activation, and the reordering to the image.

The transform runs along the slice's tile line, a vector of tiles at a time; a pruned (position, filter) reads the row
of zeros. channels_last images take blocks of lanes x lanes transposed, others interleave the columns of neighbouring
tiles. Tiles outside the image and the gaps of the tile line are computed and not stored.
"""

from __future__ import annotations

from dataclasses import dataclass

from wsp_compiler.codegen import cpu_stream
from wsp_compiler.codegen.cpu_emit import (
    B,
    Buffer,
    Expression,
    hold,
    let,
    load,
    pieces,
    quotient,
    remainder,
    shuffle,
    splat,
    store,
    transform,
    transpose,
    wide,
)
from wsp_compiler.codegen.cpu_geometry import Geometry
from wsp_compiler.codegen.expressions import activate, from_float, to_float
from wsp_compiler.codegen.tvm_import import T

Strides = tuple[Expression, Expression, Expression, Expression]


@dataclass(frozen=True)
class OutputStage:
    """What the stage reads and writes.

    Attributes:
        geometry: see there.
        M: products; ts: length of a tile line.
        product_row: int32 [n * p*p], the row of M for a filter and a position.
        bias, slope: float32, padded to whole vectors.
        R, residual_strides: the residual; Y, strides: the output; strides in elements, (n, c, h, w).
        O: scratch for outputs before they are reordered.
        address, stream: of the output in bytes, and 1 to store past the caches; None if the kernel cannot.
    """

    geometry: Geometry
    M: Buffer
    ts: Expression
    product_row: Buffer
    bias: Buffer
    slope: Buffer
    R: Buffer
    residual_strides: Strides
    Y: Buffer
    strides: Strides
    O: Buffer  # noqa: E741
    address: Expression = None
    stream: Expression = None

    def emit(
        self,
        image: Expression,
        row0: Expression,
        rows: Expression,
        tiles: Expression,
        first: Expression,
        last: Expression,
    ) -> None:
        """Output items ``first`` to ``last`` of the slice that begins at tile row ``row0`` of ``image``.

        For channels_last an item is a (vector of tiles, block of filters), otherwise a filter.
        """
        if not self.geometry.spec.output_channels_last:
            with B.serial(last - first) as turn:
                self._planar(image, row0, rows, tiles, let(first + turn))
            return
        blocks = self.geometry.filter_blocks
        begin, end = let(quotient(first, blocks)), let(quotient(last + blocks - 1, blocks))
        with B.serial(end - begin) as turn:
            vector = let(begin + turn)
            q = let(vector * self.geometry.config.lanes)
            places = self._places(image, row0, tiles, q)
            low = let(T.max(first - vector * blocks, 0))
            high = let(T.min(last - vector * blocks, blocks))
            with B.serial(high - low) as step:
                self._last(q, let(low + step), places)
        if self.stream is not None:
            with B.If(self.stream == 1), B.Then():
                cpu_stream.fence()

    def _tiles(self, f: Expression, q: Expression, keep: Expression, stride: Expression) -> None:
        """A^T M A + bias of filter ``f`` for the tiles from ``q`` on, to O[(i*m + j) * stride + keep]."""
        spec, L = self.geometry.spec, self.geometry.config.lanes
        p, m = spec.winograd.input_side, spec.tile
        bias = splat(load(self.bias, f, 1), L)

        def read(i: int, j: int) -> Expression:
            row = let(self.product_row[f * spec.winograd.positions + i * p + j])
            return load(self.M, row * self.ts + q, L)

        def write(i: int, j: int, value: Expression) -> None:
            store(self.O, (i * m + j) * stride + keep, value + bias, L)

        transform(spec.winograd.AT, read, write, L)

    # channels_last

    def _places(
        self, image: Expression, row0: Expression, tiles: Expression, q: Expression
    ) -> list[tuple[Expression, Expression, Expression, Expression]]:
        """(output offset, residual offset, rows and columns of the tile inside the image) of every lane."""
        geometry, spec = self.geometry, self.geometry.spec
        m, (TH, _), (HO, WO) = spec.tile, spec.tiles, spec.output_size
        found: list[tuple[Expression, Expression, Expression, Expression]] = []
        for lane in range(geometry.config.lanes):
            tile = let(q + lane)
            of_slice = let(quotient(tile, TH * geometry.row))
            in_image = let(remainder(tile, TH * geometry.row))
            h = let((row0 + quotient(in_image, geometry.row)) * m)
            w = let(remainder(in_image, geometry.row) * m)
            at, via = (
                let(wide(image + of_slice) * s[0] + wide(h) * s[2] + wide(w) * s[3])
                for s in (self.strides, self.residual_strides)
            )
            height = let(T.Select(tile < tiles, HO - h, 0))
            found.append((at, via, height, let(WO - w)))
        return found

    def _last(
        self,
        q: Expression,
        block: Expression,
        places: list[tuple[Expression, Expression, Expression, Expression]],
    ) -> None:
        spec, L = self.geometry.spec, self.geometry.config.lanes
        m, rest = spec.tile, spec.filters % L
        count = T.min(L, spec.filters - block * L) if rest else L
        with B.serial(count) as f:
            self._tiles(let(block * L + f), q, f * L, T.int32(L * L))
        f0 = let(block * L)
        slope = load(self.slope, f0, L) if spec.activation == "prelu" else splat(0.0, L)
        with B.serial(m) as i, B.serial(m) as j:
            columns = transpose([load(self.O, (i * m + j) * L * L + f * L, L) for f in range(L)])
            if not rest:
                if self.stream is None:
                    self._store_columns(columns, i, j, f0, slope, places)
                    return
                with B.If(self.stream == 1):
                    with B.Then():
                        self._store_columns(columns, i, j, f0, slope, places, past_caches=True)
                    with B.Else():
                        self._store_columns(columns, i, j, f0, slope, places)
                return
            with B.If(block < spec.filters // L):
                with B.Then():
                    self._store_columns(columns, i, j, f0, slope, places)
                with B.Else():
                    self._store_columns(columns, i, j, f0, slope, places, rest)

    def _store_columns(
        self,
        columns: list[Expression],
        i: Expression,
        j: Expression,
        f0: Expression,
        slope: Expression,
        places: list[tuple[Expression, Expression, Expression, Expression]],
        count: int | None = None,
        past_caches: bool = False,
    ) -> None:
        """Store one pixel of every tile: ``count`` filters (by default a whole vector) from ``f0`` on."""
        L = self.geometry.config.lanes
        pixel = [
            let(wide(i) * s[2] + wide(j) * s[3] + wide(f0)) for s in (self.strides, self.residual_strides)
        ]
        for lane, (at, via, height, width) in enumerate(places):
            with B.If(T.And(height > i, width > j)), B.Then():
                to, by = let(at + pixel[0]), let(via + pixel[1])
                for offset, lanes in [(0, L)] if count is None else pieces(count, L):
                    own = range(offset, offset + lanes)
                    value = columns[lane] if lanes == L else self._part(columns[lane], own)
                    factor = slope if lanes == L else self._part(slope, own)
                    self._finish(value, factor, to + offset, by + offset, lanes, past_caches)

    @staticmethod
    def _part(vector: Expression, lanes: range) -> Expression:
        return shuffle([vector], lanes)

    def _finish(
        self,
        value: Expression,
        slope: Expression,
        to: Expression,
        by: Expression,
        lanes: int,
        past_caches: bool = False,
    ) -> None:
        """+ residual, activation, store; ``to`` and ``by`` are int64 element offsets."""
        spec = self.geometry.spec

        def at(index: Expression) -> Expression:
            return index if lanes == 1 else T.ramp(index, T.int64(1), lanes)

        if spec.residual:
            value = hold(value + to_float(self.R[at(by)], spec.dtype, lanes), lanes)
        value = hold(activate(value, spec.activation, slope, lanes), lanes)
        if past_caches:
            cpu_stream.stream(self.address + to * 4, value)
        else:
            B.buffer_store(self.Y, from_float(value, spec.dtype, lanes), [at(to)])

    # planar images

    def _planar(
        self, image: Expression, row0: Expression, rows: Expression, tiles: Expression, f: Expression
    ) -> None:
        geometry, spec = self.geometry, self.geometry.spec
        L, m, TH, (HO, WO) = geometry.config.lanes, spec.tile, spec.tiles[0], spec.output_size
        ts = self.ts
        with B.serial(quotient(tiles + L - 1, L)) as vector:
            self._tiles(f, let(vector * L), let(vector * L), ts)
        slope = load(self.slope, f, 1) if spec.activation == "prelu" else T.float32(0)
        with B.serial(quotient(tiles, geometry.row)) as number:
            of_slice, row = let(quotient(number, TH)), let(remainder(number, TH))
            h0 = let((row0 + row) * m)
            for i in range(m):
                with B.If(h0 + i < HO), B.Then():
                    to, by = (
                        let(wide(image + of_slice) * s[0] + wide(f) * s[1] + wide(h0 + i) * s[2])
                        for s in (self.strides, self.residual_strides)
                    )
                    whole = WO // (m * L)
                    with B.serial(whole) as turn:
                        self._store_line(i, number, turn * L, m * L, to, by, slope)
                    if WO % (m * L):
                        self._store_line(i, number, T.int32(whole * L), WO % (m * L), to, by, slope)

    def _store_line(
        self,
        i: int,
        number: Expression,
        tw: Expression,
        pixels: int,
        to: Expression,
        by: Expression,
        slope: Expression,
    ) -> None:
        """Store ``pixels`` pixels of a line: those of the tiles from ``tw`` on of the slice's tile row ``number``."""
        geometry, spec = self.geometry, self.geometry.spec
        L, m = geometry.config.lanes, spec.tile
        at = let(number * geometry.row + tw)
        columns = [load(self.O, (i * m + j) * self.ts + at, L) for j in range(m)]
        for offset, lanes in pieces(pixels, L):
            own = [pixel % m * L + pixel // m for pixel in range(offset, offset + lanes)]
            x = wide(tw * m + offset)
            value = shuffle(columns, own)
            self._finish(value, splat(slope, lanes), let(to + x), let(by + x), lanes)
