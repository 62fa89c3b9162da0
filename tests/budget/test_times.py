"""times: few candidates are timed, layers of one shape once, and the others lie between."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from wsp_compiler.budget.candidates import grid_candidates
from wsp_compiler.budget.times import TIMED_AT, candidate_times, network_milliseconds
from wsp_compiler.options import CompileOptions
from wsp_compiler.site_plan import SitePlan
from wsp_compiler.sites import ConvSite, find_sites
from wsp_compiler.speed import MODEL, CallFormat, Timing


class Clock:
    """Time is 10 us and 100 us for each kept share; unknown for F(4x4, 3x3)."""

    def __init__(self, dense: float | None = 70.0) -> None:
        self.dense_us, self.asked = dense, list[str]()

    def pruned(
        self, path: str, conv: nn.Conv2d, keep: Tensor, tile: int, calls: Sequence[CallFormat]
    ) -> Timing | None:
        self.asked.append(path)
        return Timing(10 + 100 * float(keep.float().mean()), MODEL) if tile == 2 else None

    def dense(self, path: str, conv: nn.Conv2d, calls: Sequence[CallFormat]) -> Timing | None:
        self.asked.append("dense")
        return None if self.dense_us is None else Timing(self.dense_us, MODEL)


def parts(
    tile: int | str = 2,
) -> tuple[dict[str, list[SitePlan]], dict[str, ConvSite], dict[str, nn.Conv2d]]:
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)).eval()
    convolutions = {path: conv for path, conv in model.named_modules() if isinstance(conv, nn.Conv2d)}
    sites = {site.path: site for site in find_sites(model, torch.randn(1, 16, 8, 8))}
    options = CompileOptions(tile=tile)
    candidates = {
        path: grid_candidates(path, conv, options, ("wsp", "bwsp")) for path, conv in convolutions.items()
    }
    return candidates, sites, convolutions


def test_times_between_those_known() -> None:
    candidates, sites, convolutions = parts()
    clock = Clock()
    times = candidate_times(candidates, sites, convolutions, clock)
    for path, entries in candidates.items():
        us, dense = times[path]
        assert us == pytest.approx([10 + 100 * entry.kept_fraction for entry in entries])
        assert dense == 70.0
    assert len(clock.asked) <= 2 * len(TIMED_AT) + 1  # both patterns, one layer, and its dense convolution
    assert clock.asked.count("dense") == 1
    assert "1" not in clock.asked


def test_unknown_times() -> None:
    candidates, sites, convolutions = parts("auto")
    assert candidate_times(candidates, sites, convolutions, Clock())["0"][0] is None
    candidates, sites, convolutions = parts()
    assert candidate_times(candidates, sites, convolutions, Clock(None))["1"][1] is None
    assert candidate_times(candidates, sites, convolutions, None)["0"] == (None, None)


def test_a_whole_network() -> None:
    class Slow(nn.Module):
        def forward(self, x: Tensor, *, seconds: float = 0.004) -> Tensor:
            time.sleep(seconds)
            return x

    x = torch.zeros(1)
    assert 4 <= network_milliseconds(Slow(), x) < 40
    assert 20 <= network_milliseconds(Slow(), {"x": x, "seconds": 0.02}) < 100
