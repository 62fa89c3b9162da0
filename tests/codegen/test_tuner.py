"""Tuner: what is chosen and what is measured, with a timer that makes times up."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wsp_compiler.codegen import tuner as module
from wsp_compiler.codegen.candidates import Candidate, candidate_from_knobs
from wsp_compiler.codegen.cuda_launch import CudaLayer
from wsp_compiler.codegen.measure import Call
from wsp_compiler.codegen.schedule_keys import layer_key, vendor_key
from wsp_compiler.codegen.schedule_records import VENDOR, Record
from wsp_compiler.codegen.schedules import Schedules, save_table
from wsp_compiler.codegen.spec import CpuConfig, KernelSpec, ThreeKernelsConfig
from wsp_compiler.codegen.targets import CodeTarget, cuda_target
from wsp_compiler.codegen.tuner import FAST_CANDIDATES, Choice, Tuner
from wsp_compiler.ops import WinogradSite
from wsp_compiler.speed import LESS_PRUNED, MEASURED, MODEL, OTHER_KERNELS, TABLE, Timing

from .emulation import TOLERANCE, assert_close, make_case

TARGET = CodeTarget(torch.device("cpu"), "x86-64", 4)
CANDIDATES = [Candidate("cpu", CpuConfig(4, rows, 2)) for rows in range(1, 13)]


@dataclass
class Layer:
    """Twelve candidates that do nothing; knows what it was told to use."""

    spec: KernelSpec
    site: WinogradSite
    target: CodeTarget = TARGET
    used: list[Candidate] = field(default_factory=list[Candidate], init=False)
    residuals: list[Tensor | None] = field(default_factory=list, init=False)

    def candidates(self, tiles: int) -> list[Candidate]:
        return CANDIDATES

    def accepts(self, candidate: Candidate) -> bool:
        return candidate in CANDIDATES

    def use(self, candidate: Candidate, tiles: int) -> None:
        self.used.append(candidate)

    def run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        assert self.used, "measured without a candidate"
        return x


@dataclass
class FakeTimer:
    """Gives each label the microseconds of ``time(label)``; negative ones fail. Runs every call once."""

    time: Any
    measured: list[list[str]] = field(default_factory=list[list[str]])

    def __call__(
        self, calls: Mapping[str, Call], inputs: Mapping[str, Sequence[Tensor]]
    ) -> tuple[dict[str, float], dict[str, str]]:
        self.measured.append(list(calls))
        for label, call in calls.items():
            call(inputs[label][0])
        times = {label: float(self.time(label)) for label in calls}
        good = {label: us for label, us in times.items() if us > 0}
        return good, {label: "failed" for label in times if label not in good}


def rows_of(label: str) -> int:
    return int(label.partition("rows=")[2].split()[0]) if "rows=" in label else 0


def by_rows(label: str) -> float:
    """Seven rows are best; the vendor takes 50 us."""
    return 10.0 + abs(rows_of(label) - 7) if "rows=" in label else 50.0


@pytest.fixture
def layer() -> Layer:
    case = make_case(filters=16, channels=16, activation="relu", pr=0.5)
    return Layer(case.spec, case.site)


@pytest.fixture
def schedules(tmp_path: Path) -> Schedules:
    return Schedules(tmp_path / "schedules.jsonl", tmp_path / "tables")


def test_off_measures_nothing_and_knows_nothing(layer: Layer, schedules: Schedules) -> None:
    timer = FakeTimer(by_rows)
    tuner = Tuner(TARGET, "off", schedules, timer)
    choice = tuner.choose(layer, 2)
    assert (choice.candidate, choice.timing) == (CANDIDATES[0], None)
    assert tuner.dense(layer.spec, 2) is None
    assert not tuner.knows_device
    assert not timer.measured
    assert not layer.used


def test_the_time_of_a_less_pruned_layer_is_an_upper_bound(layer: Layer, schedules: Schedules) -> None:
    key = layer_key(layer.spec, layer.site, 2, TARGET)
    more = dataclasses.replace(key, rows=(key.rows[0] + 8, key.rows[1] + 8), block=0)
    fewer = dataclasses.replace(key, rows=(0, 0), block=0)
    times = {(more, 4): 12.0, (more, 5): 11.0, (fewer, 6): 1.0}
    schedules.add([Record(k, "cpu", CANDIDATES[i].knobs(), us) for (k, i), us in times.items()])
    choice = Tuner(TARGET, "off", schedules, FakeTimer(by_rows)).choose(layer, 2)
    assert choice.candidate == CANDIDATES[5]
    assert choice.timing == Timing(11.0, LESS_PRUNED, CANDIDATES[5].label)
    exact = Record(key, "cpu", CANDIDATES[0].knobs(), 20.0)
    schedules.add([exact])
    assert Tuner(TARGET, "off", schedules, FakeTimer(by_rows)).choose(layer, 2).candidate == CANDIDATES[0]


def test_as_many_rows_in_other_groups_say_what_is_faster(layer: Layer, tmp_path: Path) -> None:
    key = layer_key(layer.spec, layer.site, 2, TARGET)
    other = dataclasses.replace(key, block=key.block + 8)
    unlike = [
        dataclasses.replace(other, epilogue="none"),
        dataclasses.replace(other, rows=(key.rows[0] + 8,) * 2),
    ]
    times = {(key, 4): 15.0, (other, 5): 11.0, **{(another, 6): 9.0 for another in unlike}}
    records = [Record(k, "cpu", CANDIDATES[i].knobs(), us) for (k, i), us in times.items()]
    save_table(tmp_path / "tables" / "device.json", records, {})
    shipped = Schedules(tmp_path / "schedules.jsonl", tmp_path / "tables")
    choice = Tuner(TARGET, "off", shipped, FakeTimer(by_rows)).choose(layer, 2)
    assert choice == Choice(CANDIDATES[5], Timing(11.0, TABLE, CANDIDATES[5].label))
    shipped.add([Record(unlike[0], "cpu", CANDIDATES[2].knobs(), 8.0)])
    assert Tuner(TARGET, "off", shipped, FakeTimer(by_rows)).choose(layer, 2) == choice
    shipped.add([Record(key, "cpu", CANDIDATES[3].knobs(), 14.0)])
    own = Tuner(TARGET, "off", shipped, FakeTimer(by_rows)).choose(layer, 2)
    assert own.timing == Timing(14.0, MEASURED, CANDIDATES[3].label), "what the user measured counts more"


@pytest.mark.parametrize(("best_us", "chosen"), [(19.0, 0), (15.0, 3)])
def test_the_default_stays_where_another_is_faster_by_noise(
    layer: Layer, schedules: Schedules, best_us: float, chosen: int
) -> None:
    key = layer_key(layer.spec, layer.site, 2, TARGET)
    times = {0: 20.0, 3: best_us}
    schedules.add([Record(key, "cpu", CANDIDATES[i].knobs(), us) for i, us in times.items()])
    choice = Tuner(TARGET, "off", schedules, FakeTimer(by_rows)).choose(layer, 2)
    assert choice.candidate == CANDIDATES[chosen]
    assert choice.timing == Timing(times[chosen], MEASURED, CANDIDATES[chosen].label)


def test_full_measures_everything_once(layer: Layer, schedules: Schedules) -> None:
    timer = FakeTimer(by_rows)
    said: list[str] = []
    tuner = Tuner(TARGET, "full", schedules, timer, on_measure=said.append)
    choice = tuner.choose(layer, 2)
    assert choice.candidate == CANDIDATES[6]
    assert choice.timing is not None
    assert (choice.timing.us, choice.timing.source, choice.timing.kernel) == (
        10.0,
        MEASURED,
        choice.candidate.label,
    )
    assert [len(labels) for labels in timer.measured] == [12]
    assert tuner.choose(layer, 2) == choice
    assert tuner.choose(layer, 3).candidate == CANDIDATES[6]  # another batch is another layer
    assert [len(labels) for labels in timer.measured] == [12, 12]
    assert said == [f"measuring 12 kernels for 16x16 @ 7x9, N={n}" for n in (2, 3)]
    assert not layer.used  # trials run on layers of their own
    again = Tuner(TARGET, "off", Schedules(schedules.path, None))
    found = again.choose(layer, 2)
    assert found.candidate == CANDIDATES[6]
    assert found.timing is not None
    assert found.timing.source == MEASURED
    assert again.knows_device


def test_fast_measures_a_few_and_the_default(layer: Layer, schedules: Schedules) -> None:
    timer = FakeTimer(by_rows)
    tuner = Tuner(TARGET, "fast", schedules, timer)
    choice = tuner.choose(layer, 2)
    (labels,) = timer.measured
    assert len(labels) == FAST_CANDIDATES
    assert rows_of(labels[0]) == 1
    assert choice.timing is not None
    assert choice.timing.us == min(map(by_rows, labels))
    tuner.choose(layer, 2)
    assert len(timer.measured) == 1


def test_fast_trusts_the_shipped_table_but_not_that_of_other_kernels(layer: Layer, tmp_path: Path) -> None:
    key = layer_key(layer.spec, layer.site, 2, TARGET)
    for generator, measured, source, us in ((key.generator, 0, TABLE, 5.0), ("old", 1, MEASURED, 12.0)):
        shipped = Record(dataclasses.replace(key, generator=generator), "cpu", CANDIDATES[3].knobs(), 5.0)
        save_table(tmp_path / generator / "cpu.json", [shipped], {})
        timer = FakeTimer(by_rows)
        choice = Tuner(TARGET, "fast", Schedules(None, tmp_path / generator), timer).choose(layer, 2)
        assert len(timer.measured) == measured
        assert choice.timing is not None
        assert (choice.timing.source, choice.timing.us) == (source, us)
    off = Tuner(TARGET, "off", Schedules(None, tmp_path / "old"), timer).choose(layer, 2)
    assert off.timing is not None
    assert (off.candidate, off.timing.source) == (CANDIDATES[3], OTHER_KERNELS)


def test_candidates_that_fail_are_filed_and_not_tried_again(layer: Layer, schedules: Schedules) -> None:
    timer = FakeTimer(lambda label: -1 if rows_of(label) == 7 else by_rows(label))
    tuner = Tuner(TARGET, "full", schedules, timer)
    choice = tuner.choose(layer, 1)
    assert rows_of(choice.candidate.label) in (6, 8)
    failed = [record for record in schedules.records if record.us is None]
    assert [record.error for record in failed] == ["failed"]
    tuner.choose(layer, 1)
    assert len(timer.measured) == 1


def test_records_that_do_not_fit_the_layer_are_passed_over(layer: Layer, schedules: Schedules) -> None:
    key = layer_key(layer.spec, layer.site, 1, TARGET)
    foreign = Candidate("cpu", CpuConfig(4, 28, 1)).knobs()
    schedules.add(
        [
            Record(key, "cpu", foreign, 1.0),
            Record(key, "cpu", {"lanes": 3}, 1.0),
            Record(key, "new", {}, 1.0),
            Record(key, "cpu", CANDIDATES[4].knobs(), 9.0),
        ]
    )
    choice = Tuner(TARGET, "off", schedules).choose(layer, 1)
    assert choice.candidate == CANDIDATES[4]


def test_the_vendor_is_measured_once(layer: Layer, schedules: Schedules) -> None:
    timer = FakeTimer(lambda label: 30 if label == "conv2d contiguous" else 40)
    tuner = Tuner(TARGET, "fast", schedules, timer)
    for _ in range(2):
        timing = tuner.dense(layer.spec, 2)
        assert timing is not None
        assert (timing.us, timing.source, timing.kernel) == (30, MEASURED, VENDOR)
    assert len(timer.measured) == 1
    record = schedules.records[0]
    assert (record.key, record.knobs) == (vendor_key(layer.spec, 2, TARGET), {"how": "conv2d contiguous"})


def test_other_shapes_follow_from_the_cost_model(schedules: Schedules) -> None:
    """After some layers are measured, the model answers for others, and says so."""
    timer = FakeTimer(by_rows)
    for height in (8, 12, 16, 24, 32):
        case = make_case(filters=16, channels=16, height=height, activation="relu")
        tuner = Tuner(TARGET, "full", schedules, timer)
        tuner.choose(Layer(case.spec, case.site), 2)
        tuner.dense(case.spec, 2)
    case = make_case(filters=16, channels=16, height=20, activation="relu")
    tuner = Tuner(TARGET, "off", schedules, timer)
    choice, dense = tuner.choose(Layer(case.spec, case.site), 2), tuner.dense(case.spec, 2)
    assert choice.timing is not None
    assert dense is not None
    assert choice.timing.source == dense.source == MODEL
    assert choice.timing.us == pytest.approx(10, rel=0.25)
    assert dense.us == pytest.approx(50, rel=0.1)
    assert rows_of(choice.candidate.label) in (5, 6, 7, 8, 9)
    fast = Tuner(TARGET, "fast", schedules, timer)
    before = len(timer.measured)
    fast.choose(Layer(case.spec, case.site), 2)
    assert {rows_of(label) for label in timer.measured[before]} >= {1, 6, 7, 8}  # the best by the model


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 11, 12, 20])
def test_unknown_candidates_are_the_first_and_some_of_the_rest(
    layer: Layer, schedules: Schedules, count: int
) -> None:
    key = layer_key(layer.spec, layer.site, 1, TARGET)
    chosen = Tuner(TARGET, "off", schedules).promising(key, CANDIDATES, count)
    assert len(set(chosen)) == len(chosen) == min(count, len(CANDIDATES))
    assert chosen[: (count + 1) // 2] == CANDIDATES[: (count + 1) // 2]


def test_kinds_that_the_model_does_not_know_are_tried_too(schedules: Schedules) -> None:
    for height in (8, 12, 16, 24):
        case = make_case(filters=16, channels=16, height=height, activation="relu")
        Tuner(TARGET, "full", schedules, FakeTimer(by_rows)).choose(Layer(case.spec, case.site), 2)
    case = make_case(filters=16, channels=16, height=20, activation="relu")
    key = layer_key(case.spec, case.site, 2, TARGET)
    other = [Candidate("three_kernels", ThreeKernelsConfig(slice_elements=size)) for size in range(9)]
    chosen = Tuner(TARGET, "off", schedules).promising(key, [*CANDIDATES, *other], 7)
    assert sum(candidate.kind == "cpu" for candidate in chosen) == 4  # the default and three more
    assert {rows_of(candidate.label) for candidate in chosen if candidate.kind == "cpu"} == {1, 6, 7, 8}
    assert other[:2] == [c for c in chosen if c.kind == "three_kernels"][:2]


def test_a_residual_is_part_of_what_is_measured(
    layer: Layer, schedules: Schedules, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor | None] = []
    monkeypatch.setattr(Layer, "run", lambda self, x, residual: seen.append(residual) or x)
    spec = dataclasses.replace(layer.spec, residual=True)
    Tuner(TARGET, "full", schedules, FakeTimer(by_rows)).choose(Layer(spec, layer.site), 2)
    assert len(seen) == 12
    assert all(r is not None and r.shape == (2, 16, 7, 9) for r in seen)


def test_nothing_is_measured_while_a_graph_is_captured(
    layer: Layer, schedules: Schedules, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = CodeTarget(torch.device("cuda", 0), "sm_90", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(module, "layer_key", lambda *_: layer_key(layer.spec, layer.site, 1, TARGET))
    timer = FakeTimer(by_rows)
    assert Tuner(cuda, "full", schedules, timer).choose(layer, 1).timing is None
    assert not timer.measured


def test_copies_share_a_tuner(schedules: Schedules) -> None:
    tuner = Tuner(TARGET, "off", schedules)
    assert copy.deepcopy(tuner) is tuner


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("dtype", "precision"), [("float16", "fp16"), ("float32", "tf32"), ("float32", "fp32")]
)
@pytest.mark.parametrize("tile", [2, 4])
def test_real_candidates_on_a_gpu(dtype: str, precision: str, tile: int, tmp_path: Path) -> None:
    """Every candidate that is measured computes the layer; the chosen one is the fastest of the records."""
    target = cuda_target()
    case = make_case(
        filters=64, channels=64, height=28, width=30, batch=4, pr=0.8, tile=tile, dtype=dtype, precision=precision,
        activation="relu",
    )  # fmt: skip
    site, x = copy.deepcopy(case.site).to(target.device), case.x.to(target.device)
    layer = CudaLayer(case.spec, site, None, target)
    tuner = Tuner(target, "fast", Schedules(tmp_path / "s.jsonl", None))
    choice, dense = tuner.choose(layer, 4), tuner.dense(case.spec, 4)
    assert choice.timing is not None
    assert dense is not None
    assert 1 < choice.timing.us < 1000
    assert 1 < dense.us < 1000
    kernels = [record for record in tuner.schedules.records if record.kind != VENDOR]
    assert [record.error for record in kernels if record.us is None] == []
    assert choice.timing.us == min(record.us for record in kernels if record.us is not None)
    for record in kernels:
        trial = dataclasses.replace(layer)
        candidate = candidate_from_knobs(record.kind, record.knobs)
        trial.use(candidate, 4 * case.spec.tiles_per_image)
        assert_close(trial.run(x, None).cpu(), case.truth("output"), TOLERANCE[precision, tile])
