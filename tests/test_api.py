"""compile(): whole networks against PyTorch, what its arguments do, and its errors."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import wsp_compiler
from wsp_compiler import PruneRule, PruningPlan, errors
from wsp_compiler.codegen import layer

from .graphs import small_network
from .reference import (
    TOLERANCE,
    assert_close,
    assert_untouched,
    pruned_convolution,
    randomise,
    relative_error,
    snapshot,
)

NETWORKS = [  # name, keywords, eligible convolutions, convolutions
    pytest.param("resnet18", {}, 13, 20, marks=pytest.mark.slow),
    pytest.param("resnet50", {}, 13, 53),
    pytest.param("vgg16", {}, 13, 13, marks=pytest.mark.slow),
    pytest.param("densenet121", {}, 58, 120),
    pytest.param("googlenet", {"aux_logits": False, "init_weights": True}, 19, 57, marks=pytest.mark.slow),
]


def network(name: str, **keywords: Any) -> tuple[nn.Module, Tensor]:
    """A torchvision network with batch norm as after training, and four small images."""
    x = torch.randn(4, 3, 64, 64)
    return randomise(getattr(torchvision.models, name)(weights=None, **keywords), x), x


# --- whole networks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "keywords", "eligible", "total"), NETWORKS)
def test_unpruned_networks_equal_the_model(name: str, keywords: dict[str, Any], eligible: int, total: int):
    model, x = network(name, **keywords)
    before = snapshot(model)
    first = PruneRule(r"features\.0") if name == "vgg16" else PruneRule(r".*")
    compiled = wsp_compiler.compile(model, 0, method="dense", rules=[first], example_inputs=x)
    with torch.no_grad():
        expected = model(x)
    y = compiled(x)
    assert relative_error(y, expected) < 1e-4
    assert relative_error(y - y.mean(0), expected - expected.mean(0)) < 1e-3  # what depends on the image
    sites = wsp_compiler.find_sites(model)
    assert (sum(site.reject is None for site in sites), len(sites)) == (eligible, total)
    assert len(compiled.plan) == eligible
    report = compiled.report()
    assert all(site.path in report for site in sites)
    assert all(site.reject in report for site in sites if site.reject)
    assert_untouched(model, before)


@pytest.mark.parametrize(("name", "reason"), [("mobilenet_v2", "32 groups"), ("convnext_tiny", "kernel 7x7")])
def test_networks_without_eligible_convolutions_stay_as_they_are(name: str, reason: str):
    model, x = network(name)
    compiled = wsp_compiler.compile(model, 0.8, example_inputs=x)
    with torch.no_grad():
        expected = model(x)
    assert relative_error(compiled(x), expected) < 1e-5
    assert len(compiled.plan) == 0
    assert not list(compiled.layers())
    convolutions = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert list(compiled.plan.left_alone) == convolutions
    assert all(compiled.plan.left_alone.values())
    assert reason in compiled.report()


@pytest.mark.slow
def test_a_detector_that_cannot_be_traced_whole_is_lowered_in_parts():
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        box_score_thresh=0.0,
        min_size=128,
        max_size=160,
        rpn_post_nms_top_n_test=40,
        box_detections_per_img=10_000,
    )
    randomise(model.backbone, torch.rand(2, 3, 128, 160))
    with torch.no_grad():  # logits near 100 would turn errors of 1e-4 into other scores
        model.roi_heads.box_predictor.cls_score.weight.mul_(0.02)
    model.eval()
    before = snapshot(model)
    images = [torch.rand(3, 128, 160), torch.rand(3, 120, 150)]
    compiled = wsp_compiler.compile(model, 0, method="dense", example_inputs=(images,))
    assert len(compiled.plan) == 18
    assert "not traced" in compiled.report()

    def run(module: nn.Module, root: nn.Module) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
        """Detections, what the RPN head gave, and what the box head's pooling got: features, proposals, sizes."""
        outputs: list[Any] = []
        inputs: list[Any] = []
        head, pool = root.get_submodule("rpn.head"), root.get_submodule("roi_heads.box_roi_pool")
        handles = [
            head.register_forward_hook(lambda _module, _args, output: outputs.append(output)),
            pool.register_forward_pre_hook(lambda _module, args: inputs.append(args)),
        ]
        with torch.no_grad():
            detections = module(images)
        for handle in handles:
            handle.remove()
        return detections, outputs[0], inputs[0]

    def box_head(features: Any, proposals: Any, sizes: Any) -> Tensor:
        with torch.no_grad():
            return model.roi_heads.box_head(model.roi_heads.box_roi_pool(features, proposals, sizes))

    expected, (objectness, deltas), (features, proposals, sizes) = run(model, model)
    found, (found_objectness, found_deltas), (found_features, *_) = run(compiled, compiled.executable)
    for want, got in zip([*objectness, *deltas], [*found_objectness, *found_deltas], strict=True):
        assert relative_error(got, want) < 1e-4
    want, got = (box_head(given, proposals, sizes) for given in (features, found_features))
    assert relative_error(got, want) < 1e-4
    for want, got in zip(expected, found, strict=True):
        assert len(want["boxes"]) > 0
        assert len(got["boxes"]) == len(want["boxes"])
        assert torch.allclose(got["scores"], want["scores"], atol=2e-3)  # boxes of equal score may swap
    assert_untouched(model, before)


@pytest.mark.slow
def test_a_pruned_network_with_every_pass_checked_equals_its_graph():
    """check=True compares with the kept weights in float64 after every pass; the graph is the kernels' oracle."""
    model, x = network("resnet18")
    x = x[:1]
    compiled = wsp_compiler.compile(model, 0.8, example_inputs=x, check=True)
    assert [record.name for record in compiled.record.passes] == wsp_compiler.pipeline.names
    with torch.no_grad():
        expected = compiled.graph_module(x)
        dense = model(x)
    assert_close(compiled(x), expected, 1e-4)
    assert relative_error(expected, dense) > 1e-2


# --- arguments ----------------------------------------------------------------------------------------------


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a layer gets kernels for a new kind of input."""
    calls: list[int] = []
    monkeypatch.setattr(layer, "on_build", [lambda: calls.append(1)])
    return calls


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict"])
def test_example_inputs_build_every_kernel_at_once(form: str, builds: list[int]):
    x = torch.randn(1, 3, 8, 8)
    forms: dict[str, Any] = {"tensor": x, "tuple": (x,), "list": [x], "dict": {"input": x}}
    compiled = wsp_compiler.compile(small_network(), 0.5, example_inputs=forms[form])
    assert len(builds) == 2
    compiled(x)
    assert len(builds) == 2


def test_without_example_inputs_kernels_are_built_on_the_first_call(builds: list[int]):
    model, x = small_network(), torch.randn(1, 3, 8, 8)
    compiled = wsp_compiler.compile(model, 0.5)
    assert not builds
    compiled(x)
    assert len(builds) == 2


def test_a_plan_can_be_saved_and_used_again():
    model, x = small_network(), torch.randn(2, 3, 8, 8)
    compiled = wsp_compiler.compile(model, 0.5, method="wsp", direction="column")
    text = compiled.plan.to_json()
    again = wsp_compiler.compile(model, plan=PruningPlan.from_json(text))
    assert torch.equal(again(x), compiled(x))
    assert again.plan == compiled.plan
    with pytest.raises(errors.PlanError, match=r"(?s)2: planned for.*fix: make the plan from this model"):
        wsp_compiler.compile(nn.Sequential(nn.Conv2d(3, 16, 3)).eval(), plan=compiled.plan)


def test_rules_override_the_defaults_layer_by_layer():
    model, x = small_network(), torch.randn(2, 3, 8, 8)
    rules = [
        PruneRule("0", method="fp", pr=0.25),
        PruneRule("2", method="wsp", direction="column", tile=4),
        PruneRule("5", skip=True),
    ]
    compiled = wsp_compiler.compile(model, 0.5, rules=rules, example_inputs=x)
    assert {path: (site.pattern, site.tile, site.pr) for path, site in compiled.plan.items()} == {
        "0": ("FP", 2, 5 / 16),  # four of 16 filters, and one whose place a carrier of constants has
        "2": ("WSP-C", 4, 0.5),
    }
    assert "skipped" in compiled.plan.left_alone["5"]
    truth = pruned_convolution(x, model[0], compiled.plan["0"].keep, 2).relu()  # type: ignore[arg-type]
    double = copy.deepcopy(model).double()
    truth = double[3](pruned_convolution(truth, model[2], compiled.plan["2"].keep, 4))  # type: ignore[arg-type]
    truth = double[6](double[5](truth.relu()))
    assert_close(compiled(x), truth.detach(), TOLERANCE["fp32", 4])


def test_layers_with_few_channels_stay_dense_unless_a_rule_names_them():
    model = small_network()
    assert "3 channels, fewer than 16" in wsp_compiler.compile(model, 0.5).plan.left_alone["0"]
    assert "0" in wsp_compiler.compile(model, 0.5, rules=[PruneRule("0")]).plan


def test_later_changes_of_the_models_modules_do_not_reach_the_compiled_one():
    """Tensors of layers that are not lowered are shared, modules are not."""
    model = nn.Sequential(nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.Dropout(0.5)).eval()
    x = 3 + torch.randn(2, 16, 6, 6)
    compiled = wsp_compiler.compile(model, 0.5)
    expected, before = compiled(x), snapshot(model)
    model.train()
    model[2].register_forward_hook(lambda _module, _args, output: output * 100)
    assert torch.equal(compiled(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- errors -------------------------------------------------------------------------------------------------

MISTAKES: list[tuple[dict[str, Any], type[errors.WspError], str]] = [
    ({"pr": 1.0}, errors.OptionError, "pr=1.0"),
    ({"pr": float("nan")}, errors.OptionError, "pr=nan"),
    ({"pr": -0.1}, errors.OptionError, "pr=-0.1"),
    ({"pr": "half"}, errors.OptionError, "pr='half'"),
    ({"method": "bswp"}, errors.OptionError, "did you mean 'bwsp'"),
    ({"direction": "rows"}, errors.OptionError, "'rows'"),
    ({"tile": 3}, errors.OptionError, "tile 3"),
    ({"importance": "l7"}, errors.OptionError, "'l7'"),
    ({"precision": "fp8"}, errors.OptionError, "'fp8'"),
    ({"rules": [".*"]}, errors.OptionError, "PruneRule"),
    ({"rules": [PruneRule("conv1")]}, errors.RuleError, "matches no convolution.*names: 0, 2"),
    ({"target": "gpu"}, errors.TargetError, "'gpu'"),
    ({"target": torch.device("meta")}, errors.TargetError, "meta"),
    ({"target": {"kind": "vulkan"}}, errors.TargetError, "'vulkan'"),
    ({"target": {"kind": "llvm", "mcpu": "x86-64-v5"}}, errors.TargetError, "near names: .*x86-64-v"),
    ({"example_inputs": torch.randn(1, 4, 8, 8)}, errors.InputError, "example_inputs.*3 channels"),
    ({"example_inputs": (torch.randn(1, 3, 8, 8),) * 2}, errors.InputError, "example_inputs"),
    ({"example_inputs": {"image": torch.randn(1, 3, 8, 8)}}, errors.InputError, "image"),
]


@pytest.mark.parametrize(
    ("options", "kind", "message"), MISTAKES, ids=[f"{number}" for number in range(len(MISTAKES))]
)
def test_mistakes_are_named(options: dict[str, Any], kind: type[errors.WspError], message: str):
    with pytest.raises(kind, match=f"(?s){message}") as caught:
        wsp_compiler.compile(small_network(), **options)
    assert "\n  fix: " in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no CUDA device")
@pytest.mark.parametrize("target", ["cuda", "cuda:1", {"kind": "cuda", "arch": "sm_90"}])
def test_a_cuda_target_without_cuda_is_an_error(target: Any):
    with pytest.raises(errors.TargetError, match=r"(?s)no CUDA device.*fix: use target='cpu'"):
        wsp_compiler.compile(small_network(), target=target)


def test_models_that_cannot_be_compiled():
    with pytest.raises(errors.ModelError, match=r"(?s)train mode.*model.eval\(\)"):
        wsp_compiler.compile(small_network().train())
    with pytest.raises(errors.ModelError, match="got function"):
        wsp_compiler.compile(lambda x: x)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # scripting is deprecated
        scripted = torch.jit.script(nn.ReLU()).eval()
    with pytest.raises(errors.ModelError, match="got RecursiveScriptModule"):
        wsp_compiler.compile(scripted)


def test_damaged_plans_are_refused():
    plan = wsp_compiler.compile(small_network(), 0.5).plan
    record = json.loads(plan.to_json())
    record["sites"][0]["keep"] = "????"
    for text in ("", "[]", json.dumps(record), plan.to_json().replace('"version": 1', '"version": 99')):
        with pytest.raises(errors.PlanError, match="not a pruning plan"):
            PruningPlan.from_json(text)
