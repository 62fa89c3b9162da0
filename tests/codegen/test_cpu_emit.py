"""The vocabulary of the CPU kernels, run: transposes, transforms and pieces of vectors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from wsp_compiler.codegen import cpu_emit
from wsp_compiler.codegen.build import _load, _object_file, lower
from wsp_compiler.codegen.cpu_emit import B, load, pieces, shuffle, store, transpose, view
from wsp_compiler.codegen.targets import cpu_target
from wsp_compiler.codegen.tvm_import import IRBuilder, T
from wsp_compiler.winograd import transform as winograd_transform


def run(body: Callable[[object, object], None], x: Tensor, size: int) -> Tensor:
    """What ``body(X, Y)`` writes to Y, of ``size`` elements."""
    with IRBuilder() as builder, B.prim_func():
        B.func_name("probe")
        given = B.arg("x", T.int64()), B.arg("y", T.int64())
        body(*(view(address, align=4) for address in given))
    target = cpu_target()
    kernel = _load({"object": _object_file(lower(builder.get(), "probe", target).host)}, "probe")
    y = torch.full((size,), torch.nan)
    kernel(x.data_ptr(), y.data_ptr())
    return y


@pytest.mark.parametrize("lanes", [2, 4, 8, 16])
def test_transposing(lanes: int):
    x = torch.randn(lanes, lanes)

    def body(X: object, Y: object) -> None:
        for i, column in enumerate(transpose([load(X, i * lanes, lanes) for i in range(lanes)])):
            store(Y, i * lanes, column, lanes)

    assert torch.equal(run(body, x, lanes * lanes).view(lanes, lanes), x.T)


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("name", ["BT", "AT"])
def test_transforms_equal_the_matrices(name: str, tile: int):
    winograd = winograd_transform(tile)
    matrix = getattr(winograd, name)
    q, p, lanes = len(matrix), winograd.input_side, 4
    x = torch.randn(p, p, lanes)
    read: list[tuple[int, int]] = []

    def body(X: object, Y: object) -> None:
        def element(i: int, j: int) -> object:
            read.append((i, j))
            return load(X, (i * p + j) * lanes, lanes)

        cpu_emit.transform(
            matrix, element, lambda i, j, value: store(Y, (i * q + j) * lanes, value, lanes), lanes
        )

    y = run(body, x, q * q * lanes).view(q, q, lanes)
    exact = winograd.tensor(name, torch.float64)
    expected = torch.einsum("ai,ijl,bj->abl", exact, x.double(), exact)
    assert torch.allclose(y.double(), expected, rtol=0, atol=1e-4)
    assert sorted(read) == [(i, j) for i in range(p) for j in range(p)]


def test_sums_that_rows_share_are_computed_once(monkeypatch: pytest.MonkeyPatch):
    """F(4x4, 3x3): 12 additions per column of B^T instead of 16, 10 of A^T instead of 14."""
    held: list[object] = []
    with IRBuilder(), B.prim_func():
        B.func_name("probe")
        buffer = view(B.arg("x", T.int64()))
        for name, most in (("BT", 10), ("AT", 8)):
            terms = [load(buffer, i, 1) for i in range(6)]
            with monkeypatch.context() as patch:
                hold = cpu_emit.hold
                patch.setattr(
                    cpu_emit, "hold", lambda value, lanes, hold=hold: held.append(value) or hold(value, lanes)
                )
                held.clear()
                results = cpu_emit.apply(getattr(winograd_transform(4), name), terms, 1)
            assert len(results) == (6 if name == "BT" else 4)
            assert len(held) <= most


def test_shuffles_pick_lanes():
    x = torch.arange(16.0)

    def body(X: object, Y: object) -> None:
        store(Y, 0, shuffle([load(X, 0, 8), load(X, 8, 8)], range(0, 16, 2)), 8)
        store(Y, 8, shuffle([load(X, 4, 4)], (1, 0)), 2)

    assert run(body, x, 10).tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 5, 4]


@pytest.mark.parametrize("count", range(40))
def test_pieces_cover_a_count_once(count: int):
    for lanes in (4, 8, 16):
        found = pieces(count, lanes)
        assert [offset for offset, _ in found] == [
            sum(size for _, size in found[:i]) for i in range(len(found))
        ]
        assert sum(size for _, size in found) == count
        assert all(size in (1, 2, 4, 8, 16) and size <= lanes for _, size in found)
