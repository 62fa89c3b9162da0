"""Adaptive batch norm: what pruning shifts is put back, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.abwsp.problem import PR, batches, net
from tests.reference import assert_untouched, relative_error, snapshot
from wsp_compiler.abwsp.norms import adapt_norms, input_moments, norms_of
from wsp_compiler.batches import calibration_calls
from wsp_compiler.errors import InputError
from wsp_compiler.training.prune import prune


def test_moments_are_those_of_the_data() -> None:
    model = net()
    before = snapshot(model)
    data = batches(3)
    found = input_moments(model, calibration_calls(data, model))
    assert list(found) == [f"norm{i}" for i in range(5)]
    with torch.no_grad():
        y = model.get_submodule("stem")(torch.cat(data)).double()
    mean, variance = found["norm0"]
    assert torch.allclose(mean, y.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(variance, y.var((0, 2, 3), correction=0), rtol=1e-4)
    assert_untouched(model, before)
    assert model.get_submodule("norm0").momentum == 0.1


def test_an_unpruned_model_keeps_its_statistics() -> None:
    model = net()
    calls = calibration_calls(batches(), model)
    dense = input_moments(model, calls)
    found = adapt_norms(model, dense, calls)
    for path, norm in norms_of(net()).items():
        assert torch.equal(found[path].mean, norm.running_mean)  # type: ignore[arg-type]
        assert torch.equal(found[path].variance, norm.running_var)  # type: ignore[arg-type]


def test_outputs_have_the_mean_and_variance_that_they_had() -> None:
    """On the data themselves, one batch: a batch norm's output is distributed as in the dense network."""
    dense, data = net(), batches(1)
    pruned = prune(dense, PR, method="wsp")
    calls = calibration_calls(data, dense)
    reference = input_moments(dense, calls)
    moments = input_moments(pruned, calls)
    adapt_norms(pruned, reference, calls)
    for path, norm in norms_of(pruned).items():
        before = norms_of(dense)[path]
        for (mean, variance), owner in ((reference[path], before), (moments[path], norm)):
            assert owner.running_mean is not None
            assert owner.running_var is not None
            shift = (mean - owner.running_mean.double()) / owner.running_var.double().sqrt()
            spread = variance / owner.running_var.double()
            if owner is before:
                wanted = shift, spread
            else:
                assert torch.allclose(shift, wanted[0], atol=1e-4)
                assert torch.allclose(spread, wanted[1], rtol=1e-4)


def test_the_pruned_network_comes_closer_to_the_dense_one() -> None:
    dense, test = net(), batches(1, seed=9)[0]
    pruned = prune(dense, PR, method="wsp")
    calls = calibration_calls(batches(), dense)
    before = relative_error(pruned(test), dense(test))
    weights = [parameter.clone() for parameter in pruned.parameters()]
    adapt_norms(pruned, input_moments(dense, calls), calls)
    assert relative_error(pruned(test), dense(test)) < 0.8 * before
    assert all(torch.equal(a, b) for a, b in zip(weights, pruned.parameters(), strict=True))
    assert not any(module.training for module in pruned.modules())


def test_a_channel_that_says_nothing_keeps_its_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    nn.init.zeros_(model[0].weight[1])  # type: ignore[arg-type]
    calls = calibration_calls(batches(1), model)
    found = adapt_norms(model, input_moments(model, calls), calls)
    assert float(found["1"].variance[1]) == 1


def test_models_without_batch_norms() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    calls = calibration_calls(batches(1), model)
    assert input_moments(model, calls) == {}
    assert adapt_norms(model, {}, calls) == {}


def test_bad_data() -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(InputError, match="the model fails on batch 0"):
        input_moments(model, calibration_calls(torch.randn(2, 5, 16, 16), model))
    with pytest.raises(InputError, match="Expected more than 1 value per channel"):
        input_moments(model, calibration_calls(torch.randn(1, 3, 2, 2), model))
    assert_untouched(model, before)
    stem = model.get_submodule("stem")
    assert isinstance(stem.weight, torch.Tensor)
    stem.weight.data.fill_(3e38)
    with pytest.raises(InputError, match="norm0: its input is NaN or infinite"):
        input_moments(model, calibration_calls(batches(1), model))
