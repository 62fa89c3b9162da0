"""Pruned networks, trainable, by the names that the tables use."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import wsp_compiler
from wsp_compiler import PruneRule, WinogradConv2d
from wsp_compiler.options import METHODS as METHOD_NAMES

METHODS = ("wsp", "bwsp", "fp", "wwp")
DIRECT_SHARE = {2: 4 / 9, 4: 1 / 4}
"""Output tile side -> multiplications of dense Winograd / those of the direct convolution."""


@dataclass(frozen=True)
class Variant:
    """How a network is pruned.

    Args:
        method: "wsp", "bwsp", "fp" or "wwp"; rows, the same ratio in every layer.
        importance: "l2" (the papers') or "output".
        calibrated: choose by measured energy and refit by least squares on the calibration images.
        tile: output tile side.
    """

    method: str = "wsp"
    importance: str = "l2"
    calibrated: bool = False
    tile: int = 2


def pruned(
    model: nn.Module,
    variant: Variant,
    pr: float,
    calibration: Sequence[Tensor],
    rules: Sequence[PruneRule] = (),
) -> nn.Module:
    """A trainable copy of `model` in eval mode, the share `pr` of every eligible layer's Winograd weights pruned."""
    if variant.method == "wwp" and "wwp" not in METHOD_NAMES:
        return _element_wise(wsp_compiler.prune(model, 0.0, method="dense", tile=variant.tile), pr)
    options: dict[str, Any] = {"method": variant.method, "importance": variant.importance}
    data = list(calibration) if variant.calibrated else None
    return wsp_compiler.prune(model, pr, calibration=data, tile=variant.tile, rules=rules, **options)


def _element_wise(model: nn.Module, pr: float) -> nn.Module:
    """Keeps the largest weights of every layer, element by element (WWP), in place."""
    for layer in winograd_layers(model).values():
        size = layer.winograd_weight().detach().abs()  # [p*p, n, c]
        pruned = int(pr * size.numel())
        keep = torch.ones(size.numel(), dtype=torch.bool, device=size.device)
        keep[size.flatten().argsort()[:pruned]] = False
        layer.keep = keep.view_as(size)
        with torch.no_grad():
            layer.weight.mul_(layer.keep)
    return model


def winograd_layers(model: nn.Module) -> dict[str, WinogradConv2d]:
    """Path -> layer, of the pruned convolutions."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, WinogradConv2d)}


def kept_share(model: nn.Module) -> float:
    """Kept Winograd weights / all of them, over the pruned convolutions."""
    layers = winograd_layers(model).values()
    kept = sum(float(layer.keep.float().mean()) * layer.weight.numel() for layer in layers)
    return kept / sum(layer.weight.numel() for layer in layers)


def random_assignment(model: nn.Module, pr: float, number: int, *, uneven: bool = False) -> list[PruneRule]:
    """Rules that give every eligible layer WSP or BWSP at random; candidate `number`, always alike.

    Args:
        model: the dense network.
        pr: of every layer; with `uneven`, each layer's kept share is up to 3 times larger or smaller instead.
    """
    paths = list(winograd_layers(wsp_compiler.prune(model, 0.5, method="wsp", importance="l2")))
    draw = random.Random(f"candidate {number} {uneven}")
    rules: list[PruneRule] = []
    for path in paths:
        method = draw.choice(("wsp", "bwsp"))
        kept = (1 - pr) * math.exp(draw.uniform(-1.1, 1.1)) if uneven else 1 - pr
        rules.append(PruneRule(re.escape(path), method=method, pr=max(0.0, 1 - kept)))
    return rules


def ratio_for_multiplies(share: float, tile: int) -> float:
    """The pruning ratio that leaves `share` of the direct convolution's multiplications, for tiles of that side."""
    pr = 1 - share / DIRECT_SHARE[tile]
    if not 0 <= pr < 1:
        raise ValueError(
            f"tiles of {tile} leave between 0 and {DIRECT_SHARE[tile]:.3f} of the products, not {share}"
        )
    return pr
