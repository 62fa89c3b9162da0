"""predict: errors of candidates against what pruning layers really does to the network's output."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.reference import assert_untouched, snapshot
from tests.test_calibration import images, net
from wsp_compiler.budget.candidates import grid_candidates
from wsp_compiler.budget.predict import RoughPass, predict_from_weights, rough_pass
from wsp_compiler.calibration import calibrate, use_weights
from wsp_compiler.options import CompileOptions
from wsp_compiler.plan import PruningPlan, make_plan
from wsp_compiler.pruning.output_aware import relative_error
from wsp_compiler.sensitivity import output_change
from wsp_compiler.site_plan import SitePlan
from wsp_compiler.sites import find_sites
from wsp_compiler.trace import Call, trace
from wsp_compiler.winograd import transform_weight

PATHS = ("a", "b", "c")
Parts = tuple[nn.Module, PruningPlan, dict[str, list[SitePlan]], list[Call], Tensor]


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {path: conv for path, conv in model.named_modules() if isinstance(conv, nn.Conv2d)}


def parts(branch: bool = False, batches: int = 3, tile: int | str = 2) -> Parts:
    model = net(branch)
    options = CompileOptions(0.5, "wsp", tile=tile)
    base = make_plan(find_sites(model), convolutions(model), options)
    candidates = {path: grid_candidates(path, convolutions(model)[path], options, ("wsp",)) for path in base}
    x = images(12)
    return model, base, candidates, [((part,), {}) for part in x.chunk(batches)], x


def run(parts: Parts, plan: PruningPlan | None = None, choose: bool = True) -> RoughPass:
    model, base, candidates, calls, _ = parts
    with torch.no_grad():
        return rough_pass(
            trace(model), base if plan is None else plan, candidates if plan is None else {}, calls,
            choose=choose,
        )  # fmt: skip


def calibrated_change(model: nn.Module, plan: PruningPlan, calls: list[Call], x: Tensor) -> float:
    """Of the output of a network that is calibrated in earnest."""
    found = calibrate(trace(model), plan, calls)
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        for path, conv in convolutions(pruned).items():
            if path in found.refits:
                use_weights(conv, *found.weights(path, conv), found[path].tile)
        change = output_change(model(x), pruned(x))
    assert change is not None
    return change


@pytest.mark.parametrize("branch", [False, True])
def test_the_change_is_that_of_a_calibrated_network(branch: bool) -> None:
    made = parts(branch)
    model, base, _, calls, x = made
    before = snapshot(model)
    found = run(made)
    assert_untouched(model, before)
    assert found.change == pytest.approx(calibrated_change(model, base, calls, x), rel=0.4)
    # without candidates the same network is tried
    tried = run(made, base)
    assert tried.change == pytest.approx(found.change, rel=1e-3)
    assert tried.predictions == {}


def test_every_step_is_told() -> None:
    model, base, candidates, calls, _ = parts()
    steps: list[str] = []
    with torch.no_grad():
        rough_pass(trace(model), base, candidates, calls, on_step=steps.append)
    assert steps == [path for path in PATHS for _ in calls]


def test_predictions_order_plans_as_calibration_does() -> None:
    """Pruning one layer much less: what is predicted to help most does."""
    made = parts()
    model, base, _, calls, x = made
    found = run(made)
    predicted: dict[str, float] = {}
    actual: dict[str, float] = {}
    even = calibrated_change(model, base, calls, x)
    for path in PATHS:
        by_ratio = dict(zip([entry.pr for entry in found.predictions[path].entries],
                            zip(found.predictions[path].entries, found.predictions[path].errors, strict=True),
                            strict=True))  # fmt: skip
        predicted[path] = by_ratio[0.5][1] - by_ratio[0.1][1]
        plan = PruningPlan({**base.sites, path: by_ratio[0.1][0]})
        actual[path] = even - calibrated_change(model, plan, calls, x)
        assert found.predictions[path].seen == (4, *{"a": (17, 17), "b": (17, 17), "c": (6, 6)}[path])
    assert max(predicted, key=predicted.__getitem__) == max(actual, key=actual.__getitem__)
    for path in PATHS:
        assert 0.2 * actual[path] < predicted[path] < 5 * actual[path], (predicted, actual)


def test_candidates_keep_what_adds_energy_unless_told_otherwise() -> None:
    made = parts()
    own, chosen = run(made, choose=False), run(made)
    assert all(own.predictions[path].entries == tuple(made[2][path]) for path in PATHS)
    assert any(chosen.predictions[path].entries != tuple(made[2][path]) for path in PATHS)


def test_both_tiles_at_once() -> None:
    """The base has F(2x2, 3x3), whose errors are those without the other candidates."""
    made = parts(tile="auto")
    both = run(made).predictions["a"]
    model, base, candidates, calls, x = made
    alone = run(
        (model, base, {path: [e for e in candidates[path] if e.tile == 2] for path in PATHS}, calls, x)
    )
    errors = [error for entry, error in zip(both.entries, both.errors, strict=True) if entry.tile == 2]
    assert errors == pytest.approx(alone.predictions["a"].errors, rel=1e-4)
    four = [error for entry, error in zip(both.entries, both.errors, strict=True) if entry.tile == 4]
    assert 0 < four[5] < four[12]


def test_layers_without_candidates_are_pruned_but_not_predicted() -> None:
    model, base, candidates, calls, x = parts()
    found = run((model, base, {"b": candidates["b"]}, calls, x))
    assert list(found.predictions) == ["b"]
    assert found.change == pytest.approx(run((model, base, candidates, calls, x)).change, rel=1e-3)


def test_much_data_is_thinned_out() -> None:
    model, base, candidates, _, x = parts()
    few = run((model, base, candidates, [((x,), {})], x))
    many = run((model, base, candidates, [((torch.cat([x] * 20),), {})], x))
    for path in PATHS:
        assert many.predictions[path].errors[8] == pytest.approx(few.predictions[path].errors[8], rel=0.5)


def test_a_model_that_takes_whole_batches_only() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x.view(4, 16, 9, 9)).relu())

    model = Whole().eval()
    options = CompileOptions(0.5, "wsp")
    base = make_plan(find_sites(model), convolutions(model), options)
    candidates = {path: grid_candidates(path, convolutions(model)[path], options, ("wsp",)) for path in base}
    x = torch.randn(4, 16, 9, 9)
    found = run((model, base, candidates, [((x,), {})], x))
    assert set(found.predictions) == {"first", "second"}
    assert found.change is not None


def test_without_data_inputs_are_white_noise() -> None:
    model, _, candidates, _, _ = parts()
    found = predict_from_weights(candidates, convolutions(model))
    for path in PATHS:
        U = transform_weight(convolutions(model)[path].weight, 2)
        for entry, error in zip(found[path].entries, found[path].errors, strict=True):
            assert error == pytest.approx(relative_error(U, entry.keep, 2) ** 2)
        assert found[path].seen is None
