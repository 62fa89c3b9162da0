"""From plan to lowered graphs: pruned filters leave, then the passes run on every unit, checked if asked for."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from wsp_compiler.errors import OptionError
from wsp_compiler.filters.shrink import Shrunk, shrink
from wsp_compiler.passes import PassRecord, Pipeline, run_pipeline
from wsp_compiler.plan import PruningPlan
from wsp_compiler.trace import TracedModel, TracedUnit, example_call
from wsp_compiler.verify import make_check


def lower(
    traced: TracedModel,
    plan: PruningPlan,
    pipeline: Pipeline,
    example_inputs: Any,
    check: bool,
    multiple: int = 1,
) -> tuple[tuple[PassRecord, ...], Shrunk]:
    """Remove pruned filters, then run the passes on every unit, in place.

    Channels that Winograd kernels read and write are left in multiples of ``multiple``.
    """
    if check and example_inputs is None:
        raise OptionError("check=True needs inputs to compare on", where="compile", fix="pass example_inputs")
    inputs = _unit_inputs(traced, example_inputs) if check else {}
    checks: dict[str, Any] = {}
    unchecked = {path: make_check(traced.units[path], plan, given) for path, given in inputs.items()}
    shrunk = shrink(traced.units, plan, multiple)
    for path, checker in unchecked.items():
        checks[path] = partial(checker, plan=shrunk.plan)
        checks[path](traced.units[path], "shrink_filters")
    records: list[PassRecord] = []
    for path, gm in traced.units.items():
        records += run_pipeline(pipeline, gm, shrunk.plan, unit=path, check=checks.get(path))
    return tuple(records), shrunk


def _unit_inputs(traced: TracedModel, example_inputs: Any) -> dict[str, tuple[Any, ...]]:
    """Placeholder values that each unit receives on the example inputs (its first call)."""
    recorded: dict[str, tuple[Any, ...]] = {}
    runner = traced.assemble(traced.units)
    names = {id(gm): path for path, gm in traced.units.items()}

    def record(unit: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(unit, TracedUnit)
        path = names[id(unit.graph_module)]
        if path not in recorded:  # copied: the unit may write into its inputs
            recorded[path] = copy.deepcopy(unit.call.bind(args, kwargs))

    for module in runner.modules():
        if isinstance(module, TracedUnit):
            module.register_forward_pre_hook(record, with_kwargs=True)
    args, kwargs = example_call(example_inputs)
    with torch.no_grad():
        runner(*args, **kwargs)
    return recorded


__all__ = ["lower"]
