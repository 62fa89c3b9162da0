"""What every candidate of every layer would add to the error of the network's output.

One pass over the calibration data, layer by layer, as calibration does it but roughly: every layer sees what an
evenly pruned network sends it. The moments of one layer at a time are held, those of both tiles where both are
candidates. Errors of several layers are taken to add up, each layer's weight (wsp_compiler/sensitivity.py) times its
squared relative error: a model around even ratios, good to compare plans with. Plans that matter are tried: the
same pass says how far a roughly calibrated network is from the dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from wsp_compiler.activations import Networks
from wsp_compiler.budget.candidates import by_kind
from wsp_compiler.budget.curves import REFIT_STEPS, LayerErrors
from wsp_compiler.budget.thinning import SAMPLES_PER_UNKNOWN, thinned
from wsp_compiler.calibration import networks_of, norm_statistics, use_weights
from wsp_compiler.errors import InputError
from wsp_compiler.plan import PruningPlan, choose_keep
from wsp_compiler.pruning.base import Importance
from wsp_compiler.pruning.moments import Moments, MomentsBuilder
from wsp_compiler.pruning.output_aware import MeasuredEnergy, relative_error
from wsp_compiler.pruning.refit import refit
from wsp_compiler.sensitivity import gain, layer_weights, output_change
from wsp_compiler.site_plan import SitePlan
from wsp_compiler.sites import padding_of
from wsp_compiler.trace import Call, TracedModel
from wsp_compiler.winograd import transform_weight


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
class RoughPass:
    """What one rough calibration finds.

    Attributes:
        predictions: of those layers that have candidates and that the model calls.
        change: squared error of the network's output, as a share of its energy; None where outputs do not compare.
    """

    predictions: dict[str, Prediction]
    change: float | None


def rough_pass(
    traced: TracedModel,
    base: PruningPlan,
    candidates: Mapping[str, Sequence[SitePlan]],
    calls: Sequence[Call],
    *,
    choose: bool = True,
    on_step: Callable[[str], None] | None = None,
) -> RoughPass:
    """Calibrate ``base`` roughly, and predict on the way what other plans of its layers would do.

    Args:
        traced: a model in eval mode, its graphs before any pass; not modified.
        base: the plan around which errors are predicted.
        candidates: path in ``base`` -> what the convolution can become; may be empty.
        calls: the inputs.
        choose: choose what is kept by measured energy; else the entries keep what they come with.
        on_step: called with the path after every batch of every layer.
    """
    try:
        fitted_to, probe = thinned(traced, base, calls)
        return _rough_pass(traced, base, candidates, fitted_to, probe, choose, on_step)
    except InputError:  # a model that does not take a part of a batch, or data that is at fault
        return _rough_pass(traced, base, candidates, calls, calls[0], choose, on_step)


def _rough_pass(
    traced: TracedModel,
    base: PruningPlan,
    candidates: Mapping[str, Sequence[SitePlan]],
    calls: Sequence[Call],
    probe: Call,
    choose: bool,
    on_step: Callable[[str], None] | None,
) -> RoughPass:
    """Fits to ``calls``, and measures gains and the change on ``probe``."""
    networks = networks_of(traced, [*calls, probe])
    relative: dict[str, tuple[list[SitePlan], list[float], tuple[int, int, int]]] = {}
    gains: dict[str, float | None] = {}
    measured, last = _Gains(networks, len(calls)), ""
    for path, is_convolution in networks.order(base):
        if not is_convolution:
            norm_statistics(networks, path, lambda: None)
            continue
        conv, last = networks.module(path, pruned=False), path
        assert isinstance(conv, nn.Conv2d)
        entries = [base[path], *candidates.get(path, ())]
        tiles = {entry.tile for entry in entries}
        moments, seen = _moments(networks, len(calls), path, conv, tiles, on_step)
        errors = [0.0] * len(entries)
        for kind, members in by_kind(entries).items():
            U = transform_weight(conv.weight, kind[2])
            if choose:
                importance = _once(MeasuredEnergy(moments[kind[2]]))
                for index in members:
                    entries[index] = choose_keep(entries[index], U.float(), importance)
            fitted = None
            if path in candidates:
                layer = LayerErrors(moments[kind[2]], U, base[path].kept_fraction)
                group = [entries[index] for index in members]
                for index, error in zip(members, layer.predict(group), strict=True):
                    errors[index] = error
                fitted = layer.refitted(group[0]) if len(layer.filters) == U.shape[1] else None
            if members[0] == 0:
                fitted = fitted or refit(moments[kind[2]], U, entries[0].keep, max_steps=REFIT_STEPS)
                use_weights(networks.module(path, pruned=True), fitted.U, fitted.bias, kind[2])
        moments.clear()
        if path in candidates:
            relative[path] = entries[1:], errors[1:], seen
            gains[path] = measured.measure(path)
    weights = layer_weights(gains)
    return RoughPass(
        {
            path: Prediction(tuple(entries), tuple(weights[path] * error for error in errors), seen)
            for path, (entries, errors, seen) in relative.items()
        },
        _change(networks, last, len(calls)) if last else None,
    )


def _change(networks: Networks, path: str, index: int) -> float | None:
    """Squared relative error of the pruned network's output; ``path`` is the last convolution fitted."""
    dense, pruned = (
        networks.finish(path, index, networks.capture(path, index, pruned=side, output=True), pruned=side)
        for side in (False, True)
    )
    return output_change(dense, pruned)


class _Gains:
    """What each fitted layer alone does to the dense network's output, for each unit of the layer's own error."""

    def __init__(self, networks: Networks, index: int) -> None:
        self.networks, self.index = networks, index
        self.output: Any = None  # of the dense network

    def measure(self, path: str) -> float | None:
        """The gain of a layer; later layers only after earlier ones, or the network starts again."""
        networks, index = self.networks, self.index
        x = networks.capture(path, index, pruned=False, output=False)
        dense = networks.capture(path, index, pruned=False, output=True)
        if self.output is None:
            self.output = networks.finish(path, index, dense, pruned=False)
        pruned = networks.module(path, pruned=True)(x)
        return gain(dense, pruned, self.output, networks.finish(path, index, pruned, pruned=False))


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
