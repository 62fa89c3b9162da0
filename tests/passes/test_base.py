"""base: what passes share to read and edit graphs."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from tests.graphs import conv, lowering
from wsp_compiler.passes import Pass, PassBase, Rewrites, pipeline
from wsp_compiler.passes.base import (
    INPUT_TRANSFORM,
    OUTPUT_TRANSFORM,
    altered,
    arguments,
    called_module,
    first_input,
    get_attribute,
    get_buffer,
    is_op,
    set_argument,
    site_of,
)
from wsp_compiler.plan import PruningPlan


def test_default_passes_are_passes_with_a_rewrite_block() -> None:
    for entry in pipeline.passes:
        assert isinstance(entry, Pass)
        assert isinstance(entry, PassBase)
        assert "rewrite:" in str(__import__(type(entry).__module__, fromlist=["x"]).__doc__)
        assert type(entry).__module__.endswith(f".{entry.name}")
        assert hash(entry) == hash(type(entry)())  # frozen


def test_a_pass_without_run_says_so() -> None:
    with pytest.raises(NotImplementedError, match=r"PassBase\.run"):
        PassBase().run(torch.fx.symbolic_trace(nn.ReLU()), PruningPlan())


def test_rewrites_default_to_nothing_done() -> None:
    assert Rewrites() == Rewrites(0, ())


def test_nodes_and_arguments() -> None:
    case = lowering(nn.Sequential(conv())).through("lower_winograd")
    nodes = {str(node.target): node for node in case.gm.graph.nodes}
    V, y = nodes["wsp.input_transform.default"], nodes["wsp.output_transform.default"]
    assert is_op(V, INPUT_TRANSFORM)
    assert not is_op(V, OUTPUT_TRANSFORM)
    assert not is_op(None, INPUT_TRANSFORM)
    assert arguments(V)["tile"] == 2
    assert arguments(y)["activation"] == "none"
    assert arguments(y)["residual"] is None
    set_argument(y, "activation", "relu")
    assert arguments(y)["activation"] == "relu"
    assert arguments(y)["padding"] == [1, 1]
    name, site = site_of(case.gm, y)
    assert case.gm.get_submodule(name) is site
    bias = get_buffer(case.gm, V, name, "bias")
    assert bias.next is V
    assert get_attribute(case.gm, bias) is site.bias
    assert get_attribute(case.gm, V) is None
    assert get_attribute(case.gm, 3) is None


def test_called_module_and_first_input() -> None:
    case = lowering(nn.Sequential(conv(), nn.ReLU()))
    x, first, relu, _ = case.gm.graph.nodes
    assert called_module(case.gm, x) is None
    assert called_module(case.gm, "0") is None
    assert isinstance(called_module(case.gm, first), nn.Conv2d)
    assert first_input(relu) is first
    relu.args, relu.kwargs = (), {"input": first}
    assert first_input(relu) is first


def test_altered_modules() -> None:
    relu = nn.ReLU()
    assert altered(relu) is None
    relu.forward = types.MethodType(lambda self, x: x, relu)
    assert altered(relu) == "its forward is replaced"
    hooked = nn.ReLU()
    hooked.register_forward_pre_hook(lambda *_: None)
    assert altered(hooked) == "it has forward hooks"
