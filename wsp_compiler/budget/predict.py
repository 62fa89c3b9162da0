"""What every candidate of every layer would add to the error of the network's output.

One pass over the calibration data, layer by layer, as calibration does it but roughly: every layer sees what an
evenly pruned network sends it. The moments of one layer at a time are held, those of both tiles where both are
candidates. Then each layer's weight is measured (wsp_compiler/sensitivity.py). Errors of several layers are taken
to add up, weight times squared relative error: a model around even ratios, good to compare plans with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from wsp_compiler.activations import Networks
from wsp_compiler.budget.candidates import by_kind, kind_of
from wsp_compiler.budget.curves import REFIT_STEPS, LayerErrors
from wsp_compiler.calibration import networks_of, norm_statistics, use_weights
from wsp_compiler.errors import InputError
from wsp_compiler.plan import PruningPlan, choose_keep
from wsp_compiler.pruning.base import Importance
from wsp_compiler.pruning.moments import Moments, MomentsBuilder
from wsp_compiler.pruning.output_aware import MeasuredEnergy, relative_error
from wsp_compiler.pruning.refit import refit
from wsp_compiler.sensitivity import fill, output_change
from wsp_compiler.site_plan import SitePlan
from wsp_compiler.sites import padding_of
from wsp_compiler.trace import Call, TracedModel
from wsp_compiler.winograd import transform_weight
from wsp_compiler.winograd_conv import tile_filters, winograd_convolution

SAMPLES_PER_UNKNOWN = 24
"""Enough outputs per unknown to predict errors from: of more data only some images are used."""
PROBE_IMAGES = 4
"""Of the first batch, on which weights are measured."""
PROBE_RATIO = 0.7
"""A layer's weight is measured by pruning it this much less."""


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


@dataclass(frozen=True)
class _Probe:
    """One layer that can be exchanged: its weights [p*p, n, c] and bias, and what the exchange does to its error."""

    U: Tensor
    bias: Tensor
    tile: int
    gained: float


def predict(
    traced: TracedModel,
    base: PruningPlan,
    candidates: Mapping[str, Sequence[SitePlan]],
    calls: Sequence[Call],
    *,
    choose: bool = True,
    on_step: Callable[[str], None] | None = None,
) -> dict[str, Prediction]:
    """With data: errors after refitting, weighted by what they do to the network's output.

    Args:
        traced: a model in eval mode, its graphs before any pass; not modified.
        base: the even plan around which errors are predicted.
        candidates: path in ``base`` -> what the convolution can become.
        calls: the inputs.
        choose: let candidates keep what adds most measured energy; else they keep what they come with.
        on_step: called with the path after every batch of every layer.

    Returns:
        Predictions of those layers that the model calls.
    """
    networks, batches = _networks(traced, calls)
    relative: dict[str, tuple[list[SitePlan], list[float], tuple[int, int, int]]] = {}
    probes: dict[str, _Probe | None] = {}
    for path, is_convolution in networks.order(base):
        if not is_convolution:
            norm_statistics(networks, path, lambda: None)
            continue
        conv = networks.module(path, pruned=False)
        assert isinstance(conv, nn.Conv2d)
        entry, entries = base[path], list(candidates.get(path, (base[path],)))
        tiles = {entry.tile, *(other.tile for other in entries)}
        moments, seen = _moments(networks, batches, path, conv, tiles, on_step)
        errors = [0.0] * len(entries)
        for (method, direction, tile), members in by_kind(entries).items():
            U = transform_weight(conv.weight, tile)
            if choose:
                importance = _once(MeasuredEnergy(moments[tile]))
                for index in members:
                    entries[index] = choose_keep(entries[index], U.float(), importance)
            layer = LayerErrors(moments[tile], U)
            group = [entries[index] for index in members]
            for index, error in zip(members, layer.predict(group), strict=True):
                errors[index] = error
            if (method, direction, tile) == kind_of(entry):
                entry = min(group, key=lambda other: abs(other.pr - base[path].pr))
                fitted = refit(moments[tile], U, entry.keep, max_steps=REFIT_STEPS)
                if path in candidates:
                    probes[path] = _probe(entry, group, layer, fitted.U, fitted.bias)
                use_weights(networks.module(path, pruned=True), fitted.U, fitted.bias, tile)
        moments.clear()
        relative[path] = entries, errors, seen
    try:
        measured = _weights(networks, batches, probes)
    except InputError:  # a model that does not take a part of a batch
        measured = _weights(networks, 0, probes)
    weights = fill(measured)
    return {
        path: Prediction(tuple(entries), tuple(weights[path] * error for error in errors), seen)
        for path, (entries, errors, seen) in relative.items()
        if path in candidates
    }


def _networks(traced: TracedModel, calls: Sequence[Call]) -> tuple[Networks, int]:
    """Both networks on the inputs and on a batch for probing behind them; the number of inputs."""
    probing = pytree.tree_map(_first_images(calls[0]), calls[0])
    return networks_of(traced, [*calls, cast("Call", probing)]), len(calls)


def _first_images(call: Call) -> Callable[[Any], Any]:
    """Cuts every tensor of a batch that is as long as the first one down to a few images."""
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.dim() == 4]
    images = len(tensors[0]) if tensors else 0

    def cut(leaf: Any) -> Any:
        whole = not isinstance(leaf, Tensor) or leaf.dim() == 0 or len(leaf) != images
        return leaf if whole else leaf[:PROBE_IMAGES]

    return cut


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
    batches: int,
    path: str,
    conv: nn.Conv2d,
    tiles: set[int],
    on_step: Callable[[str], None] | None,
) -> tuple[dict[int, Moments], tuple[int, int, int]]:
    """Tile -> moments of the layer's pruned input and dense output, and the size of its first output.

    If there are more outputs than needed, evenly spread images count.
    """
    n, c, device = conv.out_channels, conv.in_channels, conv.weight.device
    builders = {tile: MomentsBuilder(c, n, tile, padding_of(conv), device) for tile in tiles}
    unknowns = max(builder.gram.shape[0] for builder in builders.values())
    seen, stride, count = (0, 0, 0), 1, 0
    for index in range(batches):
        wanted = networks.capture(path, index, pruned=False, output=True)
        if index == 0:
            seen = (wanted.shape[0], wanted.shape[2], wanted.shape[3])
            samples = batches * wanted[:, 0].numel()
            stride = max(1, samples // (SAMPLES_PER_UNKNOWN * unknowns))
        x = networks.capture(path, index, pruned=True, output=False)
        skip = -count % stride
        count += len(x)
        for builder in builders.values():
            builder.add(x[skip::stride], wanted[skip::stride])
        if on_step is not None:
            on_step(path)
    return {tile: builder.build() for tile, builder in builders.items()}, seen


def _probe(
    entry: SitePlan, group: Sequence[SitePlan], layer: LayerErrors, U: Tensor, bias: Tensor
) -> _Probe | None:
    """The layer of weights U and ``bias`` with its sampled filters pruned less (or, at small ratios, more)."""
    others = [other for other in group if other.kept_fraction not in (1, entry.kept_fraction)]
    if not others:
        return None
    other = min(others, key=lambda other: abs(other.pr - PROBE_RATIO * entry.pr))
    fitted = layer.refitted(other)
    U, bias, filters = U.clone(), bias.clone(), layer.filters.to(U.device)
    U[:, filters], bias[filters] = fitted.U, fitted.bias
    gained = layer.refitted(entry).error ** 2 - fitted.error**2
    return _Probe(U, bias, entry.tile, gained * layer.share)


def _weights(
    networks: Networks, index: int, probes: Mapping[str, _Probe | None]
) -> dict[str, float | None]:
    """Squared relative error of the network's output for each unit of each layer's, on batch ``index``."""
    found: dict[str, float | None] = {}
    expected: Any = None
    change: float | None = None
    for path, probe in probes.items():
        conv = networks.module(path, pruned=True)
        assert isinstance(conv, nn.Conv2d)
        if expected is None:
            y = networks.capture(path, index, pruned=False, output=True)
            expected = networks.finish(path, index, y, pruned=False)
        x = networks.capture(path, index, pruned=True, output=False)
        if change is None:
            change = output_change(expected, networks.finish(path, index, conv(x), pruned=True))
        found[path] = None
        if probe is None or change is None or probe.gained == 0:
            continue
        W = tile_filters(probe.U, probe.tile).float()
        y = winograd_convolution(x.float(), W, probe.bias, padding_of(conv), probe.tile)
        exchanged = output_change(expected, networks.finish(path, index, y, pruned=True))
        found[path] = None if exchanged is None else (change - exchanged) / probe.gained
    return found
