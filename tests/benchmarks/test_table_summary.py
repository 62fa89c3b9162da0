"""table_summary: which records ship, and the lines printed about them."""

from __future__ import annotations

from pathlib import Path

from benchmarks.cases import CASES
from benchmarks.table_summary import kept, summary
from benchmarks.tune_table import Job, make_site, make_spec
from wsp_compiler.codegen.schedule_keys import layer_key, vendor_key
from wsp_compiler.codegen.schedule_records import VENDOR, Record
from wsp_compiler.codegen.targets import cpu_target

JOB = Job(CASES["64@56"], 2, "fp32", 2, 0.8)


def test_what_ships_has_the_fastest_and_a_sample(tmp_path: Path) -> None:
    key = layer_key(make_spec(JOB), make_site(JOB), 2, cpu_target())
    records = [Record(key, "cpu", {"i": i}, 100.0 - i) for i in range(20)]
    records += [Record(key, "cpu", {"i": i}, None, "no") for i in range(20, 30)]
    found = list(kept(records, 4))
    assert [r.us for r in found[:4]] == [81.0, 82.0, 83.0, 84.0]
    assert [r.us for r in found[4:8]] == [85.0, 89.0, 93.0, 97.0]
    assert [r.us for r in found[8:]] == [None, None]


def test_a_layer_stands_beside_the_vendor_of_its_shape_and_threads() -> None:
    jobs = [
        Job(CASES[name], 1, "fp32", 2, 0.8, threads) for name in ("512@7", "256-512@28") for threads in (1, 2)
    ]
    records: list[Record] = []
    for i, job in enumerate(jobs, start=1):
        job.begin()
        spec = make_spec(job)
        records.append(Record(vendor_key(spec, 1, cpu_target()), VENDOR, {}, 100.0 * i))
        records.append(Record(layer_key(spec, make_site(job), 1, cpu_target()), "cpu", {"rows": 4}, 10.0))
    lines = summary(records).splitlines()
    cells = [line.split() for line in lines if " N=1 " in line]
    assert [row[0] for row in cells] == ["512@7", "512@7", "256-512@28", "256-512@28"]
    assert [row[-3] for row in cells] == ["10.00", "20.00", "30.00", "40.00"]
    assert any(
        line.startswith("fp32 F2 threads=2") and "over 2 layers, least 20.00" in line for line in lines
    )


def test_summary_of_nothing() -> None:
    assert "layer" in summary([])
