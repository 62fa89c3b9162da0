"""Networks: candidates as eval_fn sees them."""

from __future__ import annotations

import pytest
from torch import nn

import wsp_compiler
from tests.abwsp.problem import Fidelity, batches, net, plans
from tests.reference import assert_untouched, snapshot
from wsp_compiler.abwsp.choices import Choices
from wsp_compiler.abwsp.outlook import Networks, dense_copy
from wsp_compiler.batches import calibration_calls
from wsp_compiler.errors import EvaluationError
from wsp_compiler.training import WinogradConv2d


def prepared() -> tuple[nn.Module, Networks, Choices]:
    model = net()
    networks = Networks.of(model, calibration_calls(batches(), model), Fidelity(model), batches(1)[0])
    return model, networks, Choices(*plans(), {})


def test_the_outlook_is_of_the_adapted_network() -> None:
    model, networks, choices = prepared()
    before = snapshot(model)
    outlook = networks.outlook(choices, "0110")
    plain = networks.accuracy(networks.build(choices.plan("0110")), "")
    assert outlook > plain + 0.5  # dB
    plan, module = networks.adapted(choices.plan("0110"))
    assert networks.accuracy(module, "") == outlook
    # the plan says it all: made again, and compiled
    assert networks.accuracy(networks.build(plan), "") == pytest.approx(outlook, abs=1e-5)
    compiled = wsp_compiler.compile(model, plan=plan)
    assert networks.accuracy(compiled.graph_module, "") == pytest.approx(outlook, abs=1e-3)
    assert_untouched(model, before)


def test_eval_fn_gets_the_users_class_with_winograd_layers() -> None:
    model, networks, choices = prepared()
    seen: list[nn.Module] = []
    asking = Networks(model, networks.calls, lambda module: seen.append(module) or 1.0, None, networks.dense)  # type: ignore[func-returns-value]
    assert asking.outlook(choices, "0000") == 1
    assert type(seen[0]) is type(model)
    assert isinstance(seen[0].get_submodule("conv2"), WinogradConv2d)


def test_a_refit_brings_it_closer() -> None:
    _, networks, choices = prepared()
    plan = choices.plan("0101")
    fitted = networks.refitted(plan)
    assert set(fitted.refits) == set(choices.layers)
    for path in choices.layers:
        assert fitted[path].kept_fraction == plan[path].kept_fraction
    assert networks.accuracy(networks.build(fitted), "") > networks.outlook(choices, "0101") + 0.5


def test_a_dense_copy_computes_the_same_and_shares_nothing() -> None:
    model, networks, _ = prepared()
    copy = dense_copy(model)
    assert networks.accuracy(copy, "") == pytest.approx(90)
    tensors = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not tensors & {tensor.data_ptr() for tensor in copy.state_dict().values()}


def test_bad_eval_fn() -> None:
    model, networks, choices = prepared()

    def broken(module: nn.Module) -> float:
        raise RuntimeError("no data")

    for eval_fn, message in ((broken, "no data"), (lambda module: float("nan"), "nan on the candidate 0000")):
        bad = Networks(model, networks.calls, eval_fn, None, networks.dense)
        with pytest.raises(EvaluationError, match=message):
            bad.outlook(choices, "0000")
