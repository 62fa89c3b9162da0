"""balanced_speedup and layer_times, with recorded times in place of a clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wsp_compiler
from wsp_compiler import PruneRule
from wsp_compiler.codegen import measure, tuner
from wsp_compiler.errors import CompiledModuleError, InputError, ModelError


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        )
        self.eval()


@pytest.fixture
def fake_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> list[tuple[int, ...]]:
    """Layers take 1 us for every row that the fullest position keeps; the dense convolution takes 7 us."""
    seen: list[tuple[int, ...]] = []
    most_rows: list[int] = []
    original = tuner.Tuner.measure_candidates

    def measure_candidates(self: Any, layer: Any, key: Any, candidates: Any) -> Any:
        most_rows.append(int(layer.site.row_offset.diff().max()))
        return original(self, layer, key, candidates)

    def times(calls: Mapping[str, Any], inputs: Mapping[str, Sequence[Tensor]]) -> Any:
        seen.append(tuple(next(iter(inputs.values()))[0].shape))
        dense = any("conv2d" in label for label in calls)
        return {label: 7.0 if dense else float(most_rows[-1]) for label in calls}, {}

    monkeypatch.setenv("WSP_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuner.Tuner, "measure_candidates", measure_candidates)
    monkeypatch.setattr(measure, "measure", times)
    return seen


def test_the_ratio_is_of_the_fullest_position(fake_times: list[tuple[int, ...]]) -> None:
    """Uneven rows wait for the fullest position, so WSP takes as long as that."""
    model, x = Net(), torch.randn(2, 16, 9, 9)
    found = wsp_compiler.balanced_speedup(model, 0.75, x, rules=[PruneRule("2", pr=0.5, method="dense")])
    assert list(found) == ["0", "2"]
    plans = {
        method: wsp_compiler.compile(model, 0.75, method=method, rules=[PruneRule("2", pr=0.5)]).plan
        for method in ("wsp", "bwsp")
    }
    for path, times in found.items():
        most = {method: int(plan[path].keep.sum(1).max()) for method, plan in plans.items()}
        assert times["bwsp_us"] == most["bwsp"] == 8
        assert times["ratio"] == times["wsp_us"] / times["bwsp_us"]
        assert times["ratio"] >= 1
    assert {shape[0] for shape in fake_times} == {2}
    assert {shape[1] for shape in fake_times} == {16, 32}


def test_without_measuring_unknown_layers_are_left_out() -> None:
    assert wsp_compiler.balanced_speedup(Net(), 0.5, torch.randn(1, 16, 8, 8), tune="off") == {}


def test_bad_input() -> None:
    with pytest.raises(InputError):
        wsp_compiler.balanced_speedup(Net(), 0.5, torch.randn(1, 3, 8, 8))
    with pytest.raises(ModelError, match="no convolution"):
        wsp_compiler.balanced_speedup(nn.ReLU().eval(), 0.5, torch.randn(1))


def test_layer_times(fake_times: list[tuple[int, ...]]) -> None:
    compiled = wsp_compiler.compile(Net(), 0.75, method="bwsp", example_inputs=torch.randn(2, 16, 9, 9))
    found = wsp_compiler.layer_times(compiled)
    assert {path: (entry["us"], entry["dense_us"]) for path, entry in found.items()} == {
        "0": (8.0, 7.0),
        "2": (4.0, 7.0),
    }
    assert all(entry["kernel"].startswith("cpu ") for entry in found.values())


def test_layer_times_need_shapes() -> None:
    with pytest.raises(CompiledModuleError, match="no layer has run"):
        wsp_compiler.layer_times(wsp_compiler.compile(Net(), 0.5), tune="off")
