"""Calibration data, in any of the shapes that data loaders have, as calls of the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from wsp_compiler.errors import InputError, OptionError
from wsp_compiler.trace import Call, example_call

BATCH = 8
"""Images that a single tensor is split into at a time."""


def calibration_calls(data: Any, model: nn.Module, example_inputs: Any = None) -> list[Call]:
    """The calls (args, kwargs) that ``data`` means, held on the CPU.

    Args:
        data: a tensor [N, ...], which is split into batches of :data:`BATCH`, or an iterable of batches (a
            DataLoader, a list). A batch is a tensor, a tuple or list whose first entries are the model's arguments,
            or a dict with the names of its arguments. What the model does not need, such as labels, is dropped.
        model: its forward says how many arguments it needs.
        example_inputs: as for :func:`wsp_compiler.compile`; optional arguments that it gives are taken too.

    Raises:
        OptionError: not data at all. InputError: no batch, or a batch without the model's arguments.
    """
    if isinstance(data, Tensor):
        count = len(data) if data.dim() > 0 else 0
        data = [data[first : first + BATCH] for first in range(0, count, BATCH)]
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise OptionError(
            f"calibration is a {type(cast('object', data)).__name__}",
            where="compile",
            fix="pass a DataLoader, a list of batches, or a tensor [N, ...] of inputs",
        )
    needed = _needed(model, example_inputs)
    batches = enumerate(cast("Iterable[Any]", data))
    calls = [_checked(_call(batch, needed, index), index) for index, batch in batches]
    if not calls:
        raise InputError("it holds no batch", where="calibration", fix="give at least one batch of inputs")
    return calls


def _needed(model: nn.Module, example_inputs: Any) -> list[str]:
    """Names of the arguments to take from a batch, in order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.signature(model.forward)
    names = [name for name, parameter in signature.parameters.items() if parameter.kind in kinds]
    given: set[str] = set()
    if example_inputs is not None:
        args, kwargs = example_call(example_inputs)
        given = {*names[: len(args)], *kwargs}
    empty = inspect.Parameter.empty
    needed = [name for name in names if signature.parameters[name].default is empty or name in given]
    return needed or names[:1] or ["input"]  # forward(*args) names nothing: one input


def _call(batch: Any, needed: Sequence[str], index: int) -> Call:
    if isinstance(batch, Mapping):
        named = cast("Mapping[str, Any]", batch)
        missing = [name for name in needed if name not in named]
        if missing:
            found = ", ".join(map(str, named))
            raise InputError(
                f"batch {index} has the keys {found}, but the model needs {', '.join(missing)}",
                where="calibration",
                fix="name the entries as forward names its arguments, or give tuples",
            )
        return (), {name: named[name] for name in needed}
    if isinstance(batch, (tuple, list)):
        values = tuple(cast("Sequence[Any]", batch))
        if len(values) < len(needed):
            raise InputError(
                f"batch {index} has {len(values)} entries, but the model takes {', '.join(needed)}",
                where="calibration",
                fix="give tuples that begin with the model's arguments",
            )
        return values[: len(needed)], {}
    return (batch,), {}


def _checked(call: Call, index: int) -> Call:
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]
    if not tensors:
        raise InputError(
            f"batch {index} holds no tensor",
            where="calibration",
            fix="give tensors, such as a DataLoader does",
        )
    for tensor in tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"batch {index} holds NaN or infinite values", where="calibration", fix="check the data"
            )
        if tensor.numel() == 0:
            raise InputError(f"batch {index} is empty", where="calibration", fix="give at least one image")

    def held(leaf: Any) -> Any:
        return leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf

    return cast("Call", pytree.tree_map(held, call))
