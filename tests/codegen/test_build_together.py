"""Builds in threads: all of them run, side by side, and one that fails stops no other."""

from __future__ import annotations

import threading

from wsp_compiler.codegen.build_together import build_together


def test_builds_run_side_by_side() -> None:
    barrier = threading.Barrier(2, timeout=20)
    done: list[int] = []

    def build(number: int) -> None:
        barrier.wait()  # passes only if two builds are under way
        done.append(number)

    build_together([lambda n=n: build(n) for n in range(2)])
    assert sorted(done) == [0, 1]


def test_a_failing_build_stops_no_other() -> None:
    done: list[int] = []

    def build(number: int) -> None:
        if number == 0:
            raise RuntimeError("does not compile")
        done.append(number)

    build_together([lambda n=n: build(n) for n in range(5)])
    assert sorted(done) == [1, 2, 3, 4]


def test_nothing_to_build() -> None:
    build_together([])
