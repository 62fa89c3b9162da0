"""Candidates: their text form and their enumeration."""

from __future__ import annotations

import dataclasses
import json

import pytest

from wsp_compiler.codegen.candidates import (
    Candidate,
    candidate_from_knobs,
    cpu_candidates,
    flat,
    three_kernels_candidates,
)
from wsp_compiler.codegen.cpu_launch import CpuLayer
from wsp_compiler.codegen.spec import CpuConfig, CudaConfig, FusedConfig, ThreeKernelsConfig
from wsp_compiler.codegen.targets import cpu_target
from wsp_compiler.errors import OptionError

from .emulation import assert_close, make_case

EXAMPLES = [
    Candidate("three_kernels", ThreeKernelsConfig(CudaConfig(stages=4), 1 << 20)),
    Candidate("cpu", CpuConfig(16, 4, 2)),
]


@pytest.mark.parametrize("candidate", EXAMPLES, ids=lambda candidate: candidate.kind)
def test_knobs_come_back_from_json(candidate: Candidate) -> None:
    text = json.dumps(candidate.knobs())
    assert candidate_from_knobs(candidate.kind, json.loads(text)) == candidate


def test_labels_name_every_knob() -> None:
    label = EXAMPLES[0].label
    assert label.startswith("three_kernels ")
    assert "stages=4" in label
    assert f"slice_elements={1 << 20}" in label
    assert flat({"a": 1, "b": {"c": 2}}) == {"a": 1, "c": 2}


@pytest.mark.parametrize(
    ("kind", "knobs"),
    [
        ("unknown", {}),
        ("cpu", {"lanes": 16}),
        ("cpu", {"lanes": 16, "rows": 4, "vectors": 2, "more": 1}),
        ("cpu", {"lanes": 5, "rows": 4, "vectors": 2}),
        ("three_kernels", {"gemm": {"stages": 1}}),
        ("three_kernels", {}),
    ],
)
def test_records_of_other_versions_are_refused(kind: str, knobs: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"."):
        candidate_from_knobs(kind, knobs)


def test_a_kind_has_its_own_configuration() -> None:
    with pytest.raises(OptionError, match="does not belong"):
        Candidate("fused", CpuConfig(16, 4, 2))
    assert dataclasses.is_dataclass(FusedConfig)


@pytest.mark.parametrize(("rows", "widths"), [(9, {16}), (32, {32}), (33, {32, 64})])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_three_kernels(rows: int, widths: set[int], precision: str) -> None:
    found = three_kernels_candidates(rows, precision)
    assert found[0].slice_elements == 0
    assert {config.gemm.block_filters for config in found} == widths
    assert len(set(found)) == len(found)
    if precision == "fp32":  # its kernel has one block of tiles and one ring of stages
        assert {(config.gemm.block_tiles, config.gemm.stages) for config in found} == {(128, 3)}


def test_slices_are_not_negative() -> None:
    with pytest.raises(OptionError):
        ThreeKernelsConfig(slice_elements=-1)


def test_every_cpu_candidate_computes_the_same() -> None:
    case = make_case(filters=24, channels=17, height=9, width=13, pr=0.6, activation="relu")
    target = cpu_target()
    layer = CpuLayer(case.spec, case.site, None, target)
    candidates = layer.candidates(1)
    assert [c.config for c in candidates] == cpu_candidates(case.spec, case.site, target.lanes, target.dot)
    assert candidates[0].config == layer.config
    assert len(candidates) >= 4
    expected = case.truth("output")
    for candidate in candidates:
        trial = dataclasses.replace(layer)
        trial.use(candidate, 1)
        assert trial.config == candidate.config
        assert_close(trial.run(case.x, None), expected, 1e-5)


def test_a_cpu_layer_that_has_run_keeps_its_kernels() -> None:
    case = make_case()
    layer = CpuLayer(case.spec, case.site, None, cpu_target())
    layer.run(case.x, None)
    with pytest.raises(OptionError, match="any more"):
        layer.use(layer.candidates(1)[1], 1)
    with pytest.raises(OptionError, match="on the CPU"):
        CpuLayer(case.spec, case.site, None, cpu_target()).use(EXAMPLES[0], 1)
