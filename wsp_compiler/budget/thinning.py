"""Fewer images where errors are only predicted, not fitted in earnest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from wsp_compiler.calibration import networks_of
from wsp_compiler.plan import PruningPlan
from wsp_compiler.trace import Call, TracedModel
from wsp_compiler.winograd import transform

SAMPLES_PER_UNKNOWN = 12
"""Enough outputs per unknown weight of a filter to predict errors from."""
PROBE_IMAGES = 2
"""Images of the first batch, others than those fitted to if there are any, on which outputs are compared."""


def thinned(traced: TracedModel, plan: PruningPlan, calls: Sequence[Call]) -> tuple[list[Call], Call]:
    """(evenly spread images that are enough for every layer, a few others).

    Args:
        traced: the model.
        plan: says which layers are fitted; the layer with the fewest outputs per unknown decides.
        calls: the inputs. Tensors as long as the first [N, ...] image tensor of their batch are cut.

    Raises:
        InputError: the model fails, perhaps because it does not take a part of a batch.
    """
    probe = cut(calls[0], 1, 1, PROBE_IMAGES) if images_of(calls[0]) > 1 else calls[0]
    networks = networks_of(traced, [probe])
    images, probed = sum(map(images_of, calls)), max(1, images_of(probe))
    stride = images
    for path, is_convolution in networks.order(plan):
        conv = networks.module(path, pruned=False)
        if is_convolution and isinstance(conv, nn.Conv2d):
            y = networks.capture(path, 0, pruned=False, output=True)
            samples = images * y[:, 0].numel() // probed
            unknowns = transform(plan[path].tile).positions * conv.in_channels
            stride = min(stride, samples // (SAMPLES_PER_UNKNOWN * unknowns))
    if stride < 2:
        return list(calls), probe
    kept: list[Call] = []
    before = 0
    for call in calls:
        first, count = -before % stride, images_of(call)
        before += count
        if first < count:
            kept.append(cut(call, first, stride))
    return kept, probe


def images_of(call: Call) -> int:
    """Length of the first image tensor [N, c, H, W] of a batch; 0 without."""
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.dim() == 4]
    return len(tensors[0]) if tensors else 0


def cut(call: Call, first: int, step: int, most: int | None = None) -> Call:
    """``call`` with images ``first``, ``first + step``, ... alone, at most ``most``."""
    images = images_of(call)

    def part(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or len(leaf) != images:
            return leaf
        return leaf[first::step][:most]

    return cast("Call", pytree.tree_map(part, call))
