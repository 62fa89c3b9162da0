"""Traced graphs without the channels of pruned filters, and the plan that fits them.

The graphs keep their nodes: modules are exchanged for smaller ones, and only in the graphs, never in the user's
model. What the graphs compute stays the same (removal.py says how), up to the rounding of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from wsp_compiler.clone import clone_module
from wsp_compiler.filters.narrow import (
    merged,
    narrow_convolution,
    narrow_depthwise,
    narrow_linear,
    narrow_norm,
    narrow_prelu,
    replace_module,
    set_parameter,
)
from wsp_compiler.filters.removal import Fold, Removal, find_removal
from wsp_compiler.plan import PruningPlan
from wsp_compiler.refits import SiteRefit
from wsp_compiler.site_plan import SitePlan
from wsp_compiler.trace import SITE
from wsp_compiler.winograd import transform

DENSE_FROM = 8
"""Kernels for unpruned layers run what is left where at most one filter in so many is zero: carriers of constants."""
VENDOR = "its kept filters run as a dense convolution, which is faster"


@dataclass(frozen=True)
class Shrunk:
    """What became of a plan on graphs without pruned channels.

    Attributes:
        plan: for the smaller graphs. Convolutions whose kept filters the vendor's library runs are no longer in it.
        sizes: path -> (filters, channels) of every convolution that is smaller now.
        reasons: path of a convolution -> why channels of its pruned filters are still there.
    """

    plan: PruningPlan
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    reasons: dict[str, str] = field(default_factory=dict[str, str])


def shrink(units: Mapping[str, fx.GraphModule], plan: PruningPlan, multiple: int = 1) -> Shrunk:
    """Remove the channels of filters that method "fp" prunes, wherever nothing else holds them.

    Args:
        units: traced graphs, with the plan's batch-norm statistics; their modules are exchanged.
        plan: not modified.
        multiple: of channels that the target's Winograd kernels want (`CodeTarget.channel_multiple`).

    Returns:
        The plan for the smaller graphs. Without filters to prune it is ``plan``.
    """
    if not any(entry.method == "fp" for entry in plan.values()):
        return Shrunk(plan)
    result = Shrunk(
        replace(
            plan, sites=dict(plan.sites), left_alone=dict(plan.left_alone), refits=dict(plan.refits), norms={},
            errors=dict(plan.errors),
        )
    )  # fmt: skip
    for gm in units.values():
        removal = find_removal(gm, plan, multiple=multiple)
        result.sizes.update(removal.sizes(gm))
        result.reasons.update(removal.reasons)
        for node, operation in removal.coupling.operations.items():
            if operation.module is not None:
                _exchange(gm, node, removal, result.plan)
        gm.recompile()
    for path, entry in result.plan.sites.items():
        if not entry.winograd:  # its channels could not be followed
            result.plan.sites[path] = replace(entry, winograd=True)
    return result


def _exchange(gm: fx.GraphModule, node: fx.Node, removal: Removal, plan: PruningPlan) -> None:
    """Exchange the module that ``node`` calls, and its entry of ``plan``."""
    operation = removal.coupling.operations[node]
    module, fold, x = (
        operation.module,
        removal.folds.get(node),
        operation.inputs[0] if operation.inputs else node,
    )
    if operation.kind in ("conv", "grouped") and isinstance(module, nn.Conv2d):
        smaller: nn.Module = _convolution(
            module, str(node.meta.get(SITE, node.target)), removal.stay(node), fold, plan
        )
    elif x not in removal.coupling.values or len(stay := removal.stay(x)) == len(removal.coupling.values[x]):
        return
    elif isinstance(module, nn.Linear) and fold is not None:
        smaller = narrow_linear(module, fold)
    elif operation.kind == "depthwise" and isinstance(module, nn.Conv2d):
        smaller = narrow_depthwise(module, stay)
    elif operation.kind == "norm" and isinstance(module, nn.BatchNorm2d):
        smaller = narrow_norm(module, stay)
    elif operation.kind == "elementwise" and isinstance(module, nn.PReLU):
        smaller = narrow_prelu(module, stay)
    else:
        return
    replace_module(gm, str(node.target), smaller)


def _convolution(
    conv: nn.Conv2d, path: str, filters: Tensor, fold: Fold | None, plan: PruningPlan
) -> nn.Conv2d:
    """The smaller convolution; its entry of ``plan`` becomes that of the smaller one, or goes."""
    entry = plan.get(path)
    if entry is not None and not entry.winograd:
        conv = _pruned_filters(conv, entry, plan)
        plan.sites.pop(path)
        plan.refits.pop(path, None)
        plan.left_alone[path] = VENDOR
    elif entry is not None and (len(filters) < conv.out_channels or fold is not None):
        whole = conv
        if (
            entry.method == "fp" and path not in plan.refits
        ):  # filters that stay pruned must not take up constants
            conv = _pruned_filters(conv, entry, plan)
        _shrink_entry(entry, whole, filters, fold, plan)
    if len(filters) == conv.out_channels and fold is None:
        return conv
    return narrow_convolution(conv, filters, fold)


def _pruned_filters(conv: nn.Conv2d, entry: SitePlan, plan: PruningPlan) -> nn.Conv2d:
    """``conv`` with zeros for its pruned filters, and with refitted weights if there are any."""
    weight, bias, refit = conv.weight.detach(), conv.bias, plan.refits.get(entry.path)
    if refit is not None:
        weight = spatial_filters(refit.unpack(entry.keep, entry.shape), entry.tile).to(conv.weight.device)
        bias = refit.bias
    keep = entry.keep.expand(1, entry.shape[1], 1).view(-1, 1, 1, 1).to(weight.device)
    result = clone_module(conv)
    set_parameter(result, "weight", torch.where(keep, weight, torch.zeros_like(weight)), conv.weight)
    if bias is not None:
        set_parameter(result, "bias", bias.detach(), conv.weight[:0, 0, 0, 0])
    return result


def spatial_filters(U: Tensor, tile: int) -> Tensor:
    """The filters [n, c, 3, 3], float64, whose Winograd weights are U [p*p, n, c] (or are nearest to U)."""
    G = transform(tile).tensor("G", torch.float64, U.device)
    inverse: Tensor = cast("Any", torch.linalg).pinv(torch.kron(G, G))  # [9, p*p]
    return (inverse @ U.double().flatten(1)).view(3, 3, *U.shape[1:]).permute(2, 3, 0, 1)


def _shrink_entry(
    entry: SitePlan, conv: nn.Conv2d, filters: Tensor, fold: Fold | None, plan: PruningPlan
) -> None:
    """Replace the plan's entry of a convolution that is lowered by that of the smaller one.

    Where the pattern removes whole rows and the weights are the model's own, the smaller convolution's weights say
    all; else Winograd weights are stored.
    """
    path, keep = entry.path, entry.keep
    stored = path in plan.refits or keep.shape[2] > 1
    weight, bias = plan.weights(path, conv) if stored else (None, None)
    if weight is not None:
        weight = torch.where(keep.to(weight.device), weight, torch.zeros_like(weight))
    if fold is not None:
        if keep.shape[2] > 1 and fold.carrier is not None:
            keep = keep.clone()
            silent = fold.constant == 0
            keep[..., fold.carrier[0]] |= (keep & ~silent).any(2)
        keep = keep.index_select(2, fold.stay) if keep.shape[2] > 1 else keep
        if weight is not None:
            weight = merged(weight, 2, fold).index_select(2, fold.stay.to(weight.device))
    keep = keep.index_select(1, filters) if keep.shape[1] > 1 else keep
    if entry.method == "fp" and DENSE_FROM * int((~keep).sum()) <= keep.numel():
        keep = torch.ones((1, 1, 1), dtype=torch.bool)
    channels = entry.shape[2] if fold is None else len(fold.stay)
    plan.sites[path] = replace(entry, keep=keep, shape=(entry.shape[0], len(filters), channels))
    if weight is not None:
        index = filters.to(weight.device)
        values = torch.zeros(entry.shape[1], device=weight.device) if bias is None else bias.detach()
        plan.refits[path] = SiteRefit.pack(weight.index_select(1, index), values.index_select(0, index), keep)
