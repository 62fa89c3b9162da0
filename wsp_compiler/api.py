"""``compile``: the whole compiler, one stage after the other.

nn.Module -trace-> TracedModel -collect_sites-> sites -make_plan-> PruningPlan
          -shrink-> smaller graphs -run_pipeline-> lowered graphs -emit-> CompiledModule
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from wsp_compiler.abwsp.run import searched_plan
from wsp_compiler.arguments import (
    check_budgets,
    check_execution,
    check_precision,
    check_rules,
    check_type,
    device_of,
    moved_to,
)
from wsp_compiler.batches import calibration_calls
from wsp_compiler.budget.times import network_milliseconds
from wsp_compiler.calibration import apply_norms
from wsp_compiler.evaluation import EvalFn, drop_of
from wsp_compiler.lowering import lower
from wsp_compiler.options import CompileOptions, PruneRule
from wsp_compiler.passes import Pipeline, inductor_pipeline
from wsp_compiler.passes import pipeline as default_pipeline
from wsp_compiler.plan import PruningPlan, plan_times
from wsp_compiler.planning import Planner
from wsp_compiler.progress import progress
from wsp_compiler.sites import collect_sites
from wsp_compiler.trace import check_model, example_call, trace
from wsp_compiler.training.prune import unprune

if TYPE_CHECKING:
    from wsp_compiler.codegen.tuner import Tuner
    from wsp_compiler.runtime import CompiledModule


def compile(
    model: nn.Module,
    pr: float = 0.8,
    *,
    example_inputs: Any = None,
    calibration: Any = None,
    method: str | None = None,
    direction: str = "row",
    tile: int | str = 2,
    block: int | None = None,
    importance: str = "output",
    rules: Iterable[PruneRule] = (),
    precision: str | None = None,
    target: Any = None,
    passes: Pipeline | None = None,
    check: bool = False,
    plan: PruningPlan | None = None,
    keep_slower: bool = False,
    tune: str = "off",
    rest: str = "eager",
    cuda_graph: bool = False,
    pr_scope: str | None = None,
    target_latency: float | None = None,
    max_drop: float | None = None,
    eval_fn: EvalFn | None = None,
) -> CompiledModule:
    """Prune a convolutional network in the Winograd domain and compile it.

    Args:
        model: any nn.Module in eval mode. It is not modified; tensors of layers that are not lowered are
            shared.
        pr: share to remove, in [0, 1): of all eligible layers' multiplications together, or of the Winograd weights of
            each layer; see pr_scope.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments. With them,
            the trace is checked against the model and all kernels are built now; without, on the first call.
        calibration: sample inputs without labels: a DataLoader, a list of batches, or a tensor of images (labels in a
            batch are dropped). With them the kept weights are chosen by the energy they add to each layer's output
            and refitted by least squares, layer by layer (docs/accuracy.md). Give images of the size that is run.
        method: pruning pattern: "bwsp" (the same number of rows or columns in every Winograd position), "wsp"
            (one threshold per layer), "fp" (filters; their channels leave the network where nothing else holds
            them), "wwp" (single weights; a library's sparse product runs them, slowly), "dense" (Winograd without
            pruning; pr is ignored), or "abwsp" (None means it): "wsp" or "bwsp" for each layer. With calibration that
            is "wsp", but "bwsp" where it is known to be faster and adds next to nothing to the predicted error;
            without, "bwsp" unless known not to be faster.
        direction: "row" or "column" of each position's matrix U_k [n, c].
        tile: output tile side m of F(m x m, 3x3): 2 or 4, or "auto": the faster one where times are known.
        block: for "bwsp" with rows: equal kept rows in every position and group of ``block`` consecutive filters,
            or of the largest divisor of n up to it; a block of n or more is the paper's BWSP. None picks what
            fits the kernels (:func:`wsp_compiler.pruning.balanced.fit_block`).
        importance: criterion that scores rows, columns and filters: "output" (energy in the layer's output, for
            inputs of white noise unless calibrated), "l2" (the paper's, of the weights), "l1", "fpgm" (distance
            from the geometric median) or "hrank" (for "fp" with calibration: the mean rank of a filter's feature
            maps). With calibration the others choose alone what stays; the refit is the same.
        rules: per-layer overrides; the first whose regular expression matches the module path wins.
        precision: arithmetic of the matrix products: "fp32", "tf32", "fp16" or "bf16" (on the CPU "fp32" or
            "bf16"); None follows the model's dtype and, for float32 on CUDA,
            ``torch.backends.cudnn.allow_tf32``. Inputs and outputs keep their dtype.
        target: None (the model's device), "cpu", "cuda", "cuda:N" or a TVM target.
        passes: a :class:`~wsp_compiler.passes.Pipeline`; by default ``wsp_compiler.pipeline``, for rest="inductor"
            ``wsp_compiler.passes.inductor_pipeline``.
        check: compare the graph's output in float64 after every pass (needs example_inputs; slow).
        plan: use this plan instead of making one (pr, method, direction, tile, block, rules and keep_slower are
            then not read). It is never changed; the report says where dense would have been faster.
        keep_slower: lower layers also where PyTorch's dense convolution is known to be faster. By default those stay
            dense and unpruned. Speed is checked with example_inputs only, and only on devices with known times
            (docs/tuning.md).
        tune: what is measured where no times are known: "off" nothing, "fast" a few seconds a layer, "full" every
            kernel that can run it. Results are kept on disk.
        rest: how the rest of the model runs: "eager" (PyTorch, convolutions with the vendor's fused epilogues) or
            "inductor" (torch.compile with frozen weights; compiles anew for every input shape, takes minutes for
            a deep model, needs a C++ compiler on the CPU).
        cuda_graph: capture one CUDA graph for every kind of input (shapes, strides, dtypes) at its first call and
            replay it from then on. Each keeps its inputs, outputs and intermediate results allocated. Python
            code of untraced parts runs at capture only. CUDA only.
        pr_scope: "global": uneven ratios, with the least predicted error of the network's output at ``pr`` = 1 - kept
            multiplications / those of unpruned F(2x2, 3x3), over all eligible layers but those whose pr a rule sets;
            "layer": ``pr`` in every layer, as in the papers. None is "global" with calibration, else "layer".
        target_latency: milliseconds of a call on example_inputs: the plan of least predicted error whose compiled
            network was measured within it; ``pr`` is not read. Needs example_inputs, and known times or tune="fast".
        max_drop: how much eval_fn may lose against the dense model, in its own unit: the fastest plan (by known
            times, else by multiplications) found within it; ``pr`` is not read. Calibrates and evaluates six or seven
            networks.
        eval_fn: quality of a model, higher is better, as a number. It is given ordinary modules of the model's class in
            eval mode, not compiled ones. Without max_drop it chooses between "wsp" and "bwsp": for "abwsp" with
            calibration, pr_scope None or "layer", :func:`wsp_compiler.search` is run without fine-tuning (pr is even
            over the layers; up to 256 evaluations, see docs/search.md).

    Returns:
        A :class:`~wsp_compiler.runtime.CompiledModule`.

    Raises:
        WspError: a subclass that says what is wrong, where, and what to do.
    """
    from wsp_compiler.codegen.plan_speed import PlanSpeed
    from wsp_compiler.codegen.prebuild import prebuild
    from wsp_compiler.codegen.targets import resolve_target
    from wsp_compiler.codegen.tuner import Tuner
    from wsp_compiler.runtime import CompilationRecord, CompiledModule, emit

    # what is asked for
    check_rules(rules)
    options = CompileOptions(
        pr, method or "abwsp", direction, tile, importance, tuple(rules), precision,
        block=block, keep_slower=keep_slower, tune=tune,
        pr_scope=pr_scope, target_latency=target_latency, max_drop=max_drop,
    )  # fmt: skip
    check_budgets(options, plan, example_inputs, eval_fn)
    check_type("passes", passes, Pipeline, "edit wsp_compiler.pipeline: its methods return a Pipeline")
    check_type("plan", plan, PruningPlan, "use PruningPlan.from_json(text) or another compiled module's plan")
    model = check_model(model)
    if plan is None and calibration is None and (trained := unprune(model)) is not None:
        model, plan = trained
    code_target = resolve_target(target, device_of(model))
    check_precision(options, code_target.is_cuda)
    check_execution(rest, cuda_graph, code_target.is_cuda)
    model, example_inputs = moved_to(code_target.device, model, example_inputs)
    if plan is None:
        plan = searched_plan(model, options, eval_fn, calibration, example_inputs, target)
        calibration = calibration if plan is None else None  # the searched plan is calibrated

    # trace, and find the convolutions
    traced = trace(model, example_inputs)
    sites = collect_sites(traced)
    modules = cast("Iterable[tuple[str, nn.Module]]", model.named_modules())
    convolutions = {path: module for path, module in modules if isinstance(module, nn.Conv2d)}

    # plan
    calls = None if calibration is None else calibration_calls(calibration, model, example_inputs)
    tuner = Tuner(code_target, tune)
    speed = PlanSpeed(tuner, precision)
    planner = Planner(traced, sites, convolutions, options, speed, calls)

    def measured(candidate: PruningPlan) -> float:
        made = compile(
            model, example_inputs=example_inputs, precision=precision, target=target, passes=passes,
            plan=candidate, tune=tune, rest=rest, cuda_graph=cuda_graph,
        )  # fmt: skip
        return network_milliseconds(made, example_inputs)

    with _showing_measurements(tuner, sum(site.reject is None for site in sites)):
        if plan is None:
            chosen = planner.make(measured, drop_of(eval_fn, model, example_inputs))
            times = chosen.times
        else:
            plan.check_fits(convolutions)
            times = plan_times(plan, sites, convolutions, speed)
            chosen = planner.calibrated(plan, choose=False)

    # shrink, and run the passes
    for unit in traced.units.values():
        apply_norms(unit, model, chosen)
    passes = passes or (inductor_pipeline if rest == "inductor" else default_pipeline)
    records, shrunk = lower(traced, chosen, passes, example_inputs, check, code_target.channel_multiple)

    # emit
    dtypes = {path: conv.weight.dtype for path, conv in convolutions.items()}
    emitted = {path: emit(gm, code_target, precision, dtypes, rest) for path, gm in traced.units.items()}
    compiled = CompiledModule(
        executable=traced.assemble(emitted),
        graph_module=traced.units[""] if "" in traced.units else traced.assemble(traced.units),
        record=CompilationRecord(sites, chosen, traced.untraced, records, times, shrunk),
        target=code_target,
        cuda_graph=cuda_graph,
    )
    for part in (compiled.executable, compiled.graph_module):  # batch norms outside of what was traced
        apply_norms(cast("nn.Module", part), model, chosen)
    for layer in compiled.layers():
        layer.tuner = tuner

    # build
    if example_inputs is not None:
        prebuild(
            compiled.layers(),
            cast("nn.Module", compiled.graph_module),
            {site.path: site.formats for site in sites},
        )
        _build_kernels(compiled, example_inputs)
    return compiled


@contextlib.contextmanager
def _showing_measurements(tuner: Tuner, layers: int) -> Generator[None]:
    """A progress bar on a terminal while ``tuner`` measures layers for the plan."""
    with progress("measuring kernels", 2 * layers, enabled=tuner.level != "off") as advance:
        tuner.on_measure = advance
        try:
            yield
        finally:
            tuner.on_measure = None


def _build_kernels(compiled: nn.Module, example_inputs: Any) -> None:
    """Run once on the example inputs, which builds every kernel, with a progress bar on a terminal."""
    from wsp_compiler.codegen import layer

    args, kwargs = example_call(example_inputs)
    total = sum(isinstance(module, layer.WinogradLayer) for module in compiled.modules())
    with progress("building kernels", total) as advance:
        layer.on_build.append(advance)
        try:
            compiled(*args, **kwargs)
        finally:
            layer.on_build.remove(advance)


__all__ = ["compile"]
