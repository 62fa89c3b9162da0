"""Smaller copies of modules: with fewer filters, channels or features. The originals stay as they are."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from wsp_compiler.clone import clone_module
from wsp_compiler.filters.constants import answer
from wsp_compiler.filters.removal import Fold
from wsp_compiler.ops import suggest_channels_last


def merged(weight: Tensor, dim: int, fold: Fold) -> Tensor:
    """``weight`` with what the removed channels of dimension ``dim`` contribute added to the carrier's; float64.

    All channels are still there; without a carrier nothing is added.
    """
    weight = weight.detach().double()
    if fold.carrier is None:
        return weight
    index, constant = fold.carrier
    ratios = (fold.constant / constant).to(weight)  # [C]
    added = weight.movedim(dim, -1) @ ratios
    result = weight.clone()
    result.select(dim, index).add_(added)
    return result


def set_parameter(module: nn.Module, name: str, value: Tensor, like: Tensor) -> None:
    """Give ``module`` a parameter of the dtype, device and memory format of ``like``, without gradient."""
    value = value.to(like.device, like.dtype)
    last = like.dim() == 4 and suggest_channels_last(like)
    value = value.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def narrow_convolution(conv: nn.Conv2d, filters: Tensor, fold: Fold | None) -> nn.Conv2d:
    """``conv`` with some of its filters [indices] and without the removed channels of its input.

    Works for any number of groups that lose the same channels each; not for depthwise convolutions.
    """
    result, weight, bias = clone_module(conv), conv.weight.detach(), conv.bias
    if fold is not None:
        if fold.carrier is None and bool(fold.constant.any()):
            added = answer(conv, weight, fold.constant)
            bias = added if bias is None else bias.detach().double() + added
        per_group = conv.in_channels // conv.groups
        inside = fold.stay[fold.stay < per_group]  # the same in every group
        weight = merged(weight, 1, fold) if conv.groups == 1 else weight
        weight = weight.index_select(1, inside.to(weight.device))
        result.in_channels = len(fold.stay)
    index = filters.to(weight.device)
    set_parameter(result, "weight", weight.index_select(0, index), conv.weight)
    if bias is not None:
        set_parameter(result, "bias", bias.detach().index_select(0, index), conv.weight[:0, 0, 0, 0])
    result.out_channels = len(filters)
    return result


def narrow_depthwise(conv: nn.Conv2d, stay: Tensor) -> nn.Conv2d:
    """A depthwise ``conv`` (with any multiplier) for some channels [indices] of its input."""
    multiplier, result = conv.out_channels // conv.groups, clone_module(conv)
    filters = (stay.view(-1, 1) * multiplier + torch.arange(multiplier)).flatten()
    for name in ("weight", "bias"):
        value: Tensor | None = getattr(conv, name)
        if value is not None:
            set_parameter(result, name, value.detach().index_select(0, filters.to(value.device)), value)
    result.in_channels = result.groups = len(stay)
    result.out_channels = len(filters)
    return result


def narrow_norm(norm: nn.BatchNorm2d, stay: Tensor) -> nn.BatchNorm2d:
    """``norm`` for some channels [indices]."""
    result = clone_module(norm)
    for name in ("weight", "bias"):
        value: Tensor | None = getattr(norm, name)
        if value is not None:
            set_parameter(result, name, value.detach().index_select(0, stay.to(value.device)), value)
    for name in ("running_mean", "running_var"):
        value = cast("Tensor", getattr(norm, name))
        result.register_buffer(name, value.index_select(0, stay.to(value.device)))
    result.num_features = len(stay)
    return result


def narrow_prelu(prelu: nn.PReLU, stay: Tensor) -> nn.PReLU:
    """``prelu`` for some channels [indices]; one slope for all stays as it is."""
    result = clone_module(prelu)
    if prelu.num_parameters > 1:
        weight = prelu.weight
        set_parameter(result, "weight", weight.detach().index_select(0, stay.to(weight.device)), weight)
        result.num_parameters = len(stay)
    return result


def narrow_linear(linear: nn.Linear, fold: Fold) -> nn.Linear:
    """``linear`` without the features of removed channels, whose constants its bias takes up."""
    result, channels = clone_module(linear), len(fold.constant)
    weight = linear.weight.detach().double().view(linear.out_features, channels, -1)
    added = weight.sum(2) @ fold.constant.to(weight)
    bias = cast("Tensor | None", linear.bias)
    if bias is not None or bool(added.any()):
        value = added if bias is None else bias.detach().double() + added
        set_parameter(result, "bias", value, linear.weight[:0, 0])
    weight = weight.index_select(1, fold.stay.to(weight.device)).flatten(1)
    set_parameter(result, "weight", weight, linear.weight)
    result.in_features = weight.shape[1]
    return result


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` in the place ``path`` of a graph module of this package's own."""
    parent, _, leaf = path.rpartition(".")
    cast("Any", root.get_submodule(parent)).add_module(leaf, module)
