"""predict: errors of candidates against what pruning a layer really does to the network's output."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.reference import assert_untouched, snapshot
from tests.test_calibration import images, net
from wsp_compiler.budget.candidates import grid_candidates
from wsp_compiler.budget.predict import predict, predict_from_weights
from wsp_compiler.calibration import calibrate, networks_of, use_weights
from wsp_compiler.options import CompileOptions
from wsp_compiler.plan import PruningPlan
from wsp_compiler.pruning.output_aware import relative_error
from wsp_compiler.sensitivity import output_change
from wsp_compiler.site_plan import SitePlan
from wsp_compiler.trace import Call, trace
from wsp_compiler.winograd import transform_weight

PATHS = ("a", "b", "c")


def parts(branch: bool, batches: int = 3) -> tuple[nn.Module, dict[str, list[SitePlan]], list[Call], Tensor]:
    model = net(branch)
    options = CompileOptions()
    candidates = {
        path: grid_candidates(path, model.get_submodule(path), options, ("wsp",))  # pyright: ignore
        for path in PATHS
    }
    x = images(12)
    return model, candidates, [((part,), {}) for part in x.chunk(batches)], x


@pytest.mark.parametrize("branch", [False, True])
@torch.no_grad()
def test_predictions_are_what_pruning_one_layer_does(branch: bool) -> None:
    model, candidates, calls, x = parts(branch)
    before = snapshot(model)
    traced = trace(model)
    steps: list[str] = []
    found = predict(networks_of(traced, calls), candidates, typical=0.5, on_step=steps.append)
    assert steps == [path for path in PATHS for _ in calls]
    assert_untouched(model, before)
    expected = model(x)
    for path in PATHS:
        assert found[path].errors[0] == 0.0
        assert found[path].seen == (4, *{"a": (17, 17), "b": (17, 17), "c": (6, 6)}[path])
        for index in (5, 11):
            entry, error = found[path].entries[index], found[path].errors[index]
            plan = calibrate(traced, PruningPlan({path: entry}), calls, choose=False)
            pruned = copy.deepcopy(model)
            conv = pruned.get_submodule(path)
            assert isinstance(conv, nn.Conv2d)
            use_weights(conv, *plan.weights(path, conv), entry.tile)
            actual = output_change(expected, pruned(x))
            assert actual is not None
            assert 0.4 * actual < error < 2.5 * actual, (path, index, error, actual)


def test_candidates_keep_what_adds_energy_unless_told_otherwise() -> None:
    _, candidates, calls, _ = parts(False)
    model = net()
    traced = trace(model)
    own = predict(networks_of(traced, calls), candidates, typical=0.5, choose=False)
    chosen = predict(networks_of(traced, calls), candidates, typical=0.5)
    assert all(own[path].entries == tuple(candidates[path]) for path in PATHS)
    assert any(chosen[path].entries != tuple(candidates[path]) for path in PATHS)


def test_both_tiles_at_once() -> None:
    model, _, calls, _ = parts(False)
    conv = model.get_submodule("a")
    assert isinstance(conv, nn.Conv2d)
    entries = grid_candidates("a", conv, CompileOptions(tile="auto"), ("wsp",))
    found = predict(networks_of(trace(model), calls), {"a": entries}, typical=0.5)["a"]
    alone = {
        tile: predict(
            networks_of(trace(model), calls),
            {"a": [entry for entry in entries if entry.tile == tile]},
            typical=0.5,
        )["a"]
        for tile in (2, 4)
    }
    for tile in (2, 4):
        errors = [
            error for entry, error in zip(found.entries, found.errors, strict=True) if entry.tile == tile
        ]
        # the gain is measured on another candidate
        ratios = [a / b for a, b in zip(errors[1:], alone[tile].errors[1:], strict=True)]
        assert max(ratios) == pytest.approx(min(ratios), rel=1e-3)
        assert 0.5 < ratios[0] < 2


def test_layers_that_the_data_never_reaches_are_left_out() -> None:
    model, candidates, calls, _ = parts(False)
    assert list(predict(networks_of(trace(model), calls), {"b": candidates["b"]}, typical=0.5)) == ["b"]


def test_much_data_is_thinned_out() -> None:
    model, candidates, _, x = parts(False)
    many = torch.cat([x] * 20)
    few = predict(networks_of(trace(model), [((x,), {})]), candidates, typical=0.5)
    thinned = predict(networks_of(trace(model), [((many,), {})]), candidates, typical=0.5)
    for path in PATHS:
        assert thinned[path].errors[8] == pytest.approx(few[path].errors[8], rel=0.35)


def test_without_data_inputs_are_white_noise() -> None:
    model, candidates, _, _ = parts(False)
    convolutions = {path: conv for path, conv in model.named_modules() if isinstance(conv, nn.Conv2d)}
    found = predict_from_weights(candidates, convolutions)
    for path in PATHS:
        U = transform_weight(convolutions[path].weight, 2)
        for entry, error in zip(found[path].entries, found[path].errors, strict=True):
            assert error == pytest.approx(relative_error(U, entry.keep, 2) ** 2)
        assert found[path].seen is None
