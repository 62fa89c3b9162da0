"""The vocabulary of the CPU kernels: TensorIR emitted by plain Python calls.

Kernels are written with TVM's IR builder, not as TVMScript: helper functions then compose freely, and no text has to
be parsed on a first call. ``B`` is the builder; every function here adds to the function being built.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from wsp_compiler.codegen.tvm_import import B, T
from wsp_compiler.winograd import Matrix

Expression = Any
Buffer = Any
IN_REGISTERS = {"disable_lower_builtin": True}
"""Annotation that keeps small vector buffers in registers instead of a heap workspace."""


def vector_type(dtype: str, lanes: int) -> str:
    """Name of a vector type: vector_type("float32", 8) is "float32x8"."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def view(address: Expression, dtype: str = "float32", align: int = 64) -> Buffer:
    """A flat buffer at an int64 address that is a multiple of ``align`` bytes."""
    pointer = B.Bind(T.reinterpret(B.ptr(dtype).ty, address), var=B.ptr(dtype))
    return B.decl_buffer((1 << 40,), dtype, data=pointer, align=align)


def let(value: Expression) -> Expression:
    """Compute an integer here, once."""
    if isinstance(value, int):
        return T.int32(value)
    place = B.alloc_buffer((1,), str(value.ty), scope="local", annotations=dict(IN_REGISTERS))
    B.buffer_store(place, value, [0])
    return place[0]


def bind(value: Expression) -> Expression:
    """Compute an integer here, once, for parallel loops to see: they cannot capture registers."""
    return B.Bind(value)


def hold(value: Expression, lanes: int) -> Expression:
    """Compute the float32 vector ``value`` here, once.

    Like :func:`let`, in a register buffer: TVM's simplifier would expand a bound variable into its value, without end.
    """
    place = registers(1, lanes)
    B.buffer_store(place, value, [0])
    return place[0]


def quotient(a: Expression, b: Expression | int) -> Expression:
    """a / b for integers a >= 0, b > 0. TVM's own ``//`` rounds down for negative ones too, which it lowers slowly."""
    return T.truncdiv(a, b)


def remainder(a: Expression, b: Expression | int) -> Expression:
    """a mod b for integers a >= 0, b > 0."""
    return T.truncmod(a, b)


def wide(value: Expression) -> Expression:
    """An int32 index as int64."""
    return T.cast(value, "int64")


def load(buffer: Buffer, index: Expression, lanes: int) -> Expression:
    """``lanes`` float32 elements from ``index`` on, loaded here."""
    return hold(buffer[index] if lanes == 1 else buffer[T.ramp(index, 1, lanes)], lanes)


def store(buffer: Buffer, index: Expression, value: Expression, lanes: int) -> None:
    """Store ``lanes`` elements from ``index`` on."""
    B.buffer_store(buffer, value, [index if lanes == 1 else T.ramp(index, 1, lanes)])


def splat(value: Expression | float, lanes: int) -> Expression:
    """A float32 scalar in every lane."""
    scalar = T.float32(value) if isinstance(value, int | float) else value
    return scalar if lanes == 1 else T.Broadcast(scalar, lanes)


def shuffle(vectors: Sequence[Expression], lanes: Sequence[int]) -> Expression:
    """The ``lanes`` of the vectors laid end to end."""
    return hold(T.Shuffle(list(vectors), [T.int32(lane) for lane in lanes]), len(lanes))


def registers(count: int, lanes: int) -> Buffer:
    """``count`` float32 vectors that may be written more than once."""
    return B.alloc_buffer(
        (count,), vector_type("float32", lanes), scope="local", annotations=dict(IN_REGISTERS)
    )


def transpose(rows: Sequence[Expression]) -> list[Expression]:
    """The columns of a square block of vectors: log2(lanes) rounds of exchanges between pairs of rows."""
    block, lanes, step = list(rows), len(rows), 1
    while step < lanes:
        upper = [lane if not lane & step else lanes + lane - step for lane in range(lanes)]
        lower = [lane + step if not lane & step else lanes + lane for lane in range(lanes)]
        for i in range(lanes):
            if not i & step:
                pair = (block[i], block[i + step])
                block[i], block[i + step] = shuffle(pair, upper), shuffle(pair, lower)
        step *= 2
    return block


def combine(coefficients: Sequence[float], terms: Sequence[Expression], lanes: int) -> Expression:
    """sum_i coefficients[i] * terms[i] without multiplications by 0, 1 and -1; None if all are 0."""
    chosen = [(c, term) for c, term in zip(coefficients, terms, strict=True) if c != 0]
    chosen.sort(key=lambda entry: entry[0] < 0)  # begin with a positive one, to save a negation
    total: Expression = None
    for coefficient, term in chosen:
        scaled = term if abs(coefficient) == 1 else term * splat(abs(coefficient), lanes)
        if total is None:
            total = scaled if coefficient > 0 else splat(0.0, lanes) - scaled
        else:
            total = total + scaled if coefficient > 0 else total - scaled
    return None if total is None else hold(total, lanes)


def apply(matrix: Matrix, terms: Sequence[Expression], lanes: int) -> list[Expression]:
    """matrix @ terms, with sums that several rows need computed once.

    Columns that are equal up to signs in all rows are replaced by the sum and the difference of their terms. Rows
    that are equal up to signs share their even and odd parts: a = e + o, b = e - o.
    """
    columns = list(zip(*matrix, strict=True))
    for a, b in itertools.combinations(range(len(columns)), 2):
        if _equal_up_to_signs(columns[a], columns[b]) and sum(value != 0 for value in columns[a]) > 2:
            equal = [x if x == y else 0.0 for x, y in zip(columns[a], columns[b], strict=True)]
            opposite = [x if x != y else 0.0 for x, y in zip(columns[a], columns[b], strict=True)]
            merged = [*columns], [*terms]
            merged[0][a], merged[0][b] = tuple(equal), tuple(opposite)
            merged[1][a], merged[1][b] = hold(terms[a] + terms[b], lanes), hold(terms[a] - terms[b], lanes)
            return apply(tuple(zip(*merged[0], strict=True)), merged[1], lanes)
    results: list[Expression] = [None] * len(matrix)
    for i, row in enumerate(matrix):
        if results[i] is not None:
            continue
        mirror = next((j for j in range(i + 1, len(matrix)) if _share_parts(row, matrix[j])), None)
        if mirror is None:
            results[i] = combine(row, terms, lanes)
            continue
        same = [a if a == b else 0.0 for a, b in zip(row, matrix[mirror], strict=True)]
        other = [a if a != b else 0.0 for a, b in zip(row, matrix[mirror], strict=True)]
        even, odd = combine(same, terms, lanes), combine(other, terms, lanes)
        results[i], results[mirror] = hold(even + odd, lanes), hold(even - odd, lanes)
    return results


def _equal_up_to_signs(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(abs(x) == abs(y) for x, y in zip(a, b, strict=True))


def _share_parts(a: Sequence[float], b: Sequence[float]) -> bool:
    """True if a = e + o and b = e - o, where e and o are not both single terms."""
    same = sum(x == y != 0 for x, y in zip(a, b, strict=True))
    other = sum(x != y for x, y in zip(a, b, strict=True))
    return _equal_up_to_signs(a, b) and same > 0 and other > 0 and same + other > 2


def transform(
    matrix: Matrix,
    read: Callable[[int, int], Expression],
    write: Callable[[int, int, Expression], None],
    lanes: int,
) -> None:
    """matrix @ tile @ matrix^T; matrix is [q, p].

    ``read(i, j)`` emits the load of the tile's element, once each; ``write(i, j, value)`` uses the result's.
    """
    q, p = len(matrix), len(matrix[0])
    columns = [apply(matrix, [read(i, j) for i in range(p)], lanes) for j in range(p)]  # [p][q]
    for i in range(q):
        for j, value in enumerate(apply(matrix, [columns[j][i] for j in range(p)], lanes)):
            write(i, j, value)


def pieces(count: int, lanes: int) -> list[tuple[int, int]]:
    """``count`` elements as (offset, lanes) of vectors, each a power of two of at most ``lanes``."""
    found: list[tuple[int, int]] = []
    offset = 0
    while offset < count:
        while lanes > count - offset:
            lanes //= 2
        found.append((offset, lanes))
        offset += lanes
    return found
