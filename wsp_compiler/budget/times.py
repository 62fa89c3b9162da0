"""Times of all candidates of a layer from a few known ones; times of whole networks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from wsp_compiler.budget.candidates import by_kind
from wsp_compiler.budget.interpolation import linear
from wsp_compiler.plan import site_times
from wsp_compiler.site_plan import SitePlan
from wsp_compiler.sites import ConvSite
from wsp_compiler.speed import SpeedSource
from wsp_compiler.trace import example_call

TIMED_AT = (1.0, 0.6, 0.35, 0.2, 0.1, 0.05)
"""Kept shares near which candidates are timed; between them time is linear in the kept share."""
CALLS, SECONDS = 30, 3.0
"""A whole network is called so often, or for so long."""

LayerTimes = tuple[list[float] | None, float | None]
"""Microseconds of each candidate and of the dense convolution; None where not all are known."""


def candidate_times(
    candidates: Mapping[str, Sequence[SitePlan]],
    sites: Mapping[str, ConvSite],
    convolutions: Mapping[str, nn.Conv2d],
    speed: SpeedSource | None,
) -> dict[str, LayerTimes]:
    """Path -> times of its candidates. Layers of one shape are timed once, on the first of them."""
    known: dict[object, LayerTimes] = {}
    found: dict[str, LayerTimes] = {}
    for path, entries in candidates.items():
        site, conv = sites[path], convolutions[path]
        described = tuple((entry.method, entry.direction, entry.tile, entry.pr) for entry in entries)
        key = (site.filters, site.channels, site.padding, site.formats, described)
        if key not in known:
            known[key] = _times(entries, site, conv, speed)
        found[path] = known[key]
    return found


def _times(
    entries: Sequence[SitePlan], site: ConvSite, conv: nn.Conv2d, speed: SpeedSource | None
) -> LayerTimes:
    us = [0.0] * len(entries)
    dense: float | None = None
    for members in by_kind(entries).values():
        anchors = {
            min(members, key=lambda index: abs(entries[index].kept_fraction - share)) for share in TIMED_AT
        }
        points: list[tuple[float, float]] = []
        for index in sorted(anchors):
            times = site_times(entries[index], site, conv, speed, dense=dense is None)
            dense = dense if times.dense is None else times.dense.us
            if times.pruned is None:
                return None, dense
            points.append((entries[index].kept_fraction, times.pruned.us))
        for index in members:
            us[index] = linear(sorted(points), entries[index].kept_fraction)
    return us, dense


def network_milliseconds(network: nn.Module, example_inputs: Any) -> float:
    """Median time of a call on ``example_inputs``, after a warm-up, the device synchronised around each."""
    args, kwargs = example_call(example_inputs)
    leaves = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, torch.Tensor)]
    on_cuda = any(leaf.is_cuda for leaf in leaves)

    def once() -> float:
        if on_cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        network(*args, **kwargs)
        if on_cuda:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - begin)

    with torch.no_grad():
        for _ in range(3):
            once()
        samples: list[float] = []
        begin = time.perf_counter()
        while len(samples) < 5 or (len(samples) < CALLS and time.perf_counter() - begin < SECONDS):
            samples.append(once())
    return statistics.median(samples)
