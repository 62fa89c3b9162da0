"""What every candidate of every layer would add to the error of the network's output.

One pass over the calibration data through the dense network. The moments of one layer at a time are held, those of both
tiles where both are candidates. Errors of several layers are taken to add up; calibration lets later layers make up
for a part of what earlier ones lose, so that the sum is an upper estimate, best used to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from wsp_compiler.activations import Networks
from wsp_compiler.budget.candidates import by_kind
from wsp_compiler.budget.curves import LayerErrors
from wsp_compiler.plan import PruningPlan, choose_keep
from wsp_compiler.pruning.base import Importance
from wsp_compiler.pruning.moments import Moments, MomentsBuilder
from wsp_compiler.pruning.output_aware import MeasuredEnergy, relative_error
from wsp_compiler.sensitivity import fill, gain
from wsp_compiler.site_plan import SitePlan
from wsp_compiler.sites import padding_of
from wsp_compiler.winograd import transform_weight
from wsp_compiler.winograd_conv import tile_filters, winograd_convolution

SAMPLES_PER_UNKNOWN = 24
"""Enough outputs per unknown to predict errors from: of more data only some images are used."""


@dataclass(frozen=True)
class Prediction:
    """The candidates of one layer.

    Attributes:
        entries: with what they keep.
        errors: squared error that each adds to the network's output, as a share of the output's energy.
        seen: (images, H_out, W_out) of the first call on the first batch; None without data.
    """

    entries: tuple[SitePlan, ...]
    errors: tuple[float, ...]
    seen: tuple[int, int, int] | None = None


def predict_from_weights(
    candidates: Mapping[str, Sequence[SitePlan]], convolutions: Mapping[str, nn.Conv2d]
) -> dict[str, Prediction]:
    """Without data: relative errors of each layer for inputs of white noise, every layer counting the same."""
    found: dict[str, Prediction] = {}
    for path, entries in candidates.items():
        weights = {
            tile: transform_weight(convolutions[path].weight, tile)
            for tile in {entry.tile for entry in entries}
        }
        errors = [relative_error(weights[entry.tile], entry.keep, entry.tile) ** 2 for entry in entries]
        found[path] = Prediction(tuple(entries), tuple(errors))
    return found


def predict(
    networks: Networks,
    candidates: Mapping[str, Sequence[SitePlan]],
    *,
    typical: float,
    choose: bool = True,
    on_step: Callable[[str], None] | None = None,
) -> dict[str, Prediction]:
    """With data: errors after refitting, weighted by what they do to the network's output.

    Args:
        networks: on the calibration inputs; only the dense one runs.
        candidates: path -> what the convolution can become.
        typical: kept share at which a layer's gain is measured.
        choose: let candidates keep what adds most measured energy; else they keep what they come with.
        on_step: called with the path after every batch of every layer.
    """
    order = networks.order(PruningPlan({path: _smallest(entries) for path, entries in candidates.items()}))
    relative: dict[str, tuple[list[SitePlan], list[float], tuple[int, int, int]]] = {}
    gains: dict[str, float | None] = {}
    output: Any = None
    for path in (path for path, is_convolution in order if is_convolution):
        conv, entries = networks.module(path, pruned=False), list(candidates[path])
        assert isinstance(conv, nn.Conv2d)
        moments, (x, y) = _moments(networks, path, conv, {entry.tile for entry in entries}, on_step)
        errors = [0.0] * len(entries)
        example: tuple[float, SitePlan, LayerErrors] | None = None
        for (_, _, tile), members in by_kind(entries).items():
            U = transform_weight(conv.weight, tile)
            if choose:
                importance = _once(MeasuredEnergy(moments[tile]))
                for index in members:
                    entries[index] = choose_keep(entries[index], U.float(), importance)
            layer = LayerErrors(moments[tile], U)
            for index, error in zip(members, layer.predict([entries[i] for i in members]), strict=True):
                errors[index] = error
                distance = abs(entries[index].kept_fraction - typical)
                if error > 0 and (example is None or distance < example[0]):
                    example = distance, entries[index], layer
        relative[path] = entries, errors, (y.shape[0], y.shape[2], y.shape[3])
        gains[path] = None
        if example is not None:
            output = networks.finish(path, 0, y) if output is None else output
            pruned = _pruned_output(conv, x, y, *example[1:])
            gains[path] = gain(y, pruned, output, networks.finish(path, 0, pruned))
    weights = fill(gains)
    return {
        path: Prediction(tuple(entries), tuple(error * weights[path] for error in errors), seen)
        for path, (entries, errors, seen) in relative.items()
    }


def _smallest(entries: Sequence[SitePlan]) -> SitePlan:
    return min(entries, key=lambda entry: entry.kept_fraction)


def _once(importance: Importance) -> Importance:
    """The same scores for every call with the same dims: all candidates of a layer share them."""
    known: dict[tuple[int, ...], Tensor] = {}

    def cached(U: Tensor, dims: tuple[int, ...]) -> Tensor:
        if dims not in known:
            known[dims] = importance(U, dims)
        return known[dims]

    return cached


def _moments(
    networks: Networks,
    path: str,
    conv: nn.Conv2d,
    tiles: set[int],
    on_step: Callable[[str], None] | None,
) -> tuple[dict[int, Moments], tuple[Tensor, Tensor]]:
    """Tile -> moments in the dense network, on evenly spread images if there are more than needed.

    Also the layer's input and output of the first batch.
    """
    builders = {
        tile: MomentsBuilder(conv.in_channels, conv.out_channels, tile, padding_of(conv), conv.weight.device)
        for tile in tiles
    }
    unknowns = max(builder.gram.shape[0] for builder in builders.values())
    first: tuple[Tensor, Tensor] | None = None
    stride, count = 1, 0
    for index in range(networks.batches):
        x = networks.capture(path, index, pruned=False, output=False)
        y = networks.capture(path, index, pruned=False, output=True)
        if first is None:
            first = x, y.clone()  # what follows in the graph may write into it
            samples = networks.batches * y.shape[0] * y.shape[2] * y.shape[3]
            stride = max(1, samples // (SAMPLES_PER_UNKNOWN * unknowns))
        skip = -count % stride
        count += len(x)
        for builder in builders.values():
            builder.add(x[skip::stride], y[skip::stride])
        if on_step is not None:
            on_step(path)
    assert first is not None
    return {tile: builder.build() for tile, builder in builders.items()}, first


def _pruned_output(conv: nn.Conv2d, x: Tensor, dense: Tensor, entry: SitePlan, layer: LayerErrors) -> Tensor:
    """The layer's output with the sampled filters pruned by ``entry`` and refitted, [N, n, H, W]."""
    fitted = layer.refitted(entry)
    W = tile_filters(fitted.U, entry.tile).float()
    outputs = winograd_convolution(x.float(), W, fitted.bias, padding_of(conv), entry.tile)
    pruned = dense.clone()
    pruned[:, layer.filters.to(dense.device)] = outputs.to(dense.dtype)
    return pruned
