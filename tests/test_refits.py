"""refits: packing keeps exactly the kept weights; wrong tensors are refused."""

from __future__ import annotations

import pytest
import torch

from wsp_compiler.errors import PlanError
from wsp_compiler.refits import NormStatistics, SiteRefit


@pytest.mark.parametrize("shape", [(16, 5, 1), (16, 1, 3), (1, 5, 1), (1, 1, 1)])
def test_pack_and_unpack(shape: tuple[int, ...]) -> None:
    keep = torch.rand(shape) < 0.5
    keep[0, 0, 0] = True
    U, bias = torch.randn(16, 5, 3), torch.randn(5)
    packed = SiteRefit.pack(U.double(), bias, keep)
    assert packed.weight.dtype == torch.float32
    assert packed.weight.shape == (int(keep.expand(16, 5, 3).sum()),)
    assert torch.equal(packed.unpack(keep, (16, 5, 3)), U * keep)
    bias.zero_()
    assert bool(packed.bias.any())  # a copy
    packed.check("a", len(packed.weight), 5)


def test_wrong_tensors_are_refused() -> None:
    good = SiteRefit(torch.ones(6), torch.ones(2))
    for wrong, text in (
        (SiteRefit(torch.ones(5), torch.ones(2)), "weight is torch.float32 \\[5\\]"),
        (SiteRefit(torch.ones(6), torch.ones(3)), "bias is"),
        (SiteRefit(torch.ones(6).half(), torch.ones(2)), "float16"),
        (SiteRefit(torch.full((6,), float("nan")), torch.ones(2)), "NaN"),
    ):
        with pytest.raises(PlanError, match=text):
            wrong.check("layer", 6, 2)
        assert wrong != good
    good.check("layer", 6, 2)


def test_equality_is_that_of_the_tensors() -> None:
    assert SiteRefit(torch.ones(2), torch.ones(1)) == SiteRefit(torch.ones(2), torch.ones(1))
    assert NormStatistics(torch.ones(2), torch.ones(2)) == NormStatistics(torch.ones(2), torch.ones(2))
    assert NormStatistics(torch.ones(2), torch.ones(2)) != NormStatistics(torch.ones(2), torch.zeros(2))
