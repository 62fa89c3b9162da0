"""The CUDA output transform: epilogues and ragged borders on the emulator."""

from __future__ import annotations

import pytest
import torch

from wsp_compiler.codegen.cuda_output_transform import output_blocks

from ..cuda_emulator import is_available
from .emulation import assert_close, emulate_layer, make_case

pytestmark = pytest.mark.skipif(not is_available(), reason="the emulator needs g++ on x86-64")


@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "prelu"])
@pytest.mark.parametrize("output_last", [True, False])
def test_epilogues(activation: str, output_last: bool) -> None:
    case = make_case(
        activation=activation,
        output_last=output_last,
        residual=True,
        filters=9,
        channels=8,
        height=5,
        width=6,
        pr=0.4,
    )
    y = emulate_layer(case)["y"]
    assert not torch.isnan(y).any()  # every element was written
    assert_close(y, case.truth("output"), 1e-5)


def test_a_fully_pruned_position_counts_as_zero() -> None:
    case = make_case(method="wsp", pr=0.97, filters=6, channels=8)
    assert 0 in case.site.row_offset.diff().tolist()
    assert_close(emulate_layer(case)["y"], case.truth("output"), 1e-5)


def test_blocks_cover_all_items() -> None:
    for last in (True, False):
        spec = make_case(output_last=last).spec
        assert output_blocks(spec, 96) * 256 >= 96 * (spec.filters if last else 1)
