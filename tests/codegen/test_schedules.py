"""The schedule database: files, priorities, damage, several processes."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from wsp_compiler.codegen import schedules as module
from wsp_compiler.codegen.schedules import (
    Schedules,
    append_records,
    load_table,
    open_schedules,
    parse_lines,
    save_table,
    table_directory,
)
from wsp_compiler.speed import MEASURED, OTHER_KERNELS, TABLE

from .test_schedule_records import KEY, RECORD


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "own" / "schedules.jsonl"


def times(found: tuple[list[module.Record], str]) -> tuple[list[float | None], str]:
    return [record.us for record in found[0]], found[1]


def test_what_is_added_is_found_now_and_later(path: Path) -> None:
    database = Schedules(path, None)
    assert database.find(KEY)[0] == []
    database.add([RECORD])
    assert times(database.find(KEY)) == ([RECORD.us], MEASURED)
    assert times(Schedules(path, None).find(KEY)) == ([12.3457], MEASURED)
    assert len(path.read_text().splitlines()) == 1


def test_a_later_measurement_replaces_an_earlier_one(path: Path) -> None:
    database = Schedules(path, None)
    database.add([RECORD])
    database.add([dataclasses.replace(RECORD, us=2.0)])
    assert times(database.find(KEY)) == ([2.0], MEASURED)
    assert times(Schedules(path, None).find(KEY)) == ([2.0], MEASURED)


def test_own_records_come_before_shipped_exact_before_near_and_current_before_old(
    path: Path, tmp_path: Path
) -> None:
    plain, old = dataclasses.replace(KEY, epilogue="none"), dataclasses.replace(KEY, generator="old")
    shipped = [dataclasses.replace(RECORD, us=5.0, kind=kind) for kind in ("fused", "three_kernels")]
    save_table(tmp_path / "t" / "gpu.json", shipped, {"note": "x"})
    database = Schedules(path, tmp_path / "t")
    assert times(database.find(KEY)) == ([5.0, 5.0], TABLE)
    assert times(database.find(plain)) == ([5.0, 5.0], TABLE)
    assert times(database.find(dataclasses.replace(KEY, generator="new"))) == ([5.0, 5.0], OTHER_KERNELS)
    database.add([dataclasses.replace(RECORD, key=plain, us=3.0)])
    assert times(database.find(KEY)) == ([5.0, 5.0], TABLE)
    assert times(database.find(plain)) == ([3.0], MEASURED)
    database.add([dataclasses.replace(RECORD, us=4.0)])
    assert times(database.find(KEY)) == ([4.0], MEASURED)
    assert len(database.records) == 3  # the own one of the same identity hides a shipped one
    database.add([dataclasses.replace(RECORD, key=old, us=1.0)])
    assert times(database.find(dataclasses.replace(KEY, generator="new"))) == ([5.0, 5.0], OTHER_KERNELS)
    for other in ({"batch": 1}, {"threads": 2}, {"device": "other"}, {"rows": (24, 24)}, {"block": 0}):
        assert database.find(dataclasses.replace(KEY, **other))[0] == []


def test_damaged_lines_cost_only_themselves(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    append_records(path, [RECORD])
    with path.open("ab") as file:
        file.write(b"\xff\xfe not json\n{}\n\n" + b'{"key": ')  # the last one torn by a crash
    append_records(path, [dataclasses.replace(RECORD, kind="three_kernels")])
    with caplog.at_level(logging.WARNING):
        database = Schedules(path, None)
    assert {record.kind for record in database.records} == {"fused", "three_kernels"}
    assert len(caplog.records) == 3
    assert all("skipped" in record.message for record in caplog.records)


def test_damaged_tables_count_as_empty(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, text in enumerate(("", "[]", '{"layers": [{}]}', '{"layers": 3}')):
        file = tmp_path / f"{number}.json"
        file.write_text(text)
        with caplog.at_level(logging.WARNING):
            assert load_table(file) == []
    assert len(caplog.records) == 4


def test_tables_come_back(tmp_path: Path) -> None:
    records = [RECORD, dataclasses.replace(RECORD, kind="three_kernels", us=None, error="no")]
    save_table(tmp_path / "a" / "gpu.json", records, {"torch": "2"})
    back = load_table(tmp_path / "a" / "gpu.json")
    assert [record.identity for record in back] == [record.identity for record in records]
    assert back[1].error == "no"
    assert json.loads((tmp_path / "a" / "gpu.json").read_text())["notes"] == {"torch": "2"}
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["gpu.json"]


def test_an_unwritable_place_is_reported_and_harmless(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    database = Schedules(tmp_path / "file" / "schedules.jsonl", None)
    with caplog.at_level(logging.WARNING):
        database.add([RECORD])
    assert "not writable" in caplog.text
    assert times(database.find(KEY)) == ([RECORD.us], MEASURED)


WRITER = """
import dataclasses, pathlib, sys
from tests.codegen.test_schedule_records import RECORD
from wsp_compiler.codegen.schedules import append_records
for i in range(50):
    knobs = {"writer": sys.argv[2], "i": i, "long": "x" * 3000}
    append_records(pathlib.Path(sys.argv[1]), [dataclasses.replace(RECORD, knobs=knobs)] * 2)
"""


def test_processes_may_write_at_the_same_time(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = Path(__file__).resolve().parents[2]
    commands = [[sys.executable, "-c", WRITER, str(path), str(number)] for number in range(3)]
    running = [subprocess.Popen(command, cwd=root) for command in commands]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    with caplog.at_level(logging.WARNING):
        records = parse_lines(path.read_text(), "file")
    assert len(records) == 300
    assert not caplog.records
    assert len(Schedules(path, None).records) == 150


def test_where_the_database_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WSP_CACHE_DIR", str(tmp_path))
    assert open_schedules().path == tmp_path / "schedules.jsonl"
    monkeypatch.setenv("WSP_CACHE_DIR", "")
    assert open_schedules().path is None
    monkeypatch.setenv("WSP_TABLE_DIR", str(tmp_path / "t"))
    assert table_directory() == tmp_path / "t"
    monkeypatch.setenv("WSP_TABLE_DIR", "")
    assert open_schedules().tables is None
    monkeypatch.delenv("WSP_TABLE_DIR")
    shipped = table_directory()
    assert shipped is not None
    assert shipped.name == "tables"


def test_copies_share_what_is_known(path: Path) -> None:
    database = Schedules(path, None)
    assert copy.deepcopy(database) is database


def test_less_pruned_records_are_the_nearest_with_at_least_as_many_rows() -> None:
    schedules = Schedules(None, None)
    key = dataclasses.replace(KEY, rows=(24, 24), block=64)
    times = {(16, 16): 1.0, (32, 32): 3.0, (40, 40): 2.0, (64, 64): 0.5}
    schedules.add(
        [
            module.Record(dataclasses.replace(key, rows=rows), "cpu", {"rows": 1}, us)
            for rows, us in times.items()
        ]
    )
    schedules.add(
        [module.Record(dataclasses.replace(key, rows=(32, 32), generator="other"), "cpu", {"rows": 1}, 0.1)]
    )
    assert [record.us for record in schedules.less_pruned(key)] == [3.0]
    assert [record.us for record in schedules.less_pruned(dataclasses.replace(key, rows=(40, 40)))] == [2.0]
    assert schedules.less_pruned(dataclasses.replace(key, rows=(72, 72))) == []
    assert schedules.less_pruned(dataclasses.replace(key, rows=(8, 24))) == [], "other mean, unbalanced"


def test_other_groups_are_those_of_shipped_records_alone(path: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(KEY, block=KEY.block + 8)
    save_table(tmp_path / "tables" / "one.json", [module.Record(other, "cpu", {"rows": 1}, 2.0)], {})
    schedules = Schedules(path, tmp_path / "tables")
    schedules.add([module.Record(other, "cpu", {"rows": 2}, 1.0)])
    assert [record.us for record in schedules.in_other_groups(KEY)] == [2.0]
    assert schedules.in_other_groups(dataclasses.replace(KEY, epilogue="another")) == []
    assert schedules.in_other_groups(dataclasses.replace(KEY, rows=(8, 8))) == []
