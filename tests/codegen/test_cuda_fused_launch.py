"""Which layers run fused, and with which configuration."""

from __future__ import annotations

import pytest

from wsp_compiler.codegen import cuda_launch
from wsp_compiler.codegen.cuda_fused_launch import DeviceLimits, choose_fused_config, fused_applies
from wsp_compiler.codegen.cuda_launch import CudaLayer
from wsp_compiler.codegen.spec import FusedConfig

from .emulation import TARGET, make_case

H100 = DeviceLimits(132, 232448, 233472)
RTX3090 = DeviceLimits(82, 101376, 102400)
HALF = dict(dtype="float16", precision="fp16", filters=64, channels=64)


def test_applies_to_float16_channels_last_rows_only() -> None:
    assert fused_applies(make_case(**HALF).spec)  # type: ignore[arg-type]
    for change in (
        dict(input_last=False),
        dict(output_last=False),
        dict(direction="column"),
        dict(tile=4),
        dict(channels=48),
        dict(filters=40),
        dict(dtype="float32", precision="tf32"),
    ):
        assert not fused_applies(make_case(**{**HALF, **change}).spec)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("filters", "tiles", "expected"),
    [
        (64, 25088, (32, 1, 16, 3)),
        (128, 100352, (32, 1, 32, 1)),
        (128, 6272, (16, 1, 32, 2)),
        (256, 25088, (32, 1, 56, 1)),
        (256, 1568, (16, 1, 56, 1)),
    ],
)
def test_configuration_follows_the_measurements(filters: int, tiles: int, expected: tuple[int, ...]) -> None:
    case = make_case(**{**HALF, "filters": filters}, pr=0.8)  # type: ignore[arg-type]
    config = choose_fused_config(case.spec, case.site, tiles, H100)
    assert config is not None
    assert (config.tiles, config.groups, config.rows, config.blocks_per_sm) == expected


def test_few_tiles_divide_the_filters() -> None:
    case = make_case(**{**HALF, "filters": 512}, pr=0.8)  # type: ignore[arg-type]
    config = choose_fused_config(case.spec, case.site, 512, H100)
    assert config is not None
    assert config.groups >= 4
    assert -(-512 // config.tiles) * config.groups >= 2 / 3 * 132


def test_respects_shared_memory() -> None:
    for filters in (64, 128, 256, 512):
        case = make_case(**{**HALF, "filters": filters}, pr=0.5)  # type: ignore[arg-type]
        config = choose_fused_config(case.spec, case.site, 10**5, RTX3090)
        if config is not None:
            assert config.shared_bytes * config.blocks_per_sm <= RTX3090.shared_per_sm


def test_a_configuration_is_chosen_once_per_number_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choosing reads back from the device: a second call must not, or graph capture would fail."""
    case = make_case(**HALF, pr=0.8)  # type: ignore[arg-type]
    layer = CudaLayer(case.spec, case.site, None, TARGET)
    calls: list[int] = []

    def choose(spec: object, site: object, tiles: int, limits: object) -> FusedConfig:
        calls.append(tiles)
        return FusedConfig(32, 1, 16)

    monkeypatch.setattr(cuda_launch, "device_limits", lambda index: H100)
    monkeypatch.setattr(cuda_launch, "choose_fused_config", choose)
    first = layer.fused_layer(case.x)
    assert first is not None
    assert layer.fused_layer(case.x) is first
    assert layer.fused_layer(case.x[:1]) is first
    assert calls == [2 * case.spec.tiles_per_image, case.spec.tiles_per_image]
