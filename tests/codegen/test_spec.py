"""KernelSpec and the configurations: derived sizes, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from wsp_compiler.codegen.spec import CpuConfig, CudaConfig, FusedConfig, KernelSpec
from wsp_compiler.errors import OptionError


def spec(**changes: Any) -> KernelSpec:
    plain = KernelSpec(
        filters=24,
        channels=20,
        height=13,
        width=20,
        padding=(0, 2),
        tile=4,
        dtype="float32",
        precision="fp32",
        input_channels_last=False,
        output_channels_last=False,
        columns_pruned=False,
        rows_pruned=True,
        residual=False,
        activation="none",
    )
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (0, 2), (3, 1)])
@pytest.mark.parametrize(("height", "width"), [(7, 7), (13, 20), (3, 3), (1, 1)])
def test_sizes_are_the_convolutions(height: int, width: int, padding: tuple[int, int]):
    if min(height + 2 * padding[0], width + 2 * padding[1]) < 3:
        return
    conv = nn.Conv2d(1, 1, 3, padding=padding)
    expected = tuple(conv(torch.zeros(1, 1, height, width)).shape[2:])
    for tile in (2, 4):
        made = spec(height=height, width=width, padding=padding, tile=tile)
        assert made.output_size == expected
        assert made.tiles == tuple(-(-size // tile) for size in expected)
        assert made.tiles_per_image == made.tiles[0] * made.tiles[1]
        assert made.winograd.input_side == tile + 2


def test_specs_are_keys():
    """Every field tells two kernels apart."""
    assert spec() == spec()
    assert hash(spec()) == hash(spec())
    changes: dict[str, Any] = {
        "filters": 25, "channels": 21, "height": 14, "width": 21, "padding": (1, 1), "tile": 2, "dtype": "float16",
        "precision": "bf16", "input_channels_last": True, "output_channels_last": True, "columns_pruned": True,
        "rows_pruned": False, "residual": True, "activation": "relu",
    }  # fmt: skip
    assert set(changes) == {field.name for field in dataclasses.fields(KernelSpec)}
    assert len({spec(), *(spec(**{name: value}) for name, value in changes.items())}) == len(changes) + 1


def test_cpu_configurations():
    assert CpuConfig(lanes=16, rows=13, vectors=2).split == "auto"
    bad = ((3, 1, 1), (16, 0, 1), (16, 33, 1), (16, 1, 0), (16, 1, 9), (16, 1, 1, 2), (16, 1, 1, 0, 0))
    for values in (*bad, (16, 1, 1, 0, 1, "rows")):
        with pytest.raises(OptionError, match=r"CpuConfig(?s:.*)out of range"):
            CpuConfig(*values)


def test_cuda_configurations():
    config = CudaConfig()
    assert config.threads == 128
    assert config.shared_bytes == 3 * (128 + 32) * 4 * 16
    for changes in (
        {"block_tiles": 100},
        {"block_filters": 8},
        {"warps_tiles": 16},
        {"chunks": 5},
        {"stages": 1},
        {"stages": 40},
    ):
        with pytest.raises(OptionError, match="CudaConfig"):
            dataclasses.replace(config, **changes)


def test_fused_configurations():
    config = FusedConfig(tile=4, tiles=16, groups=2, rows=32, warps=12)
    assert (config.positions, config.threads) == (36, 384)
    assert config.accumulators == 3 * 2 * 2 * 4  # positions of a warp, rows / 16, tiles / 8, 4
    # V: 16 tiles x 32 words. M: pairs of tiles x (rows + 8) words, or tiles x (rows + 4).
    assert config.shared_bytes(packed=True) == 4 * 36 * 16 * 32
    wide = dataclasses.replace(config, rows=64)
    assert wide.shared_bytes(packed=True) == 4 * 36 * 8 * 72
    assert wide.shared_bytes(packed=False) == 4 * 36 * 16 * 68
    assert len({config, wide, dataclasses.replace(config)}) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile": 3}, "tile 2 or 4"),
        ({"tiles": 12}, "tiles % 8"),
        ({"rows": 24}, "rows % 16"),
        ({"tiles": 0}, "at least 1"),
        ({"rows": 0}, "at least 1"),
        ({"groups": 0}, "at least 1"),
        ({"warps": 0}, "at least 1"),
        ({"blocks_per_sm": 0}, "at least 1"),
        ({"warps": 36}, "at most 32"),
        ({"slice_words": 24}, "slice_words 16 or 32"),
        ({"words": 3}, "words 1, 2 or 4"),
        ({"warps": 8}, "divisor of the positions"),
        ({"prefetch": 0}, "prefetch 1 to 12"),
        ({"prefetch": 13}, "prefetch 1 to 12"),
        ({"rows": 512}, "accumulators"),
        ({"blocks_per_sm": 5}, "accumulators"),
        ({"tiles": 64, "rows": 16}, "226 KiB"),
    ],
)
def test_impossible_fused_configurations_are_errors(changes: dict[str, Any], message: str):
    config = FusedConfig(tile=4, tiles=16, groups=1, rows=32, warps=12)
    with pytest.raises(OptionError, match=rf"FusedConfig(?s:.*){message}"):
        dataclasses.replace(config, **changes)
