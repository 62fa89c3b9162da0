"""nn.Module -> TracedModel: torch.fx graphs of the whole model, or of those submodules that can be traced.

The user's model is never modified: the graphs call clones of its modules, which share its tensors (see
:mod:`wsp_compiler.clone`). Later stages replace modules in the graph modules made here, they never write into
a tensor.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from wsp_compiler.clone import clone_module, named_modules
from wsp_compiler.errors import InputError, ModelError
from wsp_compiler.speed import CallFormat
from wsp_compiler.units import CallSignature, TracedUnit, has_convolution, make_unit

SITE = "wsp_site"
"""Key of ``node.meta`` that holds the module path of a convolution call, as in ``model.named_modules()``."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""(args, kwargs)."""


def has_hooks(module: nn.Module) -> bool:
    """True if calling ``module`` runs more than its forward."""
    hooked = cast("Any", module)
    return bool(hooked._forward_hooks or hooked._forward_pre_hooks)


class ConvTracer(fx.Tracer):
    """fx tracer that keeps every Conv2d subclass a leaf, so that each convolution is one call_module node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (nn.Conv2d, torch.jit.ScriptModule)):
            return True
        return super().is_leaf_module(m, module_qualified_name) and not has_convolution(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # Traced through, a hook would run once, now, on placeholders, and never again.
        if has_hooks(m) and not self.is_leaf_module(m, self.path_of_module(m)):
            raise TypeError(f"{self.path_of_module(m)} has forward hooks")
        return super().call_module(m, forward, args, kwargs)


@dataclass
class TracedModel:
    """A model as graphs.

    Attributes:
        model: the user's module, untouched.
        units: module path ("" for the whole model) -> its graph.
        calls: module path -> how calls map to the graph's placeholders.
        untraced: module path -> why torch.fx could not trace it (its children may be units).
        calls_seen: convolution path -> format of each call's input, in call order; empty if unknown.
    """

    model: nn.Module
    units: dict[str, fx.GraphModule] = field(default_factory=dict[str, fx.GraphModule])
    calls: dict[str, CallSignature] = field(default_factory=dict[str, CallSignature])
    untraced: dict[str, str] = field(default_factory=dict[str, str])
    calls_seen: dict[str, tuple[CallFormat, ...]] = field(default_factory=dict[str, tuple[CallFormat, ...]])

    @property
    def input_shapes(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Convolution path -> shape of each call's input."""
        return {path: tuple(call.shape for call in calls) for path, calls in self.calls_seen.items()}

    def assemble(
        self, units: Mapping[str, nn.Module], on_part: Callable[[str], None] | None = None
    ) -> nn.Module:
        """The model with each traced submodule replaced by ``units[path]``; the rest are clones.

        Args:
            on_part: called with a unit's path when untraced code calls a part of the unit instead; by default
                that is an error.
        """
        report = _refuse_part if on_part is None else on_part
        replaced: dict[int, TracedUnit] = {}
        for path, graph_module in units.items():
            original = self.model.get_submodule(path)

            def notify(path: str = path) -> None:
                report(path)

            replaced[id(original)] = make_unit(original, graph_module, self.calls[path], notify)
        return clone_module(self.model, replaced)

    def owner(self, path: str) -> str | None:
        """Path of the unit or untraced module that ``path`` belongs to: the innermost one."""
        known = [*self.units, *self.untraced]
        inside = [name for name in known if name in ("", path) or path.startswith(f"{name}.")]
        return max(inside, key=len, default=None)


def _refuse_part(path: str) -> None:
    raise ModelError(
        "its parent, which torch.fx cannot trace, calls parts of it instead of the whole",
        where=path,
        fix="compile with example_inputs, which show what is called",
    )


def example_call(example_inputs: Any) -> Call:
    """``example_inputs`` as (args, kwargs): a tensor, a tuple or list of arguments, or a dict of keywords."""
    if isinstance(example_inputs, Mapping):
        return (), dict(cast("Mapping[str, Any]", example_inputs))
    if isinstance(example_inputs, (tuple, list)):
        return tuple(cast("tuple[Any, ...]", example_inputs)), {}
    return (example_inputs,), {}


def _root_of(module: nn.Module, call: CallSignature) -> nn.Module:
    """What fx traces for ``module``: the same children, and a forward that takes the placeholders alone.

    fx looks ``forward`` up on the root's class. A subclass of the user's class could be noticed by it.
    """
    values = {
        name: name if name in call.placeholders else f"fixed[{name!r}]" for name in call.signature.parameters
    }
    arguments = [
        values[name] if parameter.kind is parameter.POSITIONAL_ONLY else f"{name}={values[name]}"
        for name, parameter in call.signature.parameters.items()
    ]
    scope: dict[str, Any] = {}
    header = ", ".join(("_", *call.placeholders))
    exec(
        f"def make(forward_, fixed):\n def forward({header}): return forward_({', '.join(arguments)})\n return forward",
        scope,
    )
    made = scope["make"](module.forward, dict(call.fixed))
    # In the globals of the user's forward fx patches what cannot take placeholders: math.sqrt and the like.
    user_globals = getattr(getattr(module.forward, "__func__", module.forward), "__globals__", {})
    forward = types.FunctionType(made.__code__, user_globals, "forward", None, made.__closure__)
    root = type("Root", (nn.Module,), {"forward": forward})()
    root.__dict__.update(module.__dict__)
    return root


def _symbolic_trace(module: nn.Module, example: Call) -> tuple[fx.GraphModule, CallSignature]:
    if has_hooks(module):
        raise TypeError("it has forward hooks")
    call = CallSignature.of(module, *example)
    module = clone_module(module)
    if isinstance(module, nn.Conv2d):  # a leaf: tracing into it would lose the module
        root, graph = nn.Module(), fx.Graph()
        root.add_module("conv", module)
        given = tuple(graph.placeholder(name) for name in call.placeholders)
        graph.output(graph.call_module("conv", given, dict(call.fixed)))
        return fx.GraphModule(root, graph, class_name="Conv2dUnit"), call
    root = _root_of(module, call)
    return fx.GraphModule(root, ConvTracer().trace(root), class_name=type(module).__name__), call


def _trace_tree(traced: TracedModel, module: nn.Module, path: str, example: Call, seen: set[int]) -> None:
    if id(module) in seen or not has_convolution(module):
        return
    seen.add(id(module))
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        try:
            traced.units[path], traced.calls[path] = _symbolic_trace(module, example)
            return
        except Exception as error:  # a model's forward may raise anything when it meets a Proxy
            message = " ".join(str(error).split()) or type(error).__name__
            traced.untraced[path] = f"torch.fx: {message[:160]}"
    _trace_children(traced, module, path, seen)


def _trace_children(traced: TracedModel, module: nn.Module, path: str, seen: set[int]) -> None:
    if "forward" in module.__dict__:  # replaced on the instance: it may call these children, not their clones
        return
    for name, child in module.named_children():
        _trace_tree(traced, child, f"{path}.{name}" if path else name, ((), {}), seen)


def _split(traced: TracedModel, path: str, why: str) -> None:
    """Give up the unit at ``path`` and trace its children instead."""
    del traced.units[path], traced.calls[path]
    traced.untraced[path] = why
    seen = {id(traced.model.get_submodule(known)) for known in (*traced.units, *traced.untraced)}
    _trace_children(traced, traced.model.get_submodule(path), path, seen)


def _mark_sites(traced: TracedModel) -> None:
    path_of = {id(module): path for path, module in named_modules(traced.model)}
    for prefix, graph_module in traced.units.items():
        unit = traced.model.get_submodule(prefix)
        for node in graph_module.graph.nodes:
            if node.op != "call_module":
                continue
            if isinstance(graph_module.get_submodule(str(node.target)), nn.Conv2d):
                conv = unit if isinstance(unit, nn.Conv2d) else unit.get_submodule(str(node.target))
                node.meta[SITE] = path_of[id(conv)]


class _ShapeRecorder(fx.Interpreter):
    """Runs a graph and notes the input of every convolution call."""

    def __init__(self, graph_module: fx.GraphModule, shapes: dict[str, list[CallFormat]]) -> None:
        super().__init__(graph_module)
        self._shapes = shapes

    def run_node(self, n: fx.Node) -> Any:
        if SITE in n.meta:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            given: Any = args[0] if args else kwargs["input"]
            last = given.dim() == 4 and given.is_contiguous(memory_format=torch.channels_last)
            call = CallFormat(tuple(given.shape), given.dtype, last)
            self._shapes.setdefault(n.meta[SITE], []).append(call)
        return super().run_node(n)


def _tensors(value: Any) -> Iterator[Tensor]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf


def _copies(value: Any) -> Any:
    """``value`` with its tensors copied: a model may write into its inputs."""

    def copied(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(copied, value)


def run_apart(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call that leaves its inputs and the random number generators as they were."""
    devices = {leaf.device.index for leaf in _tensors((args, kwargs)) if leaf.is_cuda}
    fork = cast("Any", torch.random).fork_rng
    with fork(devices=sorted(devices)), torch.no_grad():
        return function(*_copies(args), **_copies(kwargs))


def relative_error(expected: Tensor, actual: Tensor, floor: float = 1e-30) -> float:
    """L2 norm of the difference / that of ``expected`` (at least ``floor``), in float64.

    Equal infinities and NaNs at the same places do not count as differences; others make it not finite.
    """
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (expected, actual))
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, a - b).square().sum().sqrt()
    size = torch.where(a.isfinite(), a, 0.0).square().sum().sqrt()
    return float(difference) / max(float(size), floor)


def _agrees(expected: Any, actual: Any) -> bool:
    left, right = list(_tensors(expected)), list(_tensors(actual))
    if [(tensor.shape, tensor.dtype) for tensor in left] != [
        (tensor.shape, tensor.dtype) for tensor in right
    ]:
        return False
    floats = [(a, b) for a, b in zip(left, right, strict=True) if a.is_floating_point()]
    return all(relative_error(a, b, floor=1e-4) <= 1e-2 for a, b in floats)


def _observe(traced: TracedModel, example: Call, expected: Any) -> dict[str, str]:
    """Run the traced units beside the modules they stand for; path -> why of those that have to be split.

    If there are none, the input shapes are recorded, and units that nobody calls are given up.
    """
    shapes: dict[str, list[CallFormat]] = {}
    wrong: dict[str, str] = {}
    called: set[str] = set()

    def on_part(path: str) -> None:
        wrong.setdefault(path, "its parent calls parts of it")

    def watch(unit: TracedUnit, path: str) -> Callable[..., Any]:
        original = clone_module(traced.model.get_submodule(path))
        recorder = _ShapeRecorder(traced.units[path], shapes)

        def forward(*args: Any, **kwargs: Any) -> Any:
            called.add(path)
            wanted = run_apart(original, args, kwargs) if path else expected
            try:
                actual = recorder.run(*unit.call.bind(args, kwargs))
            except Exception as error:  # the graph may fail in any way where the module does not
                wrong[path] = f"the traced graph fails: {type(error).__name__}: {error}"
                return wanted
            if not _agrees(wanted, actual):
                wrong[path] = "the traced graph computes something else"
            return wanted if path in wrong else actual

        return forward

    runner = traced.assemble(traced.units, on_part)
    paths = {id(graph_module): path for path, graph_module in traced.units.items()}
    for unit in [module for module in runner.modules() if isinstance(module, TracedUnit)]:
        unit.__dict__["forward"] = watch(unit, paths[id(unit.graph_module)])
    try:
        actual = run_apart(runner, *example)
    except Exception as error:
        if wrong:
            return wrong
        raise _disagreement(
            traced.model, f"fails on example_inputs ({type(error).__name__}: {error})"
        ) from error
    if not wrong and not _agrees(expected, actual):
        raise _disagreement(traced.model, "does not compute what the model computes on example_inputs")
    traced.calls_seen = {path: tuple(found) for path, found in shapes.items()}
    for path in () if wrong else set(traced.units) - called:
        del traced.units[path], traced.calls[path]
        traced.untraced[path] = "not called on example_inputs"
    return wrong


def _run_example(model: nn.Module, example: Call) -> Any:
    try:
        return run_apart(model, *example)
    except Exception as error:
        raise InputError(
            f"the model itself fails on them: {type(error).__name__}: {error}",
            where="example_inputs",
            fix="give what model(...) takes: a tensor, a tuple of arguments or a dict of keywords",
        ) from error


def _disagreement(model: nn.Module, what: str) -> ModelError:
    return ModelError(
        f"the model made of its traced submodules {what}",
        where=type(model).__name__,
        fix="compile the submodules that hold the convolutions, or make forward deterministic",
    )


def trace(model: nn.Module, example_inputs: Any = None) -> TracedModel:
    """Trace a model in eval mode; what torch.fx cannot trace is traced child by child.

    Args:
        model: any nn.Module in eval mode.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments. With them,
            every traced graph is run once beside its module, and given up for its children's if they
            disagree; shapes are recorded.

    Raises:
        ModelError: not an eager nn.Module, in train mode, or its traced parts compute something else.
        InputError: the model fails on ``example_inputs``.
    """
    model = check_model(model)
    example: Call = ((), {}) if example_inputs is None else example_call(example_inputs)
    traced = TracedModel(model)
    _trace_tree(traced, model, "", example, set())
    _mark_sites(traced)
    if example_inputs is None:
        return traced
    expected = _run_example(clone_module(model), example)
    while wrong := _observe(traced, example, expected):
        for path, why in wrong.items():
            _split(traced, path, why)
        _mark_sites(traced)
    return traced


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
    for path, module in named_modules(model):
        stateful = isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd))  # pyright: ignore[reportPrivateUsage]
        if module.training and (module is model or stateful):
            raise ModelError(
                f"{path or type(model).__name__} is in train mode",
                where="model",
                fix="call model.eval() first; for training see wsp_compiler.prune in the documentation",
            )
    return model
