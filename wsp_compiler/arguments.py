"""Arguments of ``compile``: checked against each other and the target, and moved to the target's device.

What each option may be by itself is checked in options.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from wsp_compiler.errors import ModelError, OptionError
from wsp_compiler.evaluation import EvalFn
from wsp_compiler.options import CompileOptions
from wsp_compiler.plan import PruningPlan


def check_rules(rules: object) -> None:
    """That ``rules`` can be gone through; its entries are checked by :class:`CompileOptions`."""
    if not isinstance(rules, Iterable):
        raise OptionError(f"rules is {rules!r}", where="compile", fix="pass a list of wsp_compiler.PruneRule")


def check_type(name: str, value: object, kind: type, fix: str) -> None:
    """That ``value`` is None or a ``kind``."""
    if value is not None and not isinstance(value, kind):
        raise OptionError(
            f"{name} is a {type(value).__name__}, not a {kind.__name__}", where="compile", fix=fix
        )


def check_precision(options: CompileOptions, is_cuda: bool) -> None:
    """That the target computes in the precision asked for."""
    if not is_cuda and options.precision in ("tf32", "fp16"):
        raise OptionError(
            f"precision {options.precision!r} does not exist on the CPU",
            where="compile",
            fix="use 'fp32' or 'bf16'",
        )


def check_budgets(
    options: CompileOptions, plan: PruningPlan | None, example_inputs: Any, eval_fn: EvalFn | None
) -> None:
    """What the budgets need, and that nothing is given that would not be read."""
    budgets = [name for name in ("target_latency", "max_drop") if getattr(options, name) is not None]
    if plan is not None and budgets:
        raise OptionError(
            f"both plan and {budgets[0]} say how much is pruned", where="compile", fix="give one of them"
        )
    if options.target_latency is not None and example_inputs is None:
        raise OptionError(
            "target_latency needs inputs to measure with", where="compile", fix="pass example_inputs"
        )
    if eval_fn is not None and not callable(eval_fn):
        raise OptionError(
            f"eval_fn is a {type(cast('object', eval_fn)).__name__}",
            where="compile",
            fix="pass a function that takes a model and returns a number, higher is better",
        )
    if options.max_drop is not None and eval_fn is None:
        raise OptionError(
            "max_drop needs eval_fn to measure it", where="compile", fix="pass eval_fn(model) -> float"
        )


def check_execution(rest: str, cuda_graph: bool, is_cuda: bool) -> None:
    """How the rest of the model runs: known, and possible on the target."""
    if rest not in ("eager", "inductor"):
        raise OptionError(f"unknown rest {rest!r}", where="compile", fix="use 'eager' or 'inductor'")
    check_type("cuda_graph", cuda_graph, bool, "use True or False")
    if cuda_graph and not is_cuda:
        raise OptionError(
            "cuda_graph=True on the CPU", where="compile", fix="compile for a CUDA device, or leave it False"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where all tensors of ``model`` are; the CPU without any."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        listed = ", ".join(sorted(map(str, devices)))
        raise ModelError(
            f"its tensors are on several devices: {listed}", where="model", fix="move it to one device"
        )
    return next(iter(devices), torch.device("cpu"))


def moved_to(device: torch.device, model: nn.Module, example_inputs: Any) -> tuple[nn.Module, Any]:
    """Copies of model and inputs on ``device``, or both as they are where the model is there already."""
    if device_of(model) == device:
        return model, example_inputs

    def move(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    return copy.deepcopy(model).to(device), pytree.tree_map(move, example_inputs)


__all__ = [
    "check_budgets",
    "check_execution",
    "check_precision",
    "check_rules",
    "check_type",
    "device_of",
    "moved_to",
]
