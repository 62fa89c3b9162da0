"""The cost model: it finds the rates that made the times, ranks knobs, and says nothing where it knows nothing."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest

from wsp_compiler.codegen.candidates import Candidate
from wsp_compiler.codegen.cost_model import LEAST_RECORDS, amounts, fit, fit_kind, group_of
from wsp_compiler.codegen.schedule_records import VENDOR, LayerKey, Record
from wsp_compiler.codegen.spec import CpuConfig, ThreeKernelsConfig

FUSED = {"tile": 2, "tiles": 32, "groups": 1, "rows": 16, "prefetch": 2}


def key_of(channels: int, side: int, batch: int, **changes: Any) -> LayerKey:
    rows = -(-channels // 40) * 8
    key = LayerKey(
        "GPU", "sm_90", 132, channels, channels, side, side, (1, 1), batch, True, True, "float16", "fp16", 2,
        (rows, rows), (channels, channels), channels, "relu", "g",
    )  # fmt: skip
    return dataclasses.replace(key, **changes)


LAYERS = [
    key_of(c, h, n) for c, h in ((64, 56), (128, 28), (256, 14), (512, 7), (128, 112)) for n in (1, 8, 32)
]
KNOBS: dict[str, dict[str, Any]] = {
    VENDOR: {},
    "fused": FUSED,
    "three_kernels": Candidate("three_kernels", ThreeKernelsConfig()).knobs(),
    "cpu": Candidate("cpu", CpuConfig(16, 4, 2)).knobs(),
}


@pytest.mark.parametrize("kind", list(KNOBS))
def test_amounts_grow_with_the_layer(kind: str) -> None:
    small = amounts(key_of(64, 28, 8), kind, KNOBS[kind])
    for larger in (key_of(128, 28, 8), key_of(64, 56, 8), key_of(64, 28, 32)):
        large = amounts(larger, kind, KNOBS[kind])
        assert len(large) == len(small)
        assert all(a <= b for a, b in zip(small, large, strict=True))
        assert sum(large) > sum(small)
    assert small[0] == 1.0


def test_vendor_amounts_by_hand() -> None:
    key = key_of(64, 28, 8, tile=0)
    pixels, multiplies = 8 * 28 * 28, 9 * 64 * 64 * 8 * 28 * 28 / 132
    assert amounts(key, VENDOR, {}) == (1, 2 * 64 * pixels * 2, multiplies, 9 * 64 * 64 * 2, 9 * 64)
    added = dataclasses.replace(key, epilogue="relu+residual")
    assert amounts(added, VENDOR, {})[1] == 3 * 64 * pixels * 2
    threaded = dataclasses.replace(key, threads=2)
    assert amounts(threaded, VENDOR, {})[2] == multiplies * 132 / 2


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown"):
        amounts(LAYERS[0], "other", {})


@pytest.mark.parametrize("kind", list(KNOBS))
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_fit_predicts_layers_it_has_not_seen(kind: str, noise: float) -> None:
    """Times made from known rates, with or without noise, are predicted for a layer that was left out."""
    generator = random.Random(1)
    rates = [3.0, 4e-7, 2e-9, 3e-7, 1e-9, 1e-8, 1e-9, 1e-9]

    def time(key: LayerKey) -> float:
        exact = math.fsum(r * w for r, w in zip(rates, amounts(key, kind, KNOBS[kind]), strict=False))
        return exact * math.exp(generator.gauss(0, noise))

    records = [Record(key, kind, KNOBS[kind], time(key)) for key in LAYERS]
    for left_out in (4, 7):
        fitted = fit_kind(records[:left_out] + records[left_out + 1 :])
        assert fitted is not None
        assert min(fitted.rates) >= 0
        record = records[left_out]
        assert record.us is not None
        ratio = fitted.predict(record.key, kind, record.knobs) / record.us
        assert abs(math.log(ratio)) < (0.02 if noise == 0 else 0.35)
        assert fitted.error <= 0.005 if noise == 0 else 0.01 < fitted.error < 0.2
        assert fitted.records == len(LAYERS) - 1


def test_knobs_are_ranked() -> None:
    """Each knob value multiplies the time by a factor of its own, which the fit has to find."""
    factors = {2: 1.0, 3: 0.8, 4: 1.5}
    records = [
        Record(
            key,
            "fused",
            {**FUSED, "prefetch": prefetch},
            (5 + 1e-7 * sum(amounts(key, "fused", FUSED))) * factor,
        )
        for key in LAYERS
        for prefetch, factor in factors.items()
    ]
    model = fit(records)
    times = {s: model.predict(LAYERS[3], "fused", {**FUSED, "prefetch": s}) for s in factors}
    assert times[3] is not None
    assert times[2] is not None
    assert times[4] is not None
    assert times[3] / times[2] == pytest.approx(0.8, rel=0.05)
    assert times[4] / times[2] == pytest.approx(1.5, rel=0.05)
    unseen = model.predict(LAYERS[3], "fused", {**FUSED, "prefetch": 9})
    assert unseen is not None
    assert times[3] < unseen < times[4]


def test_nothing_is_said_about_what_was_not_measured() -> None:
    records = [Record(key, VENDOR, {}, 10.0 + key.batch) for key in LAYERS]
    model = fit(records)
    assert model.predict(LAYERS[0], VENDOR, {}) is not None
    assert model.predict(LAYERS[0], "fused", FUSED) is None
    for change in ({"arch": "sm_80"}, {"precision": "tf32"}, {"dtype": "float32"}):
        assert model.predict(dataclasses.replace(LAYERS[0], **change), VENDOR, {}) is None
    few = fit(records[: LEAST_RECORDS - 1])
    assert few.predict(LAYERS[0], VENDOR, {}) is None
    failed = fit([dataclasses.replace(record, us=None, error="no") for record in records])
    assert not failed.fitted
    assert group_of(LAYERS[0], VENDOR) in model.fitted


def test_knobs_of_other_versions_are_left_out() -> None:
    good = [Record(key, "fused", FUSED, 10.0 + key.batch) for key in LAYERS]
    old = [Record(key, "fused", {"tiles": 32, "groups": 1}, 1e6) for key in LAYERS]
    wrong = [Record(key, "fused", {**FUSED, "tiles": 7}, 1e6) for key in LAYERS]
    model = fit([*old, *good, *wrong])
    assert model.fitted[group_of(LAYERS[0], "fused")].records == len(good)
    assert model.predict(LAYERS[0], "fused", old[0].knobs) is None
    assert model.predict(LAYERS[0], "fused", wrong[0].knobs) is None
    with pytest.raises(ValueError, match="argument"):
        amounts(LAYERS[0], "fused", old[0].knobs)
