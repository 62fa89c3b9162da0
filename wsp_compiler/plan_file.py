"""Plans with tensors as one safetensors file: the tensors by name, the plan's JSON text as metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wsp_compiler.errors import PlanError
from wsp_compiler.plan import PruningPlan
from wsp_compiler.refits import NormStatistics, SiteRefit

KEY = "wsp_plan"
"""Name of the metadata entry that holds the JSON text."""


def save_plan(plan: PruningPlan, path: str | Path) -> None:
    """Write ``plan`` to ``path``. Tensors are named ``refit/PATH/weight``, ``norm/PATH/mean`` and so on."""
    tensors: dict[str, Tensor] = {}
    for name, refit in plan.refits.items():
        tensors |= {f"refit/{name}/weight": refit.weight, f"refit/{name}/bias": refit.bias}
    for name, norm in plan.norms.items():
        tensors |= {f"norm/{name}/mean": norm.mean, f"norm/{name}/variance": norm.variance}
    save: Any = cast("Any", safetensors.torch).save_file
    save(tensors, path, metadata={KEY: plan.to_json()})


def load_plan(path: str | Path) -> PruningPlan:
    """The plan that :func:`save_plan` wrote.

    Raises:
        PlanError: the file cannot be read, or is not such a plan.
    """
    opener: Any = safe_open
    try:
        with opener(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _damaged(path, f"cannot be read ({error})") from error
    text = metadata.get(KEY)
    if text is None:
        raise _damaged(path, "holds no plan")
    refits: dict[str, SiteRefit] = {}
    norms: dict[str, NormStatistics] = {}
    try:
        for name in tensors:
            kind, _, rest = name.partition("/")
            owner, _, part = rest.rpartition("/")
            if kind == "refit" and part == "weight":
                refits[owner] = SiteRefit(tensors[name], tensors[f"refit/{owner}/bias"])
            elif kind == "norm" and part == "mean":
                norms[owner] = NormStatistics(tensors[name], tensors[f"norm/{owner}/variance"])
    except KeyError as error:
        raise _damaged(path, f"misses the tensor {error}") from error
    return PruningPlan.from_json(text, (refits, norms))


def _damaged(path: str | Path, what: str) -> PlanError:
    return PlanError(f"the file {what}", where=str(path), fix="give a file that PruningPlan.save wrote")
