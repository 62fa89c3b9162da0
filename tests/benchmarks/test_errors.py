import math

import pytest
import torch
from torch import nn

from benchmarks.errors import Errors, check, float64_errors, poisoned_memory, relative_l2


def test_relative_l2() -> None:
    assert relative_l2(torch.tensor([3.3, 4.4]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1, rel=1e-6)
    with pytest.raises(ValueError, match="shapes differ"):
        relative_l2(torch.zeros(2), torch.zeros(3))


class Wrong(nn.Module):
    """Right, but for one element of one image."""

    def __init__(self, image: int, value: float) -> None:
        super().__init__()
        self.image, self.value = image, value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y[self.image, 0, 0, 0] += self.value
        return y


@pytest.mark.parametrize("image", range(5))
def test_errors_are_over_all_images(image: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.errors.CHUNK_ELEMENTS", 2 * 16 * 18)  # two images at a time
    x = torch.randn(5, 2, 3, 3)
    assert float64_errors(nn.Identity(), nn.Identity(), x) == Errors(0.0, 0.0)
    rms, norm = float(x.double().square().mean().sqrt()), float(x.double().norm())
    errors = float64_errors(Wrong(image, 10.0), nn.Identity(), x)
    assert errors.relative_l2 == pytest.approx(10 / norm, rel=1e-5)
    assert errors.largest_over_rms == pytest.approx(10 / rms, rel=1e-5)
    assert math.isnan(float64_errors(Wrong(image, math.nan), nn.Identity(), x).largest_over_rms)


def test_unwritten_outputs_are_nan() -> None:
    class Forgets(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.empty_like(x)
            y[:-1] = x[:-1]
            return y

    assert math.isnan(float64_errors(Forgets(), nn.Identity(), torch.randn(3, 2, 3, 3)).relative_l2)
    assert not torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        assert torch.empty(3).isnan().all()


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        (Errors(math.nan, 0.0), "relative error nan exceeds 1e-05 for fp32, tile 2"),
        (Errors(1e-4, 0.0), r"relative error 1.00e-04 exceeds"),
        (Errors(1e-6, math.nan), "off by nan"),
        (Errors(1e-6, 1e-4), "off by 1.00e-04 of the rms"),
    ],
)
def test_check_refuses_what_rounding_does_not_explain(errors: Errors, message: str) -> None:
    with pytest.raises(ArithmeticError, match=message):
        check(errors, "fp32", 2)
    check(Errors(1e-6, 1e-5), "fp32", 2)
    check(Errors(5e-5, 5e-4), "fp32", 4)
