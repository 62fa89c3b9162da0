"""What is compiled for one shape, and what its rows say."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from torch import nn

from benchmarks import cases, conv_case
from benchmarks.conv_baselines import variants
from benchmarks.conv_case import DENSE_EPILOGUE, Options, candidates, run_case

TINY = cases.ConvCase("8@6", 8, 8, 6, 6, "tiny")
OPTIONS = Options("cpu", "fp32", (0.5,))


@pytest.fixture(autouse=True)
def _only_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other libraries have tests of their own."""

    def pytorch(*args: Any) -> list[Any]:
        return [variant for variant in variants(*args) if variant.baseline == "torch_fp32"]

    monkeypatch.setattr(conv_case, "variants", pytorch)


def test_candidates() -> None:
    both = dataclasses.replace(OPTIONS, pr=(0.0, 0.5), tile="auto", wsp=True, column=True)
    assert [(c.label, c.method, c.direction) for c in candidates(both) if c.tile == 4] == [
        ("ours pr=0 F4", "dense", "row"),
        ("ours pr=0.5 F4", "bwsp", "row"),
        ("wsp pr=0.5 F4", "wsp", "row"),
        ("column pr=0.5 F4", "bwsp", "column"),
    ]
    assert len(candidates(both)) == 8
    assert [c.label for c in candidates(OPTIONS)] == ["ours pr=0.5 F2"]


def test_a_row(fake_compile: Any) -> None:
    (row,) = run_case(TINY, 2, OPTIONS, fake_compile())
    formats = ["torch_fp32/contiguous", "torch_fp32/channels_last"]
    assert set(row["times_us"]) == {"ours pr=0.5 F2", DENSE_EPILOGUE, *formats}
    assert row["baselines_us"]["torch_fp32"] == min(row["times_us"][name] for name in formats) > 0
    assert row["strongest"] == "torch_fp32"
    assert row["strongest_ratio"] == pytest.approx(row["baselines_us"]["torch_fp32"] / row["ours_us"])
    assert row["a_plan_leaves_it_dense"] == (row["dense_epilogue_us"] < row["ours_us"])
    assert row["relative_error"] < 1e-5
    assert row["largest_error_over_rms"] < 8e-5
    assert (row["unavailable"], row["failure"], row["chosen_tile"]) == ({}, None, 2)


def test_a_candidate_that_fails_is_named_and_the_others_count(fake_compile: Any) -> None:
    right = fake_compile()

    def only_f4(model: nn.Module, **options: Any) -> Any:
        if options["tile"] == 2:
            raise RuntimeError("no kernel\nlong trace")
        return right(model, **options)

    (row,) = run_case(TINY, 1, dataclasses.replace(OPTIONS, tile="auto"), only_f4)
    assert row["unavailable"] == {"ours pr=0.5 F2": "RuntimeError: no kernel"}
    assert (row["chosen_tile"], list(row["tiles_us"])) == (4, ["F4"])
    (row,) = run_case(TINY, 1, OPTIONS, only_f4)
    assert row["failure"] == "RuntimeError: no kernel"


def test_one_pruning_ratio_may_fail(fake_compile: Any) -> None:
    right, wrong = fake_compile(), fake_compile(1.01)

    def wrong_at_zero(model: nn.Module, **options: Any) -> Any:
        return (right if options["pr"] else wrong)(model, **options)

    first, second = run_case(TINY, 1, dataclasses.replace(OPTIONS, pr=(0.0, 0.5)), wrong_at_zero)
    assert first["failure"].startswith("ArithmeticError: relative error 1.00e-02")
    assert second["failure"] is None
