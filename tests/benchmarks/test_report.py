from benchmarks.report import baseline_lines, failure_lines, text_table, time_cell, verdict_lines
from benchmarks.results import Row

ROWS: list[Row] = [
    {"name": "a", "ratios": {"x": 2.0, "y": 3.0}, "strongest_ratio": 2.0, "failure": None},
    {"name": "b", "ratios": {"x": 8.0}, "strongest_ratio": 8.0, "failure": None},
    {"name": "c", "failure": "RuntimeError: no"},
]


def test_baseline_lines() -> None:
    assert baseline_lines(ROWS) == [
        "vs x: geomean 4.000x, minimum 2.000x (a), 2 cases",
        "vs y: geomean 3.000x, minimum 3.000x (a), 1 case",
    ]


def test_verdict_counts_what_failed() -> None:
    geomean, minimum = verdict_lines(ROWS)
    assert geomean == "geomean 4.000x over the strongest baseline of each case (2 of 3 cases)"
    assert minimum == "minimum 2.000x (a)"


def test_verdict_without_a_success() -> None:
    assert verdict_lines(ROWS[2:]) == ["geomean - (none of 1 cases succeeded)", "minimum -"]
    assert failure_lines(ROWS) == ["FAILED c: RuntimeError: no"]


def test_table_and_cells() -> None:
    assert text_table(["name", "us"], [["a", "1"], ["long name", "100"]]).splitlines() == [
        "name        us",
        "a            1",
        "long name  100",
    ]
    assert [time_cell(26.71, 1.571), time_cell(2822.4), time_cell(None)] == ["26.71 (1.57x)", "2822", "-"]
