"""TracedUnit: a module that was traced, standing in for the original among modules that were not."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from wsp_compiler.clone import clone_module
from wsp_compiler.errors import InputError

FIXED_TYPES = (type(None), bool, int, str)
"""Arguments whose default is of these types steer Python control flow; tracing fixes them."""


def has_convolution(module: nn.Module) -> bool:
    """True if ``module`` is a Conv2d or has one below it."""
    return any(isinstance(child, nn.Conv2d) for child in module.modules())


@dataclass(frozen=True)
class CallSignature:
    """How calls of a traced module map to its graph's placeholders.

    ``fixed`` holds the arguments that tracing replaced by constants.
    """

    signature: inspect.Signature
    placeholders: tuple[str, ...]
    fixed: Mapping[str, Any]

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CallSignature:
        """For calls of ``module``, of which (args, kwargs) is an example; may be incomplete."""
        signature = inspect.signature(module.forward)
        given: Mapping[str, Any] = signature.bind_partial(*args, **kwargs).arguments
        placeholders: list[str] = []
        fixed: dict[str, Any] = {}
        for name, parameter in signature.parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise TypeError(f"forward takes *{name}, whose arguments a graph cannot name")
            value = given.get(name, parameter.default)
            if value is not parameter.empty and isinstance(value, FIXED_TYPES):
                fixed[name] = value
            else:
                placeholders.append(name)
        return cls(signature, tuple(placeholders), fixed)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Placeholder values of one call.

        Raises:
            InputError: a fixed argument has another value than when it was traced.
        """
        if not kwargs and not self.fixed and len(args) == len(self.placeholders):
            return args
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, value in self.fixed.items():
            given = bound.arguments[name]
            if not isinstance(given, FIXED_TYPES) or given != value:
                raise InputError(
                    f"argument {name} was fixed to {value!r} when the model was compiled, got {given!r}",
                    where="compiled module",
                    fix=f"compile with example_inputs that give {name}",
                )
        return tuple(bound.arguments[name] for name in self.placeholders)


class TracedUnit(nn.Module):
    """A traced (sub)module: runs ``graph_module``, answers everything else like the original module."""

    def __init__(self, original: nn.Module, graph_module: nn.Module, call: CallSignature) -> None:
        nn.Module.__init__(self)  # super() may be the original's class
        self.graph_module = graph_module
        self.call = call
        self.__dict__["original"] = original  # not registered: its tensors are the graph module's
        self.training = original.training

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keeps classes made by :func:`make_unit` from the original's own ``__init_subclass__``."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.graph_module(*self.call.bind(args, kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original" not in self.__dict__:  # during copying
                raise
            return getattr(self.__dict__["original"], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedUnit:
        clone = object.__new__(type(self))  # the original's class may copy itself in its own way
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return clone


def _delegate(name: str) -> Callable[..., Any]:
    def method(self: TracedUnit, *args: Any) -> Any:
        return getattr(self.__dict__["original"], name)(*args)

    return method


def make_unit(
    original: nn.Module, graph_module: nn.Module, call: CallSignature, on_part: Callable[[], None]
) -> TracedUnit:
    """The stand-in for ``original``: also an instance of its class, for untraced code may ask.

    Args:
        on_part: called when somebody calls a submodule with convolutions past the unit.
    """
    kind = type(original)
    container = ("__len__", "__iter__", "__getitem__", "__contains__")
    overrides = {name: _delegate(name) for name in container if hasattr(kind, name)}
    # Graph modules tie their class to one graph.
    bases = (TracedUnit,) if issubclass(kind, (fx.GraphModule, TracedUnit)) else (TracedUnit, kind)
    unit_class = type(f"Traced{kind.__name__}", bases, overrides)
    parts = clone_module(original)

    def notify(part: nn.Module, args: Any) -> None:
        on_part()

    for part in parts.modules():
        if part is not parts and has_convolution(part):
            part.register_forward_pre_hook(notify)
    return unit_class(parts, graph_module, call)
