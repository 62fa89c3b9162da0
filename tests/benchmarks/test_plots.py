"""Figures are drawn from records; what they show is computed here again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import plots
from benchmarks.results import Record


def row(name: str, batch: int, pr: float, us: float, **more: Any) -> dict[str, Any]:
    case = {"name": f"{name} N={batch} pr={pr:g}", "case": name, "batch": batch, "pr": pr, "dtype": "fp16"}
    ratios = {"cudnn_fp16": 20 / us, "cudnn_winograd": 100 / us}
    times = {"ours_us": us, "ratios": ratios, "strongest_ratio": 20 / us, "direct_multiplies": 10**9}
    return {**case, **times, "failure": None, **more}


@pytest.fixture
def record() -> Record:
    rows = [row(name, 32, pr, 10 / (1 + pr)) for name in ("64@56", "64@360x640") for pr in (0.8, 0.0, 0.4)]
    return Record(
        "command", {"device": "a device"}, "commit", "date", [*rows, {"name": "x", "failure": "why"}]
    )


class Axes:
    """Notes what is drawn."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self.calls.append((name, args, options))

    def of(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, options) for called, args, options in self.calls if called == name]


def test_bars(record: Record) -> None:
    axes = Axes()
    plots.bars(axes, record)
    drawn = axes.of("bar")
    assert [options["label"].split()[0] for _, options in drawn] == ["cudnn_fp16", "cudnn_winograd"]
    assert drawn[0][0][1] == pytest.approx([3.6, 2.0, 2.8] * 2)
    assert "geomean 2.72x" in drawn[0][1]["label"]


def test_sweep_lines_are_sorted_by_the_pruning_ratio(record: Record) -> None:
    axes = Axes()
    plots.sweep(axes, record)
    lines = axes.of("plot")
    assert [options["label"] for _, options in lines] == ["64@56 N=32", "64@360x640 N=32"]
    assert list(lines[0][0][0]) == [0.0, 0.4, 0.8]
    assert list(lines[0][0][1]) == pytest.approx([2.0, 2.8, 3.6])


def test_roofline_points() -> None:
    intensity, speed = plots.roofline_point(row("64@360x640", 2, 0.8, 1000.0))
    assert intensity == pytest.approx(2e9 / (2 * (2 * 2 * 64 * 360 * 640 + 9 * 64 * 64)))
    assert speed == pytest.approx(2.0)


@pytest.mark.parametrize("kind", plots.KINDS)
def test_pictures(kind: str, record: Record, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "record.json", tmp_path / "figures" / "a.png"
    record.save(file)
    assert plots.main([kind, str(file), str(picture)]) == 0
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert 5000 < len(data) < plots.MOST_BYTES


def test_a_record_without_results_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no row that succeeded"):
        plots.good_rows(Record("", {}, "", "", [{"failure": "why"}]))
    with pytest.raises(SystemExit):
        plots.main(["bars", str(tmp_path / "missing.json"), str(tmp_path / "a.png")])
    assert "missing.json" in capsys.readouterr().err
