"""Errors: each message says what is wrong, where, and what to do about it."""

from __future__ import annotations


class WspError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        what: what is wrong, one sentence.
        where: the argument, module path or pass concerned; empty if there is no single place.
        fix: what the user can do.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        message = f"{where}: {what}" if where else what
        super().__init__(f"{message}\n  fix: {fix}" if fix else message)


class OptionError(WspError, ValueError):
    """An argument of ``compile`` or ``PruneRule`` has a value it cannot have."""


class RuleError(WspError, ValueError):
    """A pruning rule is malformed or matches no convolution."""


class ModelError(WspError, ValueError):
    """The model cannot be compiled as it is (train mode, wrong type, tracing disagrees)."""


class InputError(WspError, ValueError):
    """An input of a compiled module does not fit the model."""


class TargetError(WspError, RuntimeError):
    """The requested device or code generation target is not usable here."""


class BuildError(WspError, RuntimeError):
    """A generated kernel could not be compiled or loaded."""


class PassError(WspError, RuntimeError):
    """A compiler pass is wired wrongly or broke the graph."""


class PlanError(WspError, ValueError):
    """A pruning plan does not fit the model, or its JSON is damaged."""


class CompiledModuleError(WspError, RuntimeError):
    """An operation that a compiled module cannot carry out (dtype change, training, ...)."""


class BudgetError(WspError, ValueError):
    """A budget (pr over all layers, target_latency, max_drop) cannot be met; the message names what can."""


class EvaluationError(WspError, RuntimeError):
    """The user's eval_fn raised, or returned something that is no finite number."""


class SearchError(WspError, RuntimeError):
    """A search cannot go on: its state belongs to another search, or one of its processes has failed."""
