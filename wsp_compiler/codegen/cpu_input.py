"""CPU input stage: B^T d B of every tile, the vectors' lanes being neighbouring tiles.

A block of channels is first staged as planes (see :mod:`wsp_compiler.codegen.cpu_geometry`), zero padded and in
float32, whatever the image's layout and type. From there on the transform knows neither image borders nor ragged rows:
it loads, adds and stores whole vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from wsp_compiler.codegen.cpu_dot import pair
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
from wsp_compiler.codegen.cpu_geometry import POSITION_PADDING, Geometry
from wsp_compiler.codegen.expressions import bfloat16_values, to_float
from wsp_compiler.codegen.tvm_import import T


@dataclass(frozen=True)
class InputStage:
    """What the stage reads and writes.

    Attributes:
        geometry: see there.
        X: the image's buffer; strides: of the image in elements, (n, c, h, w).
        V, line, S: see the geometry; line is a buffer for one padded input line.
        column_row: for pruned columns, int32 [p*p * c]: row of V that a channel goes to.
        rows: tile rows per slice (sizes S); ts: length of a tile line.
    """

    geometry: Geometry
    X: Buffer
    strides: tuple[Expression, Expression, Expression, Expression]
    V: Buffer
    line: Buffer
    S: Buffer
    column_row: Buffer
    rows: Expression
    ts: Expression

    def emit(
        self, image: Expression, images: Expression, row0: Expression, rows: Expression, block: Expression
    ) -> None:
        """Transform one block of channels of a slice.

        The slice has ``images`` images from ``image`` on, of each ``rows`` tile rows from ``row0`` on. Images come
        in order, since whole vectors are stored: what one has too much, the next one overwrites.
        """
        with B.serial(images) as of_slice:
            self._image(image, of_slice, row0, rows, block)

    def _image(
        self, image: Expression, of_slice: Expression, row0: Expression, rows: Expression, block: Expression
    ) -> None:
        geometry, spec = self.geometry, self.geometry.spec
        base = let(wide(image + of_slice) * self.strides[0])
        size, rest = geometry.channel_block, spec.channels % geometry.channel_block
        top = let(row0 * spec.tile - spec.padding[0])
        lines = let(rows * spec.tile + spec.winograd.input_side - spec.tile)

        def whole() -> None:
            self._stage_block(base + wide(block * size), top, lines)

        def single(count: Expression) -> None:
            with B.serial(count) as channel:
                self._stage_channel(
                    let(base + wide(block * size + channel) * self.strides[1]), channel, top, lines
                )

        count = T.min(size, spec.channels - block * size) if rest else size
        if not spec.input_channels_last or spec.channels < size:
            single(count)
        elif rest == 0:
            whole()
        else:
            with B.If(block < spec.channels // size):
                with B.Then():
                    whole()
                with B.Else():
                    single(rest)
        first = let(of_slice * rows * geometry.row)
        tiles = let(rows * geometry.row)
        if not geometry.config.dot:
            with B.serial(count) as channel:
                self._transform(channel, let(block * size + channel), first, tiles)
            return
        row = let(quotient(block * size, 2))
        with B.serial(quotient(count, 2)) as turn:
            self._transform_pair(let(2 * turn), True, let(row + turn), first, tiles)
        if spec.channels % 2:
            with B.If(remainder(count, 2) == 1), B.Then():
                self._transform_pair(let(count - 1), False, let(row + quotient(count, 2)), first, tiles)

    def _plane(self, i: Expression, j: int, channel: Expression) -> Expression:
        """Where a channel's plane (i, j) begins in S."""
        return ((i * self.geometry.planes + j) * self.geometry.channel_block + channel) * self._plane_size

    @property
    def _plane_size(self) -> Expression:
        lanes = self.geometry.config.lanes
        vectors = quotient((self.rows + 1) * self.geometry.row + 2 * lanes, lanes)
        return (quotient(vectors, 2) * 2 + 1) * lanes

    def _stage_block(self, base: Expression, top: Expression, lines: Expression) -> None:
        """Stage ``lanes`` channels that lie side by side: blocks of lanes x lanes are transposed."""
        geometry, spec = self.geometry, self.geometry.spec
        L, m = geometry.config.lanes, spec.tile
        with B.serial(lines) as number:
            y, i = let(top + number), let(remainder(number, m))
            at = let(quotient(number, m) * geometry.row)
            with B.If(T.And(y >= 0, y < spec.height)):
                with B.Then():
                    line = let(base + wide(y) * self.strides[2])
                    for j in range(geometry.planes):
                        for start, count, valid in self._vectors(j):
                            with B.serial(count) as turn:
                                self._transposed(line, i, j, at, (start + turn) * L, valid)
                with B.Else():
                    self._zero_line(i, at)

    def _vectors(self, j: int) -> list[tuple[int, int, tuple[bool, ...]]]:
        """Vectors of a plane's row: (first, how many alike, which lanes are pixels of the image)."""
        geometry, spec = self.geometry, self.geometry.spec
        L, m = geometry.config.lanes, spec.tile
        found: list[tuple[int, int, tuple[bool, ...]]] = []
        for vector in range(-(-geometry.row // L)):
            numbers = range(vector * L, vector * L + L)
            valid = tuple(b < geometry.row and 0 <= m * b + j - spec.padding[1] < spec.width for b in numbers)
            if found and found[-1][2] == valid:
                found[-1] = (found[-1][0], found[-1][1] + 1, valid)
            else:
                found.append((vector, 1, valid))
        return found

    def _transposed(
        self, line: Expression, i: Expression, j: int, at: Expression, b: Expression, valid: tuple[bool, ...]
    ) -> None:
        geometry, spec = self.geometry, self.geometry.spec
        L, m, io = geometry.config.lanes, spec.tile, spec.dtype
        pixels: list[Expression] = []
        for lane in range(L):
            pixel = splat(0.0, L)
            if valid[lane]:
                x = m * (b + lane) + j - spec.padding[1]
                index = T.ramp(line + wide(x) * self.strides[3], T.int64(1), L)
                pixel = hold(to_float(self.X[index], io, L), L)
            pixels.append(pixel)
        for channel, values in enumerate(transpose(pixels) if any(valid) else pixels):
            store(self.S, self._plane(i, j, channel) + at + b, values, L)

    def _zero_line(self, i: Expression, at: Expression) -> None:
        geometry, L = self.geometry, self.geometry.config.lanes
        for j in range(geometry.planes):
            with B.serial(geometry.channel_block) as channel, B.serial(-(-geometry.row // L)) as vector:
                store(self.S, self._plane(i, j, channel) + at + vector * L, splat(0.0, L), L)

    def _stage_channel(
        self, base: Expression, channel: Expression, top: Expression, lines: Expression
    ) -> None:
        """Stage one channel of any strides: each line is copied between zeros, then dealt out to the planes."""
        geometry, spec = self.geometry, self.geometry.spec
        L, m, pad = geometry.config.lanes, spec.tile, spec.padding[1]
        with B.serial(geometry.line // L) as vector:
            store(self.line, vector * L, splat(0.0, L), L)
        with B.serial(lines) as number:
            y, i = let(top + number), let(remainder(number, m))
            at = let(quotient(number, m) * geometry.row)
            with B.If(T.And(y >= 0, y < spec.height)):
                with B.Then():
                    self._copy_line(let(base + wide(y) * self.strides[2]), pad)
                    with B.serial(-(-geometry.row // L)) as vector:
                        for j in range(geometry.planes):
                            first = (vector * L * m) + j // m * m
                            parts = [load(self.line, first + part * L, L) for part in range(m)]
                            values = shuffle(parts, range(j % m, m * L, m))
                            store(self.S, self._plane(i, j, channel) + at + vector * L, values, L)
                with B.Else():
                    for j in range(geometry.planes):
                        with B.serial(-(-geometry.row // L)) as vector:
                            store(self.S, self._plane(i, j, channel) + at + vector * L, splat(0.0, L), L)

    def _copy_line(self, base: Expression, pad: int) -> None:
        """The image's line as float32 at ``pad`` in the line buffer."""
        spec, L = self.geometry.spec, self.geometry.config.lanes

        def copy(x: Expression, lanes: int) -> None:
            index = base + wide(x) if lanes == 1 else T.ramp(base + wide(x), T.int64(1), lanes)
            store(self.line, x + pad, to_float(self.X[index], spec.dtype, lanes), lanes)

        with B.If(self.strides[3] == T.int64(1)):
            with B.Then():
                with B.serial(spec.width // L) as vector:
                    copy(vector * L, L)
                done = spec.width // L * L
                for offset, lanes in pieces(spec.width - done, L):
                    copy(T.int32(done + offset), lanes)
            with B.Else(), B.serial(spec.width) as x:
                value = self.X[base + wide(x) * self.strides[3]]
                store(self.line, x + pad, to_float(value, spec.dtype), 1)

    def _transform(
        self, channel: Expression, number: Expression, first: Expression, tiles: Expression
    ) -> None:
        """V of all ``tiles`` of a channel, written from ``first`` of the tile line on."""
        geometry, spec, ts = self.geometry, self.geometry.spec, self.ts
        L, p = geometry.config.lanes, spec.winograd.input_side
        rounds = spec.precision == "bf16"
        planes = self._planes(channel)
        with B.serial(quotient(tiles + L - 1, L)) as vector:
            q = let(vector * L)

            def write(i: int, j: int, value: Expression) -> None:
                k = i * p + j
                row = (
                    self.column_row[k * spec.channels + number]
                    if spec.columns_pruned
                    else k * spec.channels + number
                )
                value = bfloat16_values(value, L) if rounds else value
                store(self.V, row * ts + k * POSITION_PADDING + first + q, value, L)

            transform(spec.winograd.BT, self._reader(planes, q), write, L)

    def _transform_pair(
        self, channel: Expression, both: bool, row: Expression, first: Expression, tiles: Expression
    ) -> None:
        """The same for two channels, as words of two bfloat16 values; without ``both`` the second one is zero.

        The first channel's results wait in registers, or where the compiler puts them.
        """
        geometry, spec, ts = self.geometry, self.geometry.spec, self.ts
        L, p = geometry.config.lanes, spec.winograd.input_side
        even = self._planes(channel)
        odd = self._planes(let(channel + 1)) if both else None
        with B.serial(quotient(tiles + L - 1, L)) as vector:
            q = let(vector * L)
            waiting: dict[tuple[int, int], Expression] = {}

            def wait(i: int, j: int, value: Expression) -> None:
                waiting[i, j] = hold(value, L)

            def write(i: int, j: int, value: Expression) -> None:
                k = i * p + j
                at = (k * geometry.depth + row) * ts + k * POSITION_PADDING + first + q
                store(self.V, at, pair(waiting[i, j], value), L)

            transform(spec.winograd.BT, self._reader(even, q), wait, L)
            if odd is not None:
                transform(spec.winograd.BT, self._reader(odd, q), write, L)
            else:
                for i, j in list(waiting):
                    write(i, j, splat(0.0, L))

    def _planes(self, channel: Expression) -> list[list[Expression]]:
        planes, m = self.geometry.planes, self.geometry.spec.tile
        return [[let(self._plane(i, j, channel)) for j in range(planes)] for i in range(m)]

    def _reader(self, planes: list[list[Expression]], q: Expression) -> Callable[[int, int], Expression]:
        """Loads pixel (i, j) of the tiles from ``q`` on."""
        geometry, m, L = self.geometry, self.geometry.spec.tile, self.geometry.config.lanes

        def read(i: int, j: int) -> Expression:
            column, shift = (j % m, j // m) if geometry.config.gap else (j, 0)
            return load(self.S, planes[i % m][column] + q + i // m * geometry.row + shift, L)

        return read
