"""Fold batch norm into the Winograd weights: its per-channel scale multiplies rows of U, the rest is a bias.

rewrite:
    y = wsp::output_transform(M(weight), ..., bias, ...)   ->  the same with weight' = s * weight (by row),
    z = batch_norm(y)                                           bias' = (bias - mean) * s + beta
                                                            where s = gamma / sqrt(var + eps)

Row scalings commute with row and column pruning, so the plan's ``keep`` stays valid.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, fx, nn

from wsp_compiler.clone import named_modules
from wsp_compiler.ops import WinogradSite
from wsp_compiler.passes.base import (
    INPUT_TRANSFORM,
    OUTPUT_TRANSFORM,
    SPARSE_BGEMM,
    PassBase,
    Rewrites,
    altered,
    arguments,
    called_module,
    first_input,
    get_buffer,
    is_op,
    set_argument,
    site_of,
)
from wsp_compiler.plan import PruningPlan


def batch_norm_scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(scale, shift) in float64 such that norm(y) = scale * y + shift in eval mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    shift = torch.zeros_like(scale)
    weight, bias = cast("Tensor | None", norm.weight), cast("Tensor | None", norm.bias)  # None if not affine
    scale = scale if weight is None else scale * weight.detach().double()
    shift = shift if bias is None else bias.detach().double()
    return scale, shift - norm.running_mean.double() * scale


def declines_folding(norm: nn.BatchNorm2d, producer: fx.Node) -> str | None:
    """Why ``norm`` cannot be folded into ``producer``, or None."""
    if norm.running_mean is None or norm.training:
        return "it normalises with batch statistics"
    if type(norm) is not nn.BatchNorm2d:
        return f"{type(norm).__name__} is not a plain BatchNorm2d"
    if (reason := altered(norm)) is not None:
        return reason
    if len(producer.users) > 1:
        return f"{producer.name} has other users"
    return None


def _fold(site: WinogradSite, scale: Tensor, shift: Tensor) -> None:
    rows = site.row_offset.diff().long()
    columns = torch.repeat_interleave(site.column_offset.diff().long(), rows)  # columns of every stored row
    by_row = scale[site.rows.long()]  # [R]
    site.weight = (site.weight.double() * torch.repeat_interleave(by_row, columns)).float()
    site.bias = (site.bias.double() * scale + shift).float()


def _own_site(gm: fx.GraphModule, output: fx.Node) -> WinogradSite:
    """The site's buffers for this call alone: cloned if other calls of the same convolution read them too."""
    name, site = site_of(gm, output)
    stages = [output, arguments(output)["M"]]
    stages.append(arguments(stages[1])["V"])
    readers = [
        node for node in gm.graph.nodes if is_op(node, OUTPUT_TRANSFORM) and site_of(gm, node)[0] == name
    ]
    if len(readers) == 1:
        return site
    fresh, taken = name, dict(named_modules(gm))
    while fresh in taken:
        fresh += "_call"
    clone = copy.deepcopy(site)
    gm.add_submodule(fresh, clone)
    for stage in stages:
        for key, value in arguments(stage).items():
            if (
                isinstance(value, fx.Node)
                and value.op == "get_attr"
                and str(value.target).startswith(f"{name}.")
            ):
                set_argument(
                    stage, key, get_buffer(gm, stages[2], fresh, str(value.target).rpartition(".")[2])
                )
    return clone


def _declines_chain(output: fx.Node) -> str | None:
    """Why the stages that end in ``output`` cannot take a batch norm, or None."""
    given = arguments(output)
    if given["activation"] != "none" or given["residual"] is not None:
        return "an activation or residual add comes between"
    M = given["M"]
    connected = is_op(M, SPARSE_BGEMM) and is_op(arguments(M)["V"], INPUT_TRANSFORM)
    if not connected or len(M.users) > 1 or len(arguments(M)["V"].users) > 1:
        return "its stages are not directly connected"
    return None


@dataclass(frozen=True)
class FoldBatchNorm(PassBase):
    """See the module's docstring."""

    name: str = field(default="fold_batch_norm", init=False)
    requires: tuple[str, ...] = field(default=("lowered",), init=False)

    def run(self, gm: fx.GraphModule, plan: PruningPlan) -> Rewrites:
        """Fold every BatchNorm2d that directly follows an unfused output transform."""
        count = 0
        declined: list[tuple[str, str]] = []
        for node in list(gm.graph.nodes):
            norm, producer = called_module(gm, node), first_input(node)
            if not isinstance(norm, nn.BatchNorm2d) or not isinstance(producer, fx.Node):
                continue
            if not is_op(producer, OUTPUT_TRANSFORM):
                continue
            reason = declines_folding(norm, producer) or _declines_chain(producer)
            if reason is not None:
                declined.append((str(node.target), reason))
                continue
            scale, shift = batch_norm_scale_and_shift(norm)
            _fold(_own_site(gm, producer), scale, shift)
            node.replace_all_uses_with(producer)
            gm.graph.erase_node(node)
            count += 1
        return Rewrites(count, tuple(declined))
