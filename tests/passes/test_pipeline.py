"""pipeline: order by dependencies, editing, errors that explain, and the one runner."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tests.graphs import conv, lowering, randomise_norms
from wsp_compiler.errors import OptionError, PassError
from wsp_compiler.passes import PassBase, Pipeline, Rewrites, pipeline, run_pipeline
from wsp_compiler.passes.pipeline import remove_dead_code
from wsp_compiler.plan import PruningPlan

ORDER = [
    "choose_keep",
    "lower_winograd",
    "fold_batch_norm",
    "fold_conv_batch_norm",
    "fuse_epilogue",
    "merge_stages",
    "fuse_conv_epilogue",
    "assign_layout",
]


@dataclass(frozen=True)
class Step(PassBase):
    """Does nothing, under any name, with any dependencies."""

    name: str = "step"
    requires: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def run(self, gm: fx.GraphModule, plan: PruningPlan) -> Rewrites:
        return Rewrites()


def names(edited: Pipeline) -> list[str]:
    return [entry.name for entry in edited.ordered()]


def test_the_default_order() -> None:
    assert names(pipeline) == ORDER


def test_dependencies_decide_and_not_the_order_of_the_list() -> None:
    assert names(Pipeline(tuple(reversed(pipeline.passes))))[:2] == ORDER[:2]
    shuffled = Pipeline(
        (Step("c", requires=("b",)), Step("b", requires=("level",)), Step("a", provides=("level",)))
    )
    assert names(shuffled) == ["a", "b", "c"]


def test_after_orders_without_requiring() -> None:
    late = Step("late", after=("b", "not there"))
    assert names(Pipeline((late, Step("b")))) == ["b", "late"]
    assert names(Pipeline((late,))) == ["late"]


def test_without_dependencies_the_order_of_the_list_holds() -> None:
    assert names(Pipeline(tuple(Step(name) for name in "bca"))) == ["b", "c", "a"]


def test_editing_returns_a_new_pipeline() -> None:
    edited = pipeline.before("lower_winograd", Step())
    assert names(edited) == ["choose_keep", "step", *ORDER[1:]]
    assert names(pipeline.after("lower_winograd", Step())) == [*ORDER[:2], "step", *ORDER[2:]]
    assert names(pipeline.after("assign_layout", Step())) == [*ORDER, "step"]
    assert names(pipeline.without("fuse_epilogue")) == [name for name in ORDER if name != "fuse_epilogue"]
    assert names(pipeline) == ORDER


def test_edits_are_kept_by_later_edits() -> None:
    edited = pipeline.before("choose_keep", Step("early")).after("assign_layout", Step("late"))
    assert names(edited) == ["early", *ORDER, "late"]
    first, second = Step("first"), Step("second")
    assert names(pipeline.before("choose_keep", first).before("first", second))[:2] == ["second", "first"]
    replaced = pipeline.after("assign_layout", first).before("first", second).replace("first", Step("other"))
    assert names(replaced) == [*ORDER, "second", "other"]
    assert names(edited.without("late").without("early")) == ORDER


def test_replace() -> None:
    other = Step("lower_winograd", requires=("keep_chosen",), provides=("lowered",))
    edited = pipeline.replace("lower_winograd", other)
    assert names(edited) == ORDER
    assert edited.ordered()[1] is other
    renamed = pipeline.replace("fuse_epilogue", Step("my_epilogue", requires=("lowered",)))
    assert "my_epilogue" in names(renamed)
    assert "fuse_epilogue" not in names(renamed)


@pytest.mark.parametrize("method", ["before", "after", "replace", "without"])
def test_an_unknown_pass_name_lists_near_and_known_names(method: str) -> None:
    arguments = ["lower_wingrad"] if method == "without" else ["lower_wingrad", Step()]
    with pytest.raises(PassError, match="no pass named 'lower_wingrad'") as caught:
        getattr(pipeline, method)(*arguments)
    assert caught.value.where == "Pipeline"
    assert "near names: lower_winograd" in caught.value.fix
    assert all(name in caught.value.fix for name in ORDER)


def test_an_unknown_dependency() -> None:
    with pytest.raises(PassError, match="requires 'lowerd', which no other pass provides") as caught:
        pipeline.after("lower_winograd", Step("mine", requires=("lowerd",))).ordered()
    assert caught.value.where == "pass mine"
    assert "near names: lowered" in caught.value.fix


def test_removing_what_others_require() -> None:
    with pytest.raises(PassError, match="requires 'keep_chosen'") as caught:
        pipeline.without("choose_keep").ordered()
    assert caught.value.where == "pass lower_winograd"


def test_a_cycle_is_spelled_out() -> None:
    a, b = Step("a", requires=("b",)), Step("b", requires=("c",))
    with pytest.raises(PassError, match="in a cycle: ") as caught:
        Pipeline((a, b, Step("c", requires=("a",)))).ordered()
    steps = caught.value.what.partition("cycle: ")[2].split(" -> ")
    assert steps[0] == steps[-1]
    assert sorted(steps[1:]) == ["a", "b", "c"]
    with pytest.raises(PassError, match=r"cycle: .*lower_winograd"):
        pipeline.before("lower_winograd", Step("mine", requires=("lowered",))).ordered()


def test_a_pass_may_keep_up_the_level_it_requires() -> None:
    mine = Step("mine", requires=("lowered",), provides=("lowered",))
    assert names(pipeline.after("lower_winograd", mine))[:3] == [*ORDER[:2], "mine"]
    with pytest.raises(PassError, match="requires 'level', which no other pass provides"):
        Pipeline((Step("mine", requires=("level",), provides=("level",)),)).ordered()


@pytest.mark.parametrize(
    ("entry", "what", "fix"),
    [
        (Step, "is not a pass", "write Step()"),
        (nn.ReLU(), "is not a pass", "PassBase"),
        (None, "is not a pass", "PassBase"),
        (PassBase(), "PassBase has no name", "name: str = field"),
    ],
)
def test_what_is_no_pass_is_refused(entry: Any, what: str, fix: str) -> None:
    for edit in (
        lambda: pipeline.before("choose_keep", entry),
        lambda: pipeline.after("choose_keep", entry),
        lambda: pipeline.replace("choose_keep", entry),
        lambda: Pipeline((entry,)),
    ):
        with pytest.raises(PassError, match=what) as caught:
            edit()
        assert fix in caught.value.fix


def test_names_are_unique() -> None:
    for edit in (
        lambda: pipeline.before("choose_keep", Step("merge_stages")),
        lambda: pipeline.replace("choose_keep", Step("merge_stages")),
        lambda: Pipeline((Step("a"), Step("a"))),
    ):
        with pytest.raises(PassError, match="several passes are named"):
            edit()


def test_edges_name_passes() -> None:
    with pytest.raises(PassError, match="no pass named 'b'"):
        Pipeline((Step("a"),), edges=(("a", "b"),))


@dataclass(frozen=True)
class Edit(PassBase):
    """Calls a function on the graph module."""

    name: str = field(default="edit", init=False)
    edit: Any = None

    def run(self, gm: fx.GraphModule, plan: PruningPlan) -> Rewrites:
        result = self.edit(gm)
        return Rewrites(1) if result is None else result


def run(model: nn.Module, *passes: Any, **options: Any) -> tuple[fx.GraphModule, list[Any]]:
    case = lowering(model)
    return case.gm, run_pipeline(Pipeline(passes), case.gm, case.plan, **options)


def test_records() -> None:
    case = lowering(nn.Sequential(conv(), conv(stride=2)))
    records = run_pipeline(pipeline, case.gm, case.plan, unit="body")
    assert [record.name for record in records] == ORDER
    assert {record.unit for record in records} == {"body"}
    assert records[0].rewrites == Rewrites(1, (("1", "stride 2x2, not 1"),))
    assert all(record.seconds >= 0 for record in records)


def test_the_graph_is_recompiled_and_cleaned() -> None:
    def use_tanh(gm: fx.GraphModule) -> None:
        (relu,) = (node for node in gm.graph.nodes if node.target == "1")
        with gm.graph.inserting_before(relu):
            relu.replace_all_uses_with(gm.graph.call_function(torch.tanh, (relu.args[0],)))
        gm.graph.erase_node(relu)

    model, x = nn.Sequential(conv(), nn.ReLU()), torch.randn(1, 4, 5, 5)
    gm, _ = run(model, Edit(edit=use_tanh))
    assert torch.equal(gm(x), torch.tanh(model[0](x)))
    assert [name for name, _ in gm.named_children()] == ["0"]


def broken_graph(gm: fx.GraphModule) -> None:
    first = next(iter(gm.graph.nodes))
    with gm.graph.inserting_before(first):
        gm.graph.call_function(torch.relu, (first,))


def failing(gm: fx.GraphModule) -> None:
    raise IndexError("five")


def refusing(gm: fx.GraphModule) -> None:
    raise PassError("not today", where="pass edit", fix="wait")


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (broken_graph, "failed: "),
        (failing, "failed: IndexError: five"),
        (refusing, "not today"),
        (lambda gm: 3, "failed: TypeError: run returned 3, not Rewrites"),
    ],
)
def test_a_failing_pass_is_named(edit: Any, what: str) -> None:
    with pytest.raises(PassError, match=what) as caught:
        run(nn.Sequential(conv()), Edit(edit=edit))
    assert caught.value.where == "pass edit"
    assert caught.value.fix


def test_check_runs_after_every_pass() -> None:
    case = lowering(nn.Sequential(conv()))
    seen: list[str] = []

    def check(gm: fx.GraphModule, name: str) -> None:
        assert gm is case.gm
        seen.append(name)

    run_pipeline(pipeline, case.gm, case.plan, check=check)
    assert seen == ORDER


class Statements(nn.Module):
    """Calls in-place functions for their effect only, and a lowered convolution for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = conv(), conv(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        F.relu_(y)
        z = torch.tanh(y)
        z.add_(1)
        self.act(z)
        self.b(x)
        return z


def test_dead_code_removal_keeps_in_place_calls() -> None:
    case = lowering(Statements())
    x = torch.randn(1, 4, 5, 5)
    run_pipeline(pipeline, case.gm, case.plan)
    assert case.calls == ["winograd_conv2d", "relu_", "tanh", ".add_", "ReLU"]
    assert sum(node.op == "get_attr" for node in case.gm.graph.nodes) == 6
    case.assert_equals_model(x)


def test_dead_code_removal_keeps_placeholders() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.conv(x)

    case = lowering(Unused())
    remove_dead_code(case.gm)
    case.assert_equals_model(torch.randn(1, 4, 5, 5), torch.randn(2))


def test_dumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = lowering(nn.Sequential(conv(), nn.ReLU()))
    folder = tmp_path / "new" / "dumps"
    monkeypatch.setenv("WSP_DUMP", str(folder))
    run_pipeline(pipeline, case.gm, case.plan)
    run_pipeline(Pipeline((Step("x"),)), case.gm, case.plan, unit="head.0")
    stages = ["traced", *ORDER]
    expected = [f"{number:02d}_{name}.txt" for number, name in enumerate(stages)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*expected, "head.0.00_traced.txt", "head.0.01_x.txt"]
    )
    assert "call_module[target=0]" in (folder / expected[0]).read_text()
    text = (folder / expected[2]).read_text()
    assert "wsp.sparse_bgemm" in text
    assert "winograd_conv2d" not in text
    assert "winograd_conv2d" in (folder / expected[-1]).read_text()


def test_no_dumps_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WSP_DUMP", "")
    run(nn.Sequential(conv()), Step())
    assert list(tmp_path.iterdir()) == []


def test_a_dump_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WSP_DUMP", str(tmp_path / "file"))
    with pytest.raises(OptionError, match="cannot write the dump") as caught:
        run(nn.Sequential(conv()), Step())
    assert caught.value.where.startswith("WSP_DUMP=")


@pytest.mark.parametrize(("method", "tile"), [("bwsp", 2), ("dense", 4)])
def test_resnet18_after_every_pass(method: str, tile: int) -> None:
    """Plain PyTorch runs the graph after every pass, and it computes the dense model (pr=0) in float64."""
    model = randomise_norms(torchvision.models.resnet18(weights=None)).requires_grad_(False)
    x = torch.randn(1, 3, 64, 64).double()
    expected = copy.deepcopy(model).double()(x)
    case = lowering(model, method=method, tile=tile, pr=0.0)
    errors: dict[str, float] = {}

    def check(gm: fx.GraphModule, name: str) -> None:
        y = copy.deepcopy(gm).double()(x)
        errors[name] = float((y - expected).norm() / expected.norm())

    records = run_pipeline(pipeline, case.gm, case.plan, check=check)
    assert list(errors) == ORDER
    assert max(errors.values()) <= 1e-6
    assert {record.name: record.rewrites.count for record in records[:6]} == {
        "choose_keep": 13,
        "lower_winograd": 13,
        "fold_batch_norm": 13,
        "fold_conv_batch_norm": 7,
        "fuse_epilogue": 13 + 8,  # an activation each, and the blocks' residuals
        "merge_stages": 13,
    }
    assert "BatchNorm2d" not in case.calls
    assert case.calls.count("winograd_conv2d") == 13
