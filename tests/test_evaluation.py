"""evaluation: a number comes back; everything else is an EvaluationError that names the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from wsp_compiler.errors import EvaluationError, WspError
from wsp_compiler.evaluation import drop_of, evaluate
from wsp_compiler.plan import PruningPlan


def test_numbers_and_tensors_of_one_element() -> None:
    layer = nn.Linear(2, 1)
    assert evaluate(lambda model: 3, layer) == 3.0
    assert evaluate(lambda model: model.weight.sum(), layer) == pytest.approx(
        float(layer.weight.detach().sum())
    )


def test_without_gradients() -> None:
    assert evaluate(lambda model: float(torch.is_grad_enabled()), nn.Identity()) == 0.0


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (float("nan"), "returned nan on the dense model"),
        (float("inf"), "returned inf on the dense model"),
        (None, "returned a NoneType on the dense model"),
        ("high", "returned a str"),
        (torch.zeros(2), "returned a Tensor"),
    ],
)
def test_what_is_no_finite_number(result: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        evaluate(lambda model: result, nn.Identity(), "the dense model")


def test_what_it_raises_is_kept() -> None:
    def broken(model: nn.Module) -> float:
        raise KeyError("accuracy")

    with pytest.raises(EvaluationError, match="raised KeyError on the pruned model: 'accuracy'") as found:
        evaluate(broken, nn.Identity())
    assert isinstance(found.value.__cause__, KeyError)
    assert isinstance(found.value, WspError)


def test_a_drop_is_against_the_dense_model_which_is_evaluated_once() -> None:
    values = iter([5.0, 3.0, 4.5])
    drop = drop_of(lambda model: next(values), nn.Sequential(nn.ReLU()).eval(), None)
    assert drop is not None
    assert [drop(PruningPlan()), drop(PruningPlan())] == [2.0, 0.5]
    assert drop_of(None, nn.Identity(), None) is None
