"""PlanSpeed: which layers it asks the tuner about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wsp_compiler.codegen.candidates import Candidate
from wsp_compiler.codegen.plan_speed import PlanSpeed
from wsp_compiler.codegen.schedules import Schedules
from wsp_compiler.codegen.targets import cpu_target
from wsp_compiler.codegen.tuner import Choice, Tuner
from wsp_compiler.speed import MEASURED, TABLE, CallFormat, Timing

KEEP = torch.arange(16).expand(16, 16).unsqueeze(2) % 2 == 0  # [p*p, n, 1]
CALL = CallFormat((2, 24, 9, 7), torch.float32, False)


class Recorder(Tuner):
    """Answers one microsecond per image and notes the questions."""

    def __init__(self, level: str, path: Path) -> None:
        super().__init__(cpu_target(), level, Schedules(path / "s.jsonl", None))
        self.asked: list[tuple[Any, int]] = []

    def choose(self, layer: Any, batch: int) -> Choice:
        self.asked.append((layer.spec, batch))
        candidate: Candidate = layer.candidates(1)[0]
        return Choice(candidate, Timing(float(batch), MEASURED, "kernel"))

    def dense(self, spec: Any, batch: int) -> Timing | None:
        self.asked.append((spec, batch))
        return Timing(10.0 * batch, TABLE)


@pytest.fixture
def conv() -> nn.Conv2d:
    return nn.Conv2d(24, 16, 3, padding=(1, 0))


def test_both_times_of_all_calls(conv: nn.Conv2d, tmp_path: Path) -> None:
    tuner = Recorder("fast", tmp_path)
    speed = PlanSpeed(tuner, None)
    unbatched = CallFormat((24, 6, 6), torch.float32, False)
    pruned = speed.pruned("a", conv, KEEP, 2, [CALL, unbatched])
    assert pruned == Timing(3.0, MEASURED, "kernel")
    (first, batch), (second, one) = tuner.asked
    assert (batch, one) == (2, 1)
    assert (first.filters, first.channels, first.height, first.width) == (16, 24, 9, 7)
    assert (second.height, second.width) == (6, 6)
    assert (first.padding, first.tile, first.activation, first.precision) == ((1, 0), 2, "relu", "fp32")
    assert (first.rows_pruned, first.columns_pruned) == (True, False)
    assert first.input_channels_last
    assert first.output_channels_last
    assert speed.dense("a", conv, [CALL, unbatched]) == Timing(30.0, TABLE)


@pytest.mark.parametrize(
    "call",
    [
        CallFormat((0, 24, 9, 7), torch.float32, False),
        CallFormat((1, 24, 9, 7), torch.float64, False),
        CallFormat((1, 24, 9, 2), torch.float32, False),
    ],
)
def test_calls_without_kernels_are_unknown(conv: nn.Conv2d, call: CallFormat, tmp_path: Path) -> None:
    speed = PlanSpeed(Recorder("fast", tmp_path), None)
    assert speed.pruned("a", conv, KEEP, 2, [CALL, call]) is None
    assert speed.dense("a", conv, [call]) is None


def test_a_device_without_records_costs_nothing(conv: nn.Conv2d, tmp_path: Path) -> None:
    tuner = Recorder("off", tmp_path)
    assert PlanSpeed(tuner, None).pruned("a", conv, KEEP, 2, [CALL]) is None
    assert not tuner.asked


def test_the_users_precision(conv: nn.Conv2d, tmp_path: Path) -> None:
    tuner = Recorder("fast", tmp_path)
    PlanSpeed(tuner, "bf16").pruned("a", conv, KEEP[:, :, :1], 2, [CALL])
    assert tuner.asked[0][0].precision == "bf16"


@pytest.mark.parametrize("level", ["off", "fast"])
def test_single_weights_are_measured_now_or_unknown(conv: nn.Conv2d, level: str, tmp_path: Path) -> None:
    """No records are kept of a library's sparse product."""
    tuner = Recorder(level, tmp_path)
    measured: list[tuple[str, tuple[int, ...]]] = []

    def measure(calls: Any, inputs: Any) -> Any:
        (label,) = calls
        measured.append((label, tuple(inputs[label][0].shape)))
        assert calls[label](inputs[label][0]).shape[1] == 16
        return {label: 7.0}, {}

    tuner.measure = measure
    keep = torch.rand(16, 16, 24) < 0.3
    known = tuner.knows_device
    found = PlanSpeed(tuner, None).pruned(
        "a", conv, keep, 2, [CALL, CallFormat((24, 6, 6), torch.float32, False)]
    )
    assert not tuner.asked
    if level == "off":
        assert not known
        assert found is None
        assert not measured
    else:
        assert found == Timing(14.0, MEASURED, "csr-mkl")
        assert measured == [("csr-mkl", (2, 24, 9, 7)), ("csr-mkl", (1, 24, 6, 6))]
