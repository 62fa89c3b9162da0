"""The CPU output stage: every border, layout and vector length, with the whole epilogue; nothing else is written."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from wsp_compiler.codegen.cpu_launch import CpuLayer
from wsp_compiler.codegen.spec import CpuConfig
from wsp_compiler.codegen.targets import cpu_target

from .test_cpu_input import layer, make_spec


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("filters", [5, 16, 37])
def test_outputs_equal_the_convolution(
    lanes: int, tile: int, last: bool, filters: int, monkeypatch: pytest.MonkeyPatch
):
    if lanes > cpu_target().lanes:
        pytest.skip("this machine has no such vectors")
    margins: list[torch.Tensor] = []

    def between_margins(self: CpuLayer, x: torch.Tensor) -> torch.Tensor:
        """An output full of NaN in the middle of sevens."""
        shape = (x.shape[0], self.spec.filters, *self.spec.output_size)
        margins.append(torch.full((64 + x.shape[0] * shape[1] * shape[2] * shape[3] + 64,), 7.0))
        inner = margins[-1][64:-64].fill_(torch.nan)
        if last:
            return inner.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)
        return inner.view(shape)

    monkeypatch.setattr(CpuLayer, "empty_output", between_margins)
    for height, width in ((7, 7), (5, 38), (1, 1)):
        spec = dataclasses.replace(
            make_spec(tile, last, height, width), filters=filters, residual=True, activation="relu"
        )
        cpu = layer(spec, CpuConfig(lanes, 4, 2))
        x = torch.randn(3, spec.channels, height, width)
        residual = torch.randn(3, filters, height, width)
        if last:
            x, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual))
        y = cpu.run(x, residual)
        positions = spec.winograd.positions
        U = cpu.site.weight.view(positions, filters, spec.channels).double()
        # g from U = G g G^T, by least squares: the convolution that the random layer computes
        G = spec.winograd.tensor("G", torch.float64)
        inverse = torch.linalg.pinv(G)
        side = spec.winograd.input_side
        g = torch.einsum("ia,abnc,jb->ncij", inverse, U.view(side, side, filters, -1), inverse)
        expected = F.relu(F.conv2d(x.double(), g, cpu.site.bias.double(), padding=1) + residual.double())
        assert torch.allclose(y.double(), expected, rtol=0, atol=1e-3)
        assert bool((margins[-1][:64] == 7).all())
        assert bool((margins[-1][-64:] == 7).all())
