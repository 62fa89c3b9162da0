"""nn.Module -> TracedModel: torch.fx graphs of the whole model, or of those submodules that can be traced.

The user's model is never modified. Leaf modules and their tensors are shared with it, not copied: later
stages replace modules in the graph modules made here, they never write into a leaf.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from wsp_compiler.errors import InputError, ModelError

SITE = "wsp_site"
"""Key of ``node.meta`` that holds the module path of a convolution call, as in ``model.named_modules()``."""

FIXED_TYPES = (type(None), bool, int, str)
"""Arguments whose default is of these types steer Python control flow; tracing fixes them."""


class ConvTracer(fx.Tracer):
    """fx tracer that keeps every Conv2d subclass a leaf, so that each convolution is one call_module node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class CallSignature:
    """How calls of a traced module map to its graph's placeholders.

    ``fixed`` holds the arguments that tracing replaced by constants.
    """

    signature: inspect.Signature
    placeholders: tuple[str, ...]
    fixed: Mapping[str, Any]

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
            if given is not value and (isinstance(given, Tensor) or given != value):
                raise InputError(
                    f"argument {name} was fixed to {value!r} when the model was compiled, got {given!r}",
                    where="compiled module",
                    fix=f"compile with example_inputs that give {name}",
                )
        return tuple(bound.arguments[name] for name in self.placeholders)


class TracedUnit(nn.Module):
    """A traced (sub)module: runs ``graph_module``, answers attribute look-ups like the original module."""

    def __init__(self, original: nn.Module, graph_module: fx.GraphModule, call: CallSignature) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.call = call
        self.__dict__["original"] = original  # not registered: its tensors are the graph module's
        self.train(original.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.graph_module(*self.call.bind(args, kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original" not in self.__dict__:  # during copying
                raise
            return getattr(self.__dict__["original"], name)


@dataclass
class TracedModel:
    """A model as graphs.

    Attributes:
        model: the user's module, untouched.
        units: module path ("" for the whole model) -> its graph.
        calls: module path -> how calls map to the graph's placeholders.
        untraced: module path -> why torch.fx could not trace it (its children may be units).
        input_shapes: convolution path -> shape of each call's input, in call order; empty if unknown.
    """

    model: nn.Module
    units: dict[str, fx.GraphModule] = field(default_factory=dict[str, fx.GraphModule])
    calls: dict[str, CallSignature] = field(default_factory=dict[str, CallSignature])
    untraced: dict[str, str] = field(default_factory=dict[str, str])
    input_shapes: dict[str, tuple[tuple[int, ...], ...]] = field(
        default_factory=dict[str, tuple[tuple[int, ...], ...]]
    )

    def assemble(self, units: Mapping[str, fx.GraphModule]) -> nn.Module:
        """The model with each traced submodule replaced by ``units[path]``; untraced parents are shallow copies."""
        return _assemble(self, self.model, "", units, {})


def _assemble(
    traced: TracedModel,
    module: nn.Module,
    path: str,
    units: Mapping[str, fx.GraphModule],
    done: dict[int, nn.Module],
) -> nn.Module:
    if id(module) in done:
        return done[id(module)]
    if path in units:
        done[id(module)] = TracedUnit(module, units[path], traced.calls[path])
        return done[id(module)]
    if not any(unit.startswith(f"{path}." if path else "") for unit in units):
        return module
    clone = module.__class__.__new__(module.__class__)
    clone.__dict__ = module.__dict__.copy()
    done[id(module)] = clone
    children: dict[str, nn.Module | None] = {}
    for name, child in module._modules.items():  # pyright: ignore[reportPrivateUsage]
        child_path = f"{path}.{name}" if path else name
        children[name] = None if child is None else _assemble(traced, child, child_path, units, done)
    clone.__dict__["_modules"] = children
    return clone


def example_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``example_inputs`` as (args, kwargs): a tensor, a tuple or list of arguments, or a dict of keywords."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}  # pyright: ignore[reportUnknownArgumentType]
    return (example_inputs,), {}


def _call_signature(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> CallSignature:
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
    return CallSignature(signature, tuple(placeholders), fixed)


def _symbolic_trace(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[fx.GraphModule, CallSignature]:
    if module._forward_hooks or module._forward_pre_hooks:  # pyright: ignore[reportPrivateUsage]
        raise TypeError("it has forward hooks")
    call = _call_signature(module, args, kwargs)
    if isinstance(module, nn.Conv2d):  # a leaf: tracing into it would lose the module
        root = nn.Module()
        root.add_module("conv", module)
        graph = fx.Graph()
        graph.output(graph.call_module("conv", (graph.placeholder(call.placeholders[0]),)))
        return fx.GraphModule(root, graph, class_name="Conv2dUnit"), call
    original_class = type(module)
    names = ", ".join(call.placeholders)
    keywords = ", ".join(
        [f"{name}={name}" for name in call.placeholders] + [f"{name}=_fixed[{name!r}]" for name in call.fixed]
    )
    scope: dict[str, Any] = {"_forward": original_class.forward, "_fixed": dict(call.fixed)}
    exec(f"def forward(self, {names}): return _forward(self, {keywords})", scope)
    shim_class = type(original_class.__name__, (original_class,), {"forward": scope["forward"]})
    shim = shim_class.__new__(shim_class)
    shim.__dict__ = module.__dict__.copy()
    graph = ConvTracer().trace(shim)
    return fx.GraphModule(shim, graph, class_name=original_class.__name__), call


def _has_convolution(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Conv2d) for child in module.modules())


def _trace_tree(
    traced: TracedModel,
    module: nn.Module,
    path: str,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    seen: set[int],
) -> None:
    if id(module) in seen or not _has_convolution(module):
        return
    seen.add(id(module))
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict, torch.jit.ScriptModule)):
        try:
            traced.units[path], traced.calls[path] = _symbolic_trace(module, *call)
            return
        except Exception as error:  # a model's forward may raise anything when it meets a Proxy
            message = " ".join(str(error).split()) or type(error).__name__
            traced.untraced[path] = f"torch.fx: {message[:160]}"
    for name, child in module.named_children():
        _trace_tree(traced, child, f"{path}.{name}" if path else name, ((), {}), seen)


class _ShapeRecorder(fx.Interpreter):
    """Runs a graph and notes the input shape of every convolution call."""

    def __init__(self, graph_module: fx.GraphModule, shapes: dict[str, list[tuple[int, ...]]]) -> None:
        super().__init__(graph_module)
        self._shapes = shapes

    def run_node(self, n: fx.Node) -> Any:
        if SITE in n.meta:
            inputs = self.fetch_args_kwargs_from_env(n)[0]
            self._shapes.setdefault(n.meta[SITE], []).append(tuple(inputs[0].shape))
        return super().run_node(n)


def _mark_sites(traced: TracedModel) -> None:
    for prefix, graph_module in traced.units.items():
        for node in graph_module.graph.nodes:
            if node.op != "call_module":
                continue
            if isinstance(graph_module.get_submodule(str(node.target)), nn.Conv2d):
                is_conv_unit = isinstance(traced.model.get_submodule(prefix), nn.Conv2d)
                node.meta[SITE] = prefix if is_conv_unit else f"{prefix}.{node.target}".lstrip(".")


def _floats(value: Any) -> Iterator[Tensor]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield leaf


def _agrees(expected: Any, actual: Any) -> bool:
    left, right = list(_floats(expected)), list(_floats(actual))
    if [tensor.shape for tensor in left] != [tensor.shape for tensor in right]:
        return False
    for a, b in zip(left, right, strict=True):
        a, b = torch.nan_to_num(a.double()), torch.nan_to_num(b.double())
        if (a - b).norm() > 1e-2 * a.norm() + 1e-6:
            return False
    return True


def _record_shapes(traced: TracedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Run the traced model and the original on the example; True if they agree."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    runner = traced.assemble(traced.units)
    units = [module for module in runner.modules() if isinstance(module, TracedUnit)]
    for unit in units:
        recorder = _ShapeRecorder(unit.graph_module, shapes)
        unit.__dict__["forward"] = lambda *a, _u=unit, _r=recorder, **k: _r.run(*_u.call.bind(a, k))
    with torch.no_grad():
        expected = traced.model(*args, **kwargs)
        actual = runner(*args, **kwargs)
    traced.input_shapes = {path: tuple(found) for path, found in shapes.items()}
    return _agrees(expected, actual)


def trace(model: nn.Module, example_inputs: Any = None) -> TracedModel:
    """Trace a model in eval mode; what torch.fx cannot trace is traced child by child.

    Args:
        model: any nn.Module in eval mode.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments. With them,
            the traced graphs are run once beside the model, and shapes are recorded.

    Raises:
        ModelError: not an eager nn.Module, in train mode, or its graph does not compute what it computes.
    """
    model = check_model(model)
    call = example_call(example_inputs) if example_inputs is not None else ((), {})
    traced = TracedModel(model)
    _trace_tree(traced, model, "", call, set())
    _mark_sites(traced)
    if example_inputs is None or _record_shapes(traced, *call):
        return traced
    if "" in traced.units:  # a graph that lost control flow: trace the children instead
        traced = TracedModel(model, untraced={"": "torch.fx: the traced graph computes something else"})
        for name, child in model.named_children():
            _trace_tree(traced, child, name, ((), {}), set())
        _mark_sites(traced)
        if _record_shapes(traced, *call):
            return traced
    raise ModelError(
        "the traced graph does not compute what the model computes on example_inputs",
        where=type(model).__name__,
        fix="compile the submodules that hold the convolutions, or make forward deterministic",
    )


def check_model(model: nn.Module) -> nn.Module:
    """The eager module behind ``model``, if it can be compiled at all.

    Raises:
        ModelError: not an eager nn.Module, or (partly) in train mode.
    """
    if isinstance(model, torch.jit.ScriptModule) or not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ModelError(
            f"expected an eager torch.nn.Module, got {type(model).__name__}",
            where="model",
            fix="pass the module itself, before torch.jit.script or torch.export",
        )
    inner = getattr(model, "_orig_mod", None)  # torch.compile's wrapper
    if isinstance(inner, nn.Module):
        model = inner
    for path, module in model.named_modules():
        stateful = isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd))  # pyright: ignore[reportPrivateUsage]
        if module.training and (module is model or stateful):
            raise ModelError(
                f"{path or type(model).__name__} is in train mode",
                where="model",
                fix="call model.eval() first; for training see wsp_compiler.prune in the documentation",
            )
    return model
