"""``compile``: the whole compiler, one stage after the other.

nn.Module -trace-> TracedModel -collect_sites-> sites -make_plan-> PruningPlan
          -run_pipeline-> lowered graphs -emit-> CompiledModule
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from wsp_compiler.errors import ModelError, OptionError
from wsp_compiler.options import CompileOptions, PruneRule
from wsp_compiler.passes import PassRecord, Pipeline, run_pipeline
from wsp_compiler.passes import pipeline as default_pipeline
from wsp_compiler.plan import PruningPlan, make_plan
from wsp_compiler.sites import collect_sites
from wsp_compiler.trace import TracedModel, TracedUnit, check_model, example_call, trace

if TYPE_CHECKING:
    from wsp_compiler.runtime import CompiledModule


def compile(
    model: nn.Module,
    pr: float = 0.8,
    *,
    example_inputs: Any = None,
    method: str = "bwsp",
    direction: str = "row",
    tile: int = 2,
    importance: str = "l2",
    rules: Iterable[PruneRule] = (),
    precision: str | None = None,
    target: Any = None,
    passes: Pipeline | None = None,
    check: bool = False,
    plan: PruningPlan | None = None,
) -> CompiledModule:
    """Prune a convolutional network in the Winograd domain and compile it.

    Args:
        model: any nn.Module in eval mode. It is not modified; tensors of layers that are not lowered are
            shared.
        pr: share of the Winograd weights to remove from each eligible layer, in [0, 1).
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments. With them,
            the trace is checked against the model and all kernels are built now; without, on the first call.
        method: pruning pattern: "bwsp" (the same number of rows or columns in every Winograd position), "wsp"
            (one threshold per layer), "fp" (filters), or "dense" (Winograd without pruning; pr is ignored).
        direction: "row" or "column" of each position's matrix U_k [n, c].
        tile: output tile side m of F(m x m, 3x3): 2 or 4.
        importance: criterion that scores rows, columns and filters; "l2" is the paper's.
        rules: per-layer overrides; the first whose regular expression matches the module path wins.
        precision: arithmetic of the matrix products: "fp32", "tf32", "fp16" or "bf16" (on the CPU "fp32" or
            "bf16"); None follows the model's dtype and, for float32 on CUDA,
            ``torch.backends.cudnn.allow_tf32``. Inputs and outputs keep their dtype.
        target: None (the model's device), "cpu", "cuda", "cuda:N" or a TVM target.
        passes: a :class:`~wsp_compiler.passes.Pipeline`; by default ``wsp_compiler.pipeline``.
        check: compare the graph's output in float64 after every pass (needs example_inputs; slow).
        plan: use this plan instead of making one (pr, method, direction, tile and rules are then not read).

    Returns:
        A :class:`~wsp_compiler.runtime.CompiledModule`.

    Raises:
        WspError: a subclass that says what is wrong, where, and what to do.
    """
    from wsp_compiler.codegen.targets import resolve_target
    from wsp_compiler.runtime import CompilationRecord, CompiledModule, emit

    if not isinstance(rules, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(f"rules is {rules!r}", where="compile", fix="pass a list of wsp_compiler.PruneRule")
    options = CompileOptions(pr, method, direction, tile, importance, tuple(rules), precision)
    _check_type("passes", passes, Pipeline, "edit wsp_compiler.pipeline: its methods return a Pipeline")
    _check_type(
        "plan", plan, PruningPlan, "use PruningPlan.from_json(text) or another compiled module's plan"
    )
    model = check_model(model)
    code_target = resolve_target(target, _device_of(model))
    _check_precision(options, code_target.is_cuda)
    if _device_of(model) != code_target.device:
        model = copy.deepcopy(model).to(code_target.device)
        example_inputs = _moved(example_inputs, code_target.device)

    traced = trace(model, example_inputs)
    sites = collect_sites(traced)
    modules = cast("Iterable[tuple[str, nn.Module]]", model.named_modules())
    convolutions = {path: module for path, module in modules if isinstance(module, nn.Conv2d)}
    chosen = make_plan(sites, convolutions, options) if plan is None else plan
    chosen.check_fits(convolutions)
    records = _lower(traced, chosen, passes or default_pipeline, example_inputs, check)
    dtypes = {path: conv.weight.dtype for path, conv in convolutions.items()}
    emitted = {path: emit(gm, code_target, precision, dtypes) for path, gm in traced.units.items()}
    compiled = CompiledModule(
        executable=traced.assemble(emitted),
        graph_module=traced.units[""] if "" in traced.units else traced.assemble(traced.units),
        record=CompilationRecord(sites, chosen, traced.untraced, records),
        target=code_target,
    )
    if example_inputs is not None:
        _build_kernels(compiled, example_inputs)
    return compiled


def _device_of(model: nn.Module) -> torch.device:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        listed = ", ".join(sorted(map(str, devices)))
        raise ModelError(
            f"its tensors are on several devices: {listed}", where="model", fix="move it to one device"
        )
    return next(iter(devices), torch.device("cpu"))


def _moved(value: Any, device: torch.device) -> Any:
    def move(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(move, value)


def _check_type(name: str, value: object, kind: type, fix: str) -> None:
    if value is not None and not isinstance(value, kind):
        raise OptionError(
            f"{name} is a {type(value).__name__}, not a {kind.__name__}", where="compile", fix=fix
        )


def _check_precision(options: CompileOptions, is_cuda: bool) -> None:
    if not is_cuda and options.precision in ("tf32", "fp16"):
        raise OptionError(
            f"precision {options.precision!r} does not exist on the CPU",
            where="compile",
            fix="use 'fp32' or 'bf16'",
        )


def _lower(
    traced: TracedModel, plan: PruningPlan, pipeline: Pipeline, example_inputs: Any, check: bool
) -> tuple[PassRecord, ...]:
    """Run the passes on every unit, in place."""
    if check and example_inputs is None:
        raise OptionError("check=True needs inputs to compare on", where="compile", fix="pass example_inputs")
    inputs = _unit_inputs(traced, example_inputs) if check else {}
    records: list[PassRecord] = []
    for path, gm in traced.units.items():
        checker = None
        if path in inputs:
            from wsp_compiler.verify import make_check

            checker = make_check(gm, plan, inputs[path])
        records += run_pipeline(pipeline, gm, plan, unit=path, check=checker)
    return tuple(records)


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


def _build_kernels(compiled: nn.Module, example_inputs: Any) -> None:
    """Run once on the example inputs, which builds every kernel, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    from wsp_compiler.codegen import layer

    args, kwargs = example_call(example_inputs)
    console = Console(stderr=True)
    total = sum(isinstance(module, layer.WinogradLayer) for module in compiled.modules())
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("building kernels", total=total)

        def advance() -> None:
            progress.advance(task)

        layer.on_build.append(advance)
        try:
            compiled(*args, **kwargs)
        finally:
            layer.on_build.remove(advance)


__all__ = ["compile"]
