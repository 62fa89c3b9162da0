"""Cold and warm first calls; the processes themselves are slow and started once."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import first_call
from benchmarks.results import ROOT, load


def test_cold_then_warm_share_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    caches: list[str] = []

    def fake(about: dict[str, Any], cache: str) -> dict[str, Any]:
        caches.append(cache)
        assert Path(cache).is_dir()
        return {"compile_s": 3.0 / len(caches), "first_result_s": 4.0 / len(caches), "failure": None}

    monkeypatch.setattr(first_call, "measure_once", fake)
    file = tmp_path / "record.json"
    assert first_call.main(["--device", "cpu", "--json", str(file)]) == 0
    rows = load(file).rows
    assert [(row["name"], row["first_result_s"]) for row in rows] == [
        ("resnet18 cold", 4.0),
        ("resnet18 warm", 2.0),
    ]
    assert len(set(caches)) == 1
    assert not Path(caches[0]).exists()
    assert "resnet18 warm" in capsys.readouterr().out


def test_a_failing_process_is_a_failed_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(first_call, "CHILD", "raise SystemExit('no such device')")
    assert first_call.measure_once({}, str(tmp_path)) == {"failure": "no such device"}
    file = tmp_path / "record.json"
    assert first_call.main(["--device", "cpu", "--json", str(file)]) == 1
    assert [row["failure"] for row in load(file).rows] == ["no such device"] * 2


def test_processes_find_the_packages_that_this_one_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend("somewhere")
    done = subprocess.CompletedProcess([], 0, json.dumps({"first_result_s": 1.0}), "")

    def run(command: list[str], *, env: dict[str, str], **_: Any) -> Any:
        assert env["PYTHONPATH"].split(os.pathsep)[:2] == [str(ROOT), "somewhere"]
        assert env["WSP_CACHE_DIR"] == "cache"
        return done

    monkeypatch.setattr(subprocess, "run", run)
    assert first_call.measure_once({}, "cache") == {"first_result_s": 1.0, "failure": None}
