"""report: the per-layer table and what follows it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from wsp_compiler.options import CompileOptions, PruneRule
from wsp_compiler.passes import PassRecord, Rewrites
from wsp_compiler.plan import PruningPlan, make_plan
from wsp_compiler.report import HEADER, format_report, format_table, site_rows
from wsp_compiler.sites import ConvSite, find_sites
from wsp_compiler.speed import MEASURED, MODEL, TABLE, SiteTimes, Timing


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(16, 20, 3, padding=1)
        self.shared = nn.Conv2d(20, 20, 3, padding=1)
        self.down = nn.Conv2d(20, 4, 3, stride=2)
        self.kernel = nn.Parameter(torch.zeros(4, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(self.down(self.shared(self.shared(self.wide(x)))), self.kernel)


def parts(example: torch.Tensor | None = None) -> tuple[tuple[ConvSite, ...], PruningPlan]:
    model = Net().eval()
    sites = find_sites(model, example)
    convolutions = {path: m for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    rules = (PruneRule("shared", method="dense", tile=4),)
    return sites, make_plan(sites, convolutions, CompileOptions(pr=0.5, rules=rules))


def test_the_table() -> None:
    sites, plan = parts(torch.randn(3, 16, 7, 9))
    rows = [dict(zip(HEADER, row, strict=True)) for row in site_rows(sites, plan)]
    wide, shared, down, functional = rows
    assert wide == {
        "path": "wide",
        "shape n x c @ H x W": "20x16 @ 7x9",
        "decision": "pruned",
        "pattern": "BWSP-R",
        "tile": "F(2x2)",
        "kept": "0.5000",
        "error": f"~{plan.errors['wide']:.3f}",
        "direct": "544k",  # 3 * 7*9 * 20*16 * 9
        "Winograd": "307k",  # 3 * 4*5 * 16 * 20*16
        "now": "154k",
        "kernel": "?",
        "us": "?",
        "dense us": "?",
        "why": "",
    }
    assert 0.1 < plan.errors["wide"] < 1
    assert shared["error"] == "~0.000"
    assert (shared["decision"], shared["pattern"], shared["tile"]) == ("Winograd", "dense", "F(4x4)")
    assert shared["direct"] == "1.36M"  # two calls: 2 * 3 * 7*9 * 20*20 * 9
    assert shared["Winograd"] == shared["now"] == "518k"  # 2 * 3 * 2*3 * 36 * 20*20
    assert (down["decision"], down["why"], down["now"]) == ("left alone", "stride 2x2, not 1", "-")
    assert functional["path"] == "graph node conv2d"
    assert functional["shape n x c @ H x W"] == "-"
    assert functional["why"] == "called as a function, not as a Conv2d module"


def test_without_shapes_the_counts_are_open() -> None:
    sites, plan = parts()
    row = dict(zip(HEADER, site_rows(sites, plan)[0], strict=True))
    assert row["shape n x c @ H x W"] == "20x16 @ ?"
    assert (row["direct"], row["Winograd"], row["now"], row["kept"]) == ("?", "?", "?", "0.5000")


def test_the_whole_text() -> None:
    sites, plan = parts(torch.randn(1, 16, 8, 8))
    records = [
        PassRecord("fuse_epilogue", "", Rewrites(3, (("conv", "2 users"),)), 0.1),
        PassRecord("merge_stages", "body", Rewrites(2), 0.1),
    ]
    untraced = {"": "torch.fx: control flow", "head": "it has forward hooks"}
    text = format_report(sites, plan, untraced, records, ["wide: a note"])
    kept, total = 16 * 10 * 16 + 36 * 400, 16 * 20 * 16 + 36 * 400
    assert text.splitlines()[2 + len(sites) :] == [
        "",
        "2 of 4 convolutions run as Winograd; multiplies are per call",
        f"kept {kept} of {total} Winograd weights: achieved pr = {1 - kept / total:.4f}",
        "error: relative L2 error of the layer's own output, on the calibration data (~: estimated from the "
        "weights, for white noise)",
        "warning: 1 of 1 pruned layers are neither calibrated nor fine-tuned, which costs accuracy: compile with "
        "calibration=, or fine-tune what wsp_compiler.prune returns",
        "speed not checked for 2 layers: no example_inputs, or no times known on this device "
        "(tune='fast' measures them)",
        "not traced, runs as it was: the model itself: torch.fx: control flow",
        "not traced, runs as it was: head: it has forward hooks",
        "pass fuse_epilogue: 3 rewrites, 1 declined",
        "pass merge_stages (body): 2 rewrites",
        "wide: a note",
    ]
    assert format_report(sites, plan, untraced, records, ["wide: a note"]) == text


def test_a_planned_convolution_that_cannot_be_lowered_is_left_alone() -> None:
    _, plan = parts()
    rejected = ConvSite("wide", 20, 16, (3, 3), (1, 1), (1, 1), True, 0, reject="not called")
    row = dict(zip(HEADER, site_rows([rejected], plan)[0], strict=True))
    assert (row["decision"], row["why"]) == ("left alone", "not called")
    assert "0 of 1 convolutions" in format_report([rejected], plan, {}, [])
    unknown = ConvSite("other", 20, 16, (3, 3), (1, 1), (1, 1), True, 1)
    assert site_rows([unknown], plan)[0][-1] == "not in the plan"


def test_nothing_to_report() -> None:
    text = format_report([], PruningPlan(), {}, [])
    assert text.splitlines()[0].split("  ")[0] == "path"
    assert "0 of 0 convolutions" in text
    assert "achieved" not in text


def test_a_root_convolution_has_a_name() -> None:
    site = ConvSite("", 4, 4, (1, 1), (1, 1), (0, 0), True, 1, reject="kernel 1x1, not 3x3")
    assert site_rows([site], PruningPlan())[0][0] == "(the model)"


def test_tables_are_aligned() -> None:
    text = format_table(("a", "long name"), [("x", ""), ("longer", "y")])
    assert text == "a       long name\n-----------------\nx\nlonger  y"


@pytest.mark.parametrize(
    ("n", "c", "expected"),
    [
        (3, 3, "81"),
        (11, 11, "1.09k"),
        (333, 333, "998k"),
        (111, 1001, "1M"),  # 999999, not 1e+03k
        (334, 334, "1M"),
        (1054, 1054, "10M"),
        (111111, 1001, "1G"),
    ],
)
def test_large_counts_have_three_digits(n: int, c: int, expected: str) -> None:
    """On a 1x1 output a convolution takes 9 * n * c multiplies."""
    site = ConvSite("a", n, c, (3, 3), (1, 1), (1, 1), True, 1, ((1, c, 1, 1),))
    model = {"a": nn.Conv2d(16, 16, 3)}
    plan = make_plan((ConvSite("a", 16, 16, (3, 3), (1, 1), (1, 1), True, 1),), model, CompileOptions())
    assert dict(zip(HEADER, site_rows([site], plan)[0], strict=True))["direct"] == expected


def test_times_and_kernels_are_shown() -> None:
    sites, plan = parts()
    times = {
        "wide": SiteTimes(Timing(12.34, MEASURED), Timing(23456.7, TABLE)),
        "shared": SiteTimes(Timing(9.0, MODEL), Timing(8.0, MODEL)),
    }
    kernels = {"wide": "fused tiles=32"}
    rows = [dict(zip(HEADER, row, strict=True)) for row in site_rows(sites, plan, times, kernels)]
    assert (rows[0]["kernel"], rows[0]["us"], rows[0]["dense us"], rows[0]["why"]) == (
        "fused",
        "12.3",
        "23457",
        "",
    )
    assert rows[1]["why"] == "the dense convolution would be faster: 9 us pruned, 8 us dense (cost model)"
    assert (rows[2]["us"], rows[2]["dense us"]) == ("-", "-")
    text = format_report(sites, plan, {}, [], times=times, kernels=kernels)
    assert "times of pruned and dense convolutions, in us: 1 measured, 1 table, 2 cost model" in text
    assert "kernel of wide: fused tiles=32" in text
    assert "speed not checked" not in text
    half = format_report(sites, plan, {}, [], times={"wide": times["wide"], "shared": SiteTimes(None, None)})
    assert "speed not checked for 1 layers" in half


def test_a_layer_left_dense_shows_both_times() -> None:
    site = ConvSite("a", 16, 16, (3, 3), (1, 1), (1, 1), True, 1)
    plan = PruningPlan(left_alone={"a": "the dense convolution is faster"})
    times = {"a": SiteTimes(Timing(2.0, MEASURED), Timing(1.5, MEASURED))}
    (row,) = (dict(zip(HEADER, row, strict=True)) for row in site_rows([site], plan, times))
    assert (row["decision"], row["us"], row["dense us"]) == ("left alone", "2.0", "1.5")
    assert row["why"] == "the dense convolution is faster"
