import math

import pytest
import torch
from torch import nn

from benchmarks.accuracy import check, ends_of_batch, float64_error, relative_l2


def test_relative_l2() -> None:
    assert relative_l2(torch.tensor([3.3, 4.4]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1, rel=1e-6)
    with pytest.raises(ValueError, match="shapes differ"):
        relative_l2(torch.zeros(2), torch.zeros(3))


def test_ends_of_batch() -> None:
    x = torch.arange(5.0).view(5, 1, 1, 1)
    assert ends_of_batch(x).flatten().tolist() == [0.0, 4.0]
    assert ends_of_batch(x[:1]).shape[0] == 1


def test_float64_error_sees_a_wrong_last_image() -> None:
    class LastWrong(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat((x[:-1], 2 * x[-1:]))

    x = torch.randn(4, 2, 3, 3)
    assert float64_error(nn.Identity(), nn.Identity(), x) == 0.0
    assert float64_error(LastWrong(), nn.Identity(), x) > 0.1


@pytest.mark.parametrize("error", [math.nan, math.inf, 1e-3])
def test_check_refuses_what_rounding_does_not_explain(error: float) -> None:
    with pytest.raises(ArithmeticError, match="exceeds 1e-04 for fp32"):
        check(error, "fp32")
    check(1e-6, "fp32")
