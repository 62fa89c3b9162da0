"""tune_table: the jobs, what is kept, and a run from start to finish with a timer that makes times up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import tune_table
from benchmarks.cases import CASES
from benchmarks.tune_table import (
    Builders,
    Job,
    earlier_best,
    main,
    make_jobs,
    make_site,
    make_spec,
    neighbours_best,
    pick,
    prepare,
)
from wsp_compiler.codegen import cuda_launch, measure
from wsp_compiler.codegen.candidates import Candidate
from wsp_compiler.codegen.cuda_fused_launch import DeviceLimits
from wsp_compiler.codegen.layer import make_layer
from wsp_compiler.codegen.schedule_keys import layer_key
from wsp_compiler.codegen.schedule_records import VENDOR, Record
from wsp_compiler.codegen.schedules import Schedules, load_table
from wsp_compiler.codegen.spec import FusedConfig
from wsp_compiler.codegen.targets import CodeTarget, cpu_target
from wsp_compiler.codegen.tuner import Tuner

JOB = Job(CASES["64@56"], 2, "fp32", 2, 0.8)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The n-th label measured takes n us, the vendor 100 us; three rows never run. Counts of labels."""
    counts: list[int] = []

    def times(calls: Mapping[str, Any], inputs: Mapping[str, Sequence[Tensor]]) -> Any:
        counts.append(len(calls))
        found = {label: 100.0 if "cpu" not in label else 1.0 + i for i, label in enumerate(calls)}
        bad = {label: "RuntimeError: no" for label in calls if "rows=3 " in label}
        return {label: us for label, us in found.items() if label not in bad}, bad

    monkeypatch.setattr(measure, "measure", times)
    return counts


def test_the_first_ratio_of_everything_comes_first() -> None:
    jobs = make_jobs([(CASES["64@56"], 1), (CASES["512@7"], 8)], ["fp16", "tf32"], [2, 4], [0.8, 0.5])
    assert len(jobs) == 16
    assert {job.pr for job in jobs[:8]} == {0.8}
    assert [job.precision for job in jobs[:8]] == ["fp16"] * 4 + ["tf32"] * 4
    assert jobs[0].name == "64@56 N=1 fp16 F2 pr=0.8"


@pytest.mark.parametrize("pr", [0.8, 0.0])
@pytest.mark.parametrize("tile", [2, 4])
def test_sites_are_those_of_real_plans(pr: float, tile: int) -> None:
    job = Job(CASES["512@7"], 1, "fp16", tile, pr)
    site, spec = make_site(job), make_spec(job)
    positions = (tile + 2) ** 2
    rows = site.row_offset.diff()
    assert rows.numel() == positions
    assert set(rows.tolist()) == {512 if pr == 0 else 4 * 26}
    assert (spec.dtype, spec.precision, spec.tile, spec.activation) == ("float16", "fp16", tile, "relu")
    assert spec.rows_pruned == (pr > 0)
    key = layer_key(spec, site, 1, cpu_target())
    assert key.block == (8 if pr == 0 else 128)


def test_the_default_is_picked_and_some_by_chance(tmp_path: Path) -> None:
    spec, site = make_spec(JOB), make_site(JOB)
    target = cpu_target()
    candidates = make_layer(spec, site, None, target).candidates(1)
    tuner = Tuner(target, "off", Schedules(None, None))
    key = layer_key(spec, site, 2, target)
    chosen = pick(tuner, key, candidates, 4, seed=1)
    assert chosen[0] == candidates[0]
    assert len(set(chosen)) == 4
    assert pick(tuner, key, candidates, 99, seed=1) == candidates


def test_threads_are_part_of_a_job() -> None:
    jobs = make_jobs([(CASES["512@7"], 1)], ["fp32"], [2], [0.8, 0.0], [2, 1])
    assert [(job.pr, job.threads) for job in jobs] == [(0.8, 2), (0.8, 1), (0.0, 2), (0.0, 1)]
    tuner = Tuner(cpu_target(), "off", Schedules(None, None))
    builders = Builders(cpu_target(), 1)
    assert [prepare(job, tuner, builders, 2).key.threads for job in jobs[:2]] == [2, 1]
    assert jobs[1].name == "512@7 N=1 fp32 F2 pr=0.8 threads=1"


def test_a_run_writes_a_table_and_goes_on_where_it_stopped(
    timed: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tables" / "cpu.json"
    arguments = ["--device", "cpu", "--out", str(out), "--cases", "512@7", "--pr", "0.8", "--most", "4"]
    assert main([*arguments, "--tile", "2"]) == 0
    records = load_table(out)
    assert sum(record.kind == VENDOR for record in records) == 1
    assert sum(record.kind == "cpu" for record in records) in (3, 4)
    printed = capsys.readouterr().out
    assert "512@7 N=1 fp32 F2 rows=104" in printed
    assert "100.0" in printed
    assert json.loads(out.read_text())["notes"]["environment"]["torch"] == torch.__version__
    before = len(timed)
    assert main([*arguments, "--tile", "2"]) == 0
    assert len(timed) == before  # all is known
    assert main([*arguments, "--tile", "2", "4"]) == 0
    assert len(timed) > before
    keys = {record.key.tile for record in load_table(out)}
    assert keys == {0, 2, 4}


def test_the_budget_ends_a_run(
    timed: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr(tune_table.time, "monotonic", lambda: next(clock))
    out = tmp_path / "t.json"
    assert main(["--device", "cpu", "--out", str(out), "--cases", "eight", "--budget", "250"]) == 0
    assert "the budget was spent after" in capsys.readouterr().out


def test_a_layer_that_fails_costs_only_itself(
    timed: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tune_table.make_site

    def broken(job: Job) -> Any:
        if job.tile == 2:
            raise RuntimeError("no weights")
        return original(job)

    monkeypatch.setattr(tune_table, "make_site", broken)
    out = tmp_path / "t.json"
    assert main(["--device", "cpu", "--out", str(out), "--cases", "512@7", "--pr", "0.8", "--most", "2"]) == 0
    assert {record.key.tile for record in load_table(out)} == {0, 4}
    assert "no weights" in capsys.readouterr().err


def test_bad_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, message in (
        (["--cases", "nine"], "unknown case"),
        (["--dtype", "fp16"], "not timed on --device cpu"),
        (["--pr", "1"], "not a fraction"),
    ):
        with pytest.raises(SystemExit):
            main(["--device", "cpu", "--out", str(tmp_path / "t.json"), *arguments])
        assert message in capsys.readouterr().err


def test_workers_report_what_does_not_build() -> None:
    """On a machine without a GPU a worker still makes the kernels; here the candidate is of another device."""
    target = CodeTarget(torch.device("cuda", 0), "sm_90", 0)
    candidate = make_layer(make_spec(JOB), make_site(JOB), None, cpu_target()).candidates(1)[0]
    assert tune_table._build(JOB, cpu_target(), candidate).startswith("AttributeError")
    assert tune_table._build(JOB, target, candidate) == ""
    builders = Builders(cpu_target(), 4)
    assert builders.start(JOB, [candidate]) == []
    builders.close()
    assert builders.pool is None


def test_neighbours_at_other_ratios_come_with_the_layers_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 filters at pr=0.8 keep 13 rows and want 16; at pr=0.6 two groups of 32 keep 13 each."""
    limits = DeviceLimits(132, 227 * 1024, 228 * 1024)
    monkeypatch.setattr(cuda_launch, "device_limits", lambda index: limits)
    job = replace(JOB, case=CASES["64@56"], precision="fp16", batch=32)
    target = CodeTarget(torch.device("cuda", 0), "sm_90", 0)
    spec, site = make_spec(job), make_site(job)
    layer, key = make_layer(spec, site, None, target), layer_key(spec, site, 32, cpu_target())
    config = FusedConfig(tile=2, tiles=16, groups=1, rows=32)
    other = replace(key, rows=(key.rows[0] + 8, key.rows[1] + 16))
    records = [
        Record(other, "fused", asdict(config), 20.0),
        Record(other, "fused", {"knob": "of another version"}, 1.0),
        Record(replace(other, height=28), "fused", asdict(replace(config, tiles=8)), 1.0),
        Record(key, "fused", asdict(replace(config, tiles=8)), 1.0),
    ]
    (found,) = neighbours_best(records, key, layer)
    assert found == Candidate("fused", replace(config, rows=16))


def test_an_earlier_versions_best_are_measured_again() -> None:
    spec, site = make_spec(JOB), make_site(JOB)
    target = cpu_target()
    key = layer_key(spec, site, 1, target)
    candidates = make_layer(spec, site, None, target).candidates(1)
    old = [
        Record(replace(key, generator="old"), c.kind, c.knobs(), us)
        for c, us in zip(candidates, (3.0, 1.0, 2.0), strict=False)
    ]
    found = earlier_best(
        [*old, Record(replace(key, batch=7), candidates[3].kind, candidates[3].knobs(), 0.5)], key
    )
    assert found == [candidates[1], candidates[2], candidates[0]]
    tuner = Tuner(target, "off", Schedules(None, None))
    assert pick(tuner, key, candidates, 3, 1, found[:1])[0] == candidates[1]
