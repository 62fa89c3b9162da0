"""Figures are small PNGs; what is missing is named."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.accuracy import figures
from benchmarks.accuracy.models import make
from benchmarks.results import Row, new_record

pytest.importorskip("matplotlib")


def row(experiment: str, **other: object) -> Row:
    base: Row = {"experiment": experiment, "network": "resnet20", "seed": 0, "failure": None, "method": "wsp"}
    base |= {"pr": 0.8, "accuracy": 0.9, "outlook": 0.5, "outlook_test": 0.5, "one_shot": 0.1, "epochs": 10}
    base |= {"importance": "l2", "calibrated": False, "tile": 2} | other
    return base | {"name": "/".join(str(value) for value in base.values())}


ROWS = [
    row("dense", method="dense", pr=0.0),
    *(row("methods", method=m, pr=pr, seed=s) for m in ("wsp", "fp") for pr in (0.4, 0.8) for s in (0, 1)),
    *(row("epochs", pr=pr, epochs=e) for pr in (0.4, 0.8) for e in (1, 10)),
    *(row("outlook", outlook=x / 10, accuracy=x / 9, candidate=x) for x in range(5)),
    *(
        row("ablation", importance=i, calibrated=c)
        for i, c in (("l2", False), ("output", False), ("output", True))
    ),
    *(row("tiles", tile=tile, pr=0.5) for tile in (2, 4)),
]


@pytest.fixture
def record(tmp_path: Path) -> Path:
    found = new_record("benchmarks.accuracy.run", [], "cpu")
    found.rows = ROWS
    found.save(tmp_path / "r.json")
    return tmp_path / "r.json"


def test_all_figures(record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speed = new_record("benchmarks.accuracy.speed", [], "cpu")
    for index, item in enumerate(item for item in ROWS if item["experiment"] == "methods"):
        times = {"strongest_ratio": 1 + index / 10, "winograd_ratio": 2.0}
        speed.rows.append({"name": item["name"], "failure": None} | times)
    speed.save(tmp_path / "s.json")
    torch.save(make("resnet20", 10).state_dict(), tmp_path / "dense.pt")
    given = ["--speed", str(tmp_path / "s.json"), "--dense", str(tmp_path / "dense.pt")]
    assert figures.main(["all", str(record), str(tmp_path / "png"), *given]) == 0
    assert capsys.readouterr().out.count("wrote") == len(figures.FIGURES)
    for kind in figures.FIGURES:
        content = (tmp_path / "png" / f"accuracy_{kind}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) < 150_000


def test_what_is_missing_is_named(record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        figures.main(["front", str(record), str(tmp_path)])
    assert "needs --speed" in capsys.readouterr().err
    empty = new_record("benchmarks.accuracy.run", [], "cpu")
    empty.save(record)
    assert figures.main(["all", str(record), str(tmp_path)]) == 0
    assert "no methods: the record has no rows" in capsys.readouterr().out


def test_keep_pictures_show_signs_position_by_position() -> None:
    weight = torch.zeros(16, 2, 3)
    weight[0, 0, 0], weight[5, 1, 2] = 2.0, -1.0
    image = figures.keep_image(weight)
    assert image.shape == (4 * 3, 4 * 4)
    assert image[0, 0] == 1
    assert image[3 + 1, 4 + 2] == -1  # position 5: second row, second column
    assert int((image == 0).sum()) == 16 * 6 - 2
    assert int(image.isnan().sum()) == 16 * (3 * 4 - 6)


def test_places_without_a_panel_are_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[bool] = []

    def five(panels: Any, rows: Any, given: Any) -> None:
        assert len(panels(5)) == 5

    def save(figure: Any, path: Path, dpi: int) -> None:
        shown.extend(axes.axison for axes in figure.axes)

    monkeypatch.setitem(figures.FIGURES, "five", five)
    monkeypatch.setattr(figures, "save_figure", save)
    found = new_record("benchmarks.accuracy.run", [], "cpu")
    figures.draw("five", found, tmp_path / "five.png", argparse.Namespace())
    assert shown == [True] * 5 + [False]
