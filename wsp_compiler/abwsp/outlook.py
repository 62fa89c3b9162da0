"""Outlook accuracy: what eval_fn says of a pruned network before any training (ABWSP paper, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from wsp_compiler.abwsp.choices import Choices
from wsp_compiler.abwsp.norms import Moments, adapt_norms, input_moments
from wsp_compiler.calibration import calibrate
from wsp_compiler.evaluation import EvalFn, evaluate
from wsp_compiler.plan import PruningPlan
from wsp_compiler.trace import Call, trace
from wsp_compiler.training.prune import prune


@dataclass(frozen=True)
class Networks:
    """Makes pruned networks of plans and judges them; nothing here changes the model.

    Attributes:
        model: the dense model, in eval mode.
        calls: calibration inputs.
        eval_fn: the user's.
        example_inputs: as for :func:`wsp_compiler.compile`.
        dense: :func:`~wsp_compiler.abwsp.norms.input_moments` of the dense model.
    """

    model: nn.Module
    calls: Sequence[Call]
    eval_fn: EvalFn
    example_inputs: Any
    dense: Moments

    @classmethod
    def of(cls, model: nn.Module, calls: Sequence[Call], eval_fn: EvalFn, example_inputs: Any) -> Networks:
        """With the dense model's moments, which take one pass over ``calls``."""
        return cls(model, calls, eval_fn, example_inputs, input_moments(dense_copy(model), calls))

    def build(self, plan: PruningPlan) -> nn.Module:
        """A trainable module with the plan's weights and statistics."""
        return prune(self.model, plan=plan)

    def adapted(self, plan: PruningPlan) -> tuple[PruningPlan, nn.Module]:
        """``plan`` with adapted batch-norm statistics, and its module."""
        module = self.build(plan)
        return replace(plan, norms=adapt_norms(module, self.dense, self.calls)), module

    def refitted(self, plan: PruningPlan) -> PruningPlan:
        """``plan`` with weights and statistics fitted layer by layer on the network that it prunes itself."""
        plain = replace(plan, refits={}, norms={})
        return calibrate(trace(self.model, self.example_inputs), plain, self.calls, choose=False)

    def outlook(self, choices: Choices, assignment: str, refit: bool = False) -> float:
        """Outlook accuracy of an assignment: prune, adapt the batch norms (or :meth:`refitted`), evaluate.

        Raises:
            EvaluationError: eval_fn raises or returns no finite number.
        """
        plan = choices.plan(assignment)
        module = self.build(self.refitted(plan)) if refit else self.adapted(plan)[1]
        return self.accuracy(module, f"the candidate {assignment or '(no choice)'}")

    def accuracy(self, module: nn.Module, what: str) -> float:
        """``eval_fn(module)``, with ``what`` in the error."""
        return evaluate(self.eval_fn, module.eval(), what)


def dense_copy(model: nn.Module) -> nn.Module:
    """A copy that eval_fn and forward passes in train mode may write to."""
    return prune(model, plan=PruningPlan())
