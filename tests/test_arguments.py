"""arguments: what does not go together is refused with a fix; model and inputs end up on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import wsp_compiler
from tests.graphs import small_network
from tests.reference import relative_error
from wsp_compiler import PruneRule, PruningPlan
from wsp_compiler.arguments import device_of, moved_to
from wsp_compiler.errors import ModelError, OptionError

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"precision": "tf32"}, "CPU.*fix: use 'fp32' or 'bf16'"),
    ({"precision": "fp16"}, "CPU"),
    ({"rules": PruneRule(".*")}, "fix: pass a list"),
    ({"passes": []}, "passes is a list"),
    ({"plan": "plan.json"}, "plan is a str"),
    ({"rest": "fast"}, "unknown rest 'fast'"),
    ({"cuda_graph": 1}, "cuda_graph is a int, not a bool"),
    ({"cuda_graph": True}, "cuda_graph=True on the CPU"),
    ({"plan": PruningPlan(), "max_drop": 1.0, "eval_fn": float}, "both plan and max_drop"),
    ({"max_drop": 0.1}, "max_drop needs eval_fn"),
    ({"max_drop": 1.0, "eval_fn": 3}, "eval_fn is a int"),
    ({"target_latency": 5.0}, "target_latency needs inputs"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=["-".join(options) for options, _ in MISTAKES])
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"(?s){message}") as caught:
        wsp_compiler.compile(small_network(), **options)
    assert "\n  fix: " in str(caught.value)


def test_a_model_on_several_devices_is_refused() -> None:
    scattered = small_network()
    scattered[5].to("meta")
    with pytest.raises(ModelError, match="several devices: cpu, meta"):
        wsp_compiler.compile(scattered)


def test_only_what_is_elsewhere_is_copied() -> None:
    model, inputs = small_network(), {"x": [torch.ones(1)], "flag": True}
    assert moved_to(torch.device("cpu"), model, inputs) == (model, inputs)
    copied, moved = moved_to(torch.device("meta"), model, inputs)
    assert (device_of(model).type, device_of(copied).type) == ("cpu", "meta")
    assert (moved["x"][0].device.type, moved["flag"]) == ("meta", True)


@pytest.mark.cuda
def test_a_model_on_the_cpu_is_copied_to_the_target() -> None:
    model, x = small_network(), torch.randn(2, 3, 8, 8)
    compiled = wsp_compiler.compile(
        model, 0, method="dense", precision="fp32", target="cuda", example_inputs=x
    )
    y = compiled(x.cuda())
    assert y.is_cuda
    assert next(model.parameters()).device == x.device
    assert relative_error(y.cpu(), model(x)) < 1e-3
