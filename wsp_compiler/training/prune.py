"""A trainable copy of a model with pruned Winograd layers, and the way back into ``compile``."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from wsp_compiler.batches import calibration_calls
from wsp_compiler.calibration import calibrate
from wsp_compiler.clone import clone_module, named_modules
from wsp_compiler.errors import PlanError
from wsp_compiler.options import CompileOptions, PruneRule
from wsp_compiler.plan import PruningPlan
from wsp_compiler.planning import Planner
from wsp_compiler.refits import SiteRefit
from wsp_compiler.site_plan import SitePlan
from wsp_compiler.sites import collect_sites, padding_of
from wsp_compiler.trace import check_model, trace
from wsp_compiler.training.layer import WinogradConv2d


def prune(
    model: nn.Module,
    pr: float = 0.8,
    *,
    calibration: Any = None,
    example_inputs: Any = None,
    method: str = "wsp",
    direction: str = "row",
    tile: int = 2,
    importance: str = "output",
    rules: Iterable[PruneRule] = (),
    plan: PruningPlan | None = None,
    pr_scope: str = "layer",
) -> nn.Module:
    """A copy of ``model`` whose pruned convolutions are trainable :class:`WinogradConv2d`.

    Train it with any loop (or :func:`wsp_compiler.finetune`), call ``eval()``, and give it to
    :func:`wsp_compiler.compile`: the trained weights are compiled as they are.

    Args:
        model: in eval mode; not modified.
        pr, calibration, example_inputs, method, direction, tile, importance, rules: as for
            :func:`wsp_compiler.compile`. Calibration gives training a far better start.
        plan: use this plan and its weights instead.
        pr_scope: "layer", the same ratio in every layer as in the papers, or "global"; not read with ``plan``.

    Returns:
        A module of the model's class, in eval mode, on its device.

    Raises:
        WspError: as for compile.
    """
    model = check_model(model)
    traced = trace(model, example_inputs)
    convolutions = {path: conv for path, conv in named_modules(model) if isinstance(conv, nn.Conv2d)}
    calls = None if calibration is None else calibration_calls(calibration, model, example_inputs)
    if plan is None:
        options = CompileOptions(pr, method, direction, tile, importance, tuple(rules), pr_scope=pr_scope)
        chosen = Planner(traced, collect_sites(traced), convolutions, options, None, calls).make()
    else:
        plan.check_fits(convolutions)
        chosen = plan if calls is None else calibrate(traced, plan, calls, choose=False)
    result = copy.deepcopy(model)
    layers: dict[int, nn.Module] = {}
    copies = dict(named_modules(result))
    for path, entry in chosen.items():
        conv = convolutions[path]
        U, bias = chosen.weights(path, conv)
        dtype, filters = conv.weight.dtype, conv.out_channels
        layer = WinogradConv2d(
            U.to(dtype),
            torch.zeros(filters, dtype=dtype, device=U.device) if bias is None else bias.to(dtype),
            entry.keep,
            padding_of(conv),
            entry.tile,
        )
        layers[id(copies[path])] = layer.eval()
    result = _replaced(result, layers)
    norms = {path: norm for path, norm in named_modules(result) if isinstance(norm, nn.BatchNorm2d)}
    for path, statistics in chosen.norms.items():
        mean, variance = norms[path].running_mean, norms[path].running_var
        assert mean is not None
        assert variance is not None
        mean.copy_(statistics.mean)
        variance.copy_(statistics.variance)
    return result


def _replaced(model: nn.Module, layers: dict[int, nn.Module]) -> nn.Module:
    """``model`` with modules exchanged, by identity, wherever they hang."""
    if id(model) in layers:
        return layers[id(model)]
    for parent in list(model.modules()):
        # named_children() would omit repetitions
        children: dict[str, nn.Module | None] = parent.__dict__["_modules"]
        for name, child in children.items():
            children[name] = layers.get(id(child), child)
    return model


def unprune(model: nn.Module) -> tuple[nn.Module, PruningPlan] | None:
    """(the model with ordinary convolutions, the plan that holds its Winograd weights); None without such layers.

    The convolutions' own weights are zeros: the plan replaces all of them. ``model`` is not modified; other tensors
    are shared.
    """
    found = {path: layer for path, layer in named_modules(model) if isinstance(layer, WinogradConv2d)}
    if not found:
        return None
    stand_ins: dict[int, Any] = {}
    plan = PruningPlan()
    for path, layer in found.items():
        n, c = layer.out_channels, layer.in_channels
        conv = nn.Conv2d(c, n, 3, padding=layer.padding, device=layer.weight.device, dtype=layer.weight.dtype)
        with torch.no_grad():
            conv.weight.zero_()
            conv.bias.zero_()  # pyright: ignore[reportOptionalMemberAccess]
        stand_ins[id(layer)] = conv.requires_grad_(False).eval()
        keep = layer.keep.cpu()
        if not bool(torch.isfinite(layer.weight).all()):
            raise PlanError(
                "its weights are NaN or infinite", where=path, fix="train with a smaller learning rate"
            )
        direction = "column" if keep.shape[1] == 1 and keep.shape[2] > 1 else "row"
        pruned = not bool(keep.all())
        by_element = min(keep.shape[1:]) > 1
        method = "dense" if not pruned else "fp" if keep.shape[0] == 1 else "wwp" if by_element else "wsp"
        shape = (int(layer.weight.shape[0]), n, c)
        entry = SitePlan(path, method, direction, layer.tile, 1 - float(keep.float().mean()), keep, shape)
        plan.sites[path] = entry
        plan.refits[path] = SiteRefit.pack(layer.winograd_weight(), layer.bias, keep)
    return clone_module(model, stand_ins), plan
