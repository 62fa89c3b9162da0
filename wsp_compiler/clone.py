"""Clones of modules that share the tensors and nothing else that could be written to.

Tracing runs a model's Python code with placeholders in place of tensors, and the compiled model keeps calling
modules that were not lowered. Both happen on clones, so that what the code stores on a module, appends to its
lists or switches with ``train()`` never reaches the user's model, and the other way round.
"""

from __future__ import annotations

import collections
import copy
import types
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)
CONTAINERS = (dict, collections.OrderedDict, collections.defaultdict)


def named_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``module.named_modules()`` with the types that PyTorch's own annotations leave open."""
    return cast("Iterator[tuple[str, nn.Module]]", module.named_modules())


def clone_module(module: M, replaced: dict[int, Any] | None = None) -> M:
    """``module`` and its submodules as new objects over the same tensors.

    Lists, tuples and dicts on the modules are copied, references and bound methods in them follow the clones.
    TorchScript modules and other objects are shared.

    Args:
        replaced: id of a module -> what stands for it and everything below it in the clone.
    """
    return _clone(module, {} if replaced is None else dict(replaced))


def _clone(value: Any, done: dict[int, Any]) -> Any:
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, nn.Module) and not isinstance(value, torch.jit.ScriptModule):
        clone = object.__new__(type(value))
        done[id(value)] = clone
        clone.__dict__.update({name: _clone(entry, done) for name, entry in value.__dict__.items()})
        # module.compile() stores a compiled call of the original here
        clone.__dict__["_compiled_call_impl"] = None
        return clone
    if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
        return types.MethodType(value.__func__, _clone(value.__self__, done))
    if type(value) is list:
        entries: list[Any] = []
        done[id(cast("object", value))] = entries
        entries.extend(_clone(entry, done) for entry in cast("list[Any]", value))
        return entries
    if type(value) is tuple:
        return tuple(_clone(entry, done) for entry in cast("tuple[Any, ...]", value))
    if type(value) is set:
        return set(cast("set[Any]", value))
    if type(value) in CONTAINERS:
        mapping = copy.copy(cast("dict[Any, Any]", value))
        done[id(cast("object", value))] = mapping
        for key, entry in mapping.items():
            mapping[key] = _clone(entry, done)
        return mapping
    return value
