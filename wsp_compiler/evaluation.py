"""Calls of the user's eval_fn, with errors that say what went wrong."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from wsp_compiler.errors import EvaluationError
from wsp_compiler.plan import PruningPlan
from wsp_compiler.training.prune import prune

EvalFn = Callable[[nn.Module], float]
"""Quality of a model, higher is better."""


def evaluate(eval_fn: EvalFn, model: nn.Module, what: str = "the pruned model") -> float:
    """``eval_fn(model)`` without gradients.

    Args:
        eval_fn: returns a number, or a tensor with one element; higher is better.
        model: in eval mode.
        what: names the model in errors.

    Raises:
        EvaluationError: eval_fn raises, or returns something that is no number, or NaN or infinity.
    """
    fix = "eval_fn takes a model in eval mode and returns one finite number, higher is better"
    try:
        with torch.no_grad():
            found: Any = eval_fn(model)
    except Exception as error:  # the user's own code
        raise EvaluationError(
            f"it raised {type(error).__name__} on {what}: {error}", where="eval_fn", fix=fix
        ) from error
    try:
        value = float(found)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(cast("object", found)).__name__
        raise EvaluationError(
            f"it returned a {kind} on {what}, not a number", where="eval_fn", fix=fix
        ) from error
    if not math.isfinite(value):
        raise EvaluationError(f"it returned {value} on {what}", where="eval_fn", fix=fix)
    return value


def drop_of(
    eval_fn: EvalFn | None, model: nn.Module, example_inputs: Any
) -> Callable[[PruningPlan], float] | None:
    """How much ``eval_fn`` loses under a plan against the dense model, which is evaluated at the first call."""
    if eval_fn is None:
        return None
    dense: list[float] = []

    def drop(plan: PruningPlan) -> float:
        if not dense:
            dense.append(evaluate(eval_fn, copy.deepcopy(model), "the dense model"))
        return dense[0] - evaluate(eval_fn, prune(model, plan=plan, example_inputs=example_inputs))

    return drop


__all__ = ["EvalFn", "drop_of", "evaluate"]
