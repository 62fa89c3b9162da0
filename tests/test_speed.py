"""speed: comparison and addition of times."""

from __future__ import annotations

import pytest

from wsp_compiler.speed import MEASURED, MODEL, OTHER_KERNELS, TABLE, SiteTimes, Timing, add_timings


@pytest.mark.parametrize(
    ("pruned", "dense", "slower"), [(2.0, 3.0, False), (3.0, 2.0, True), (2.0, 2.0, True), (None, 2.0, False)]
)
def test_slower_needs_both_times(pruned: float | None, dense: float | None, slower: bool) -> None:
    ours = None if pruned is None else Timing(pruned, MEASURED)
    theirs = None if dense is None else Timing(dense, MEASURED)
    assert SiteTimes(ours, theirs).slower is slower
    assert SiteTimes(ours, None).slower is False


def test_text() -> None:
    assert SiteTimes(Timing(12.34, MEASURED), Timing(9, MEASURED)).text() == (
        "12.3 us pruned, 9 us dense (measured)"
    )
    assert "12345 us pruned" in SiteTimes(Timing(12345.4, MEASURED), Timing(9, MEASURED)).text()
    mixed = SiteTimes(Timing(1, MODEL), Timing(2, TABLE)).text()
    assert mixed.endswith("(cost model, table)")
    assert SiteTimes(Timing(1, MODEL), None).text() == "speed not checked"


def test_the_sum_is_as_certain_as_its_least_certain_part() -> None:
    total = add_timings([Timing(1, MEASURED, "a"), Timing(2, MODEL, "b"), Timing(4, TABLE, "a")])
    assert total == Timing(7, MODEL, "a, b")
    assert add_timings([Timing(1, TABLE), Timing(1, OTHER_KERNELS)]) == Timing(2, OTHER_KERNELS)


def test_one_unknown_call_makes_the_sum_unknown() -> None:
    assert add_timings([Timing(1, MEASURED), None]) is None
    assert add_timings([]) is None
