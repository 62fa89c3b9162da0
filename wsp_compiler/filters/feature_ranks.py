"""Ranks of the feature maps that each filter makes in the dense network, on calibration data (for HRank)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from wsp_compiler.activations import Networks
from wsp_compiler.filters.operations import operation_of
from wsp_compiler.pruning.hrank import IMAGES, FeatureRanks
from wsp_compiler.trace import SITE


def feature_ranks(
    networks: Networks,
    units: Mapping[str, fx.GraphModule],
    paths: Iterable[str],
    on_step: Callable[[str], None] | None = None,
) -> dict[str, FeatureRanks]:
    """Path of a convolution -> mean ranks of its filters' feature maps, behind batch norm and activation.

    Args:
        networks: on the calibration inputs; only the dense one runs.
        units: the traced graphs, which say what follows a convolution.
        paths: of convolutions, in the order of their calls.
        on_step: called with the path after every batch of every convolution.
    """
    found: dict[str, FeatureRanks] = {}
    for path in paths:
        conv = networks.module(path, pruned=False)
        assert isinstance(conv, nn.Conv2d)
        ranks = found[path] = FeatureRanks.of(conv.out_channels)
        behind = what_follows(units, path)
        for index in range(networks.batches):
            if ranks.images < IMAGES:
                with torch.no_grad():
                    ranks.add(behind(networks.capture(path, index, pruned=False, output=True)))
            if on_step is not None:
                on_step(path)
    return found


def what_follows(units: Mapping[str, fx.GraphModule], path: str) -> Callable[[Tensor], Tensor]:
    """Batch norm and activations behind the first call of a convolution, as far as nothing branches off."""
    for gm in units.values():
        for node in gm.graph.nodes:
            if node.meta.get(SITE) == path:
                return _chain(gm, node)
    return _unchanged


def _unchanged(y: Tensor) -> Tensor:
    return y


def _chain(gm: fx.GraphModule, node: fx.Node) -> Callable[[Tensor], Tensor]:
    steps: list[fx.Node] = []
    while len(node.users) == 1:
        node = next(iter(node.users))
        if operation_of(gm, node).kind not in ("norm", "elementwise"):
            break
        steps.append(node)

    def apply(y: Tensor) -> Tensor:
        y = y.clone()  # steps may work in place
        for step in steps:
            args = [y if isinstance(value, fx.Node) else value for value in step.args]
            kwargs: dict[str, Any] = {
                name: y if isinstance(value, fx.Node) else value for name, value in step.kwargs.items()
            }
            if step.op == "call_module":
                y = gm.get_submodule(str(step.target))(*args, **kwargs)
            elif step.op == "call_method":
                y = getattr(args[0], str(step.target))(*args[1:], **kwargs)
            else:
                y = cast("Any", step.target)(*args, **kwargs)
        return y

    return apply
