"""batches: what counts as calibration data, and what is said about what does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from wsp_compiler.batches import BATCH, calibration_calls
from wsp_compiler.errors import InputError, OptionError

X, LABELS = torch.randn(10, 3, 4, 4), torch.arange(10)


class One(nn.Module):
    def forward(self, image: Tensor, labels: Tensor | None = None) -> Tensor:
        return image if labels is None else labels


class Two(nn.Module):
    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        return left + scale * right


class Any_(nn.Module):  # noqa: N801
    def forward(self, *images: Tensor) -> Tensor:
        return images[0]


def sizes(calls: list[Any]) -> list[int]:
    return [len(call[0][0]) for call in calls]


def test_a_tensor_is_split() -> None:
    calls = calibration_calls(X, One())
    assert sizes(calls) == [BATCH, 2]
    assert torch.equal(torch.cat([args[0] for args, _ in calls]), X)


def test_a_loader_with_labels() -> None:
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=4)
    calls = calibration_calls(loader, One())
    assert sizes(calls) == [4, 4, 2]
    assert all(len(args) == 1 and not kwargs for args, kwargs in calls)
    assert sizes(calibration_calls(((X, LABELS) for _ in range(2)), nn.Conv2d(3, 3, 3))) == [10, 10]
    assert sizes(calibration_calls([(X, LABELS)], Any_())) == [10]


def test_dicts_by_name() -> None:
    calls = calibration_calls([{"labels": LABELS, "image": X, "id": 7}], One())
    assert list(calls[0][1]) == ["image"]
    with pytest.raises(InputError, match="keys pixels, but the model needs image"):
        calibration_calls([{"pixels": X}], One())


def test_as_many_arguments_as_the_model_needs() -> None:
    args, _ = calibration_calls([(X, X, LABELS)], Two())[0]
    assert len(args) == 2
    with pytest.raises(InputError, match="has 1 entries, but the model takes left, right"):
        calibration_calls([(X,)], Two())
    args, _ = calibration_calls([(X, X, 2.0)], Two(), example_inputs=(X, X, 2.0))[0]
    assert args[2] == 2.0


@pytest.mark.parametrize("empty", [[], iter(()), torch.zeros(0, 3, 4, 4), torch.tensor(1.0)])
def test_no_batch(empty: Any) -> None:
    with pytest.raises(InputError, match="holds no batch"):
        calibration_calls(empty, One())


@pytest.mark.parametrize("wrong", ["photos", 3, {"image": X}])
def test_not_data(wrong: Any) -> None:
    with pytest.raises(OptionError, match="calibration is a"):
        calibration_calls(wrong, One())


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (torch.full((1, 3, 4, 4), float("nan")), "batch 1 holds NaN"),
        (torch.full((1, 3, 4, 4), float("inf")), "batch 1 holds NaN or infinite"),
        (torch.zeros(0, 3, 4, 4), "batch 1 is empty"),
        ("cat.png", "batch 1 holds no tensor"),
    ],
)
def test_damaged_batches(batch: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        calibration_calls([X, batch], One())
