from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cases, conv_case
from benchmarks.conv_baselines import variants
from benchmarks.conv_layers import main, sweep_line
from benchmarks.results import load

TINY = cases.ConvCase("8@6", 8, 8, 6, 6, "tiny")
RUN = ["--device", "cpu", "--cases", "8@6", "--batch", "1", "3"]


@pytest.fixture(autouse=True)
def _tiny_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def pytorch(*args: Any) -> list[Any]:  # other libraries have tests of their own
        return [variant for variant in variants(*args) if variant.baseline == "torch_fp32"]

    monkeypatch.setattr(conv_case, "variants", pytorch)
    monkeypatch.setitem(cases.CASES, TINY.name, TINY)


def test_end_to_end(fake_compile: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, options = tmp_path / "record.json", []
    assert main([*RUN, "--pr", "0.5", "--tile", "2", "--json", str(file)], fake_compile(1.0, options)) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[-2].startswith("geomean ")
    assert lines[-1].startswith("minimum ")
    assert any(line.startswith("N=1 pr=0.5 vs torch_fp32: geomean") for line in lines)
    assert "8@6 N=3" in err
    assert [option["pr"] for option in options] == [0.5, 0.5]
    assert options[0]["method"] == "bwsp"
    assert options[0]["precision"] is None
    assert options[0]["keep_slower"] is True
    rows = load(file).rows
    assert [row["name"] for row in rows] == ["8@6 N=1", "8@6 N=3"]
    assert all(row["report"] == "fake report" for row in rows)


def test_a_sweep_with_variants(fake_compile: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, options = tmp_path / "record.json", []
    extra = ["--pr", "0", "0.5", "--wsp", "--column", "--tune", "fast"]
    assert main([*RUN[:-1], *extra, "--json", str(file)], fake_compile(1.0, options)) == 0
    assert [(o["method"], o["direction"], o["tile"]) for o in options] == [
        ("dense", "row", 2), ("dense", "row", 4), ("bwsp", "row", 2), ("bwsp", "row", 4),
        ("wsp", "row", 2), ("wsp", "row", 4), ("bwsp", "column", 2), ("bwsp", "column", 4),
    ]  # fmt: skip
    assert {o["tune"] for o in options} == {"fast"}
    rows = load(file).rows
    assert [row["name"] for row in rows] == ["8@6 N=1 pr=0", "8@6 N=1 pr=0.5"]
    assert rows[1]["wsp_over_ours"] == pytest.approx(rows[1]["wsp_us"] / rows[1]["ours_us"])
    assert "wsp_us" not in rows[0]
    out = capsys.readouterr().out
    assert "N=1 pr=0.5 wsp takes " in out
    assert "N=1 pr=0.5 column takes " in out


def test_a_spent_budget_ends_the_run_with_what_there_is(
    fake_compile: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "record.json"
    assert main([*RUN, "--budget", "1e-9", "--json", str(file)], fake_compile()) == 0
    assert "2 cases were not started" in capsys.readouterr().out


def test_a_wrong_result_fails_and_the_run_goes_on(
    fake_compile: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "record.json"
    assert main([*RUN, "--json", str(file)], fake_compile(1.01)) == 1
    out = capsys.readouterr().out
    assert "FAILED 8@6 N=1: ArithmeticError: relative error" in out
    assert out.splitlines()[-2:] == ["geomean - (none of 1 cases succeeded)", "minimum -"]
    assert len(load(file).rows) == 2


def test_one_failing_case_does_not_end_the_others(
    fake_compile: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    right: Callable[..., Any] = fake_compile()

    def fails_at_batch_1(model: Any, **options: Any) -> Any:
        if options["example_inputs"][0].shape[0] == 1:
            raise RuntimeError("no kernel for this shape")
        return right(model, **options)

    assert main(RUN, fails_at_batch_1) == 1
    out = capsys.readouterr().out
    assert "FAILED 8@6 N=1: RuntimeError: no kernel for this shape" in out
    assert "N>1 pr=0.8 (1 of 1 cases)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--cases", "alexnet"],
            "unknown case 'alexnet'; known: resnet18, vgg16, eight, superres, networks, twelve",
        ),
        (["--pr", "80"], "'80' is not a fraction in [0, 1)"),
        (["--batch", "0"], "'0' is not a positive integer"),
        (["--device", "cpu", "--dtype", "fp16"], "--dtype fp16 is not timed on --device cpu"),
        (["--tile", "3"], "invalid choice"),
    ],
)
def test_wrong_arguments_say_what_is_known(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_sweep_line_names_the_largest_rise() -> None:
    def row(pr: float, us: float, case: str = "a") -> dict[str, Any]:
        return {"case": case, "batch": 1, "pr": pr, "ours_us": us, "failure": None}

    rows = [row(0.5, 8.0), row(0.0, 10.0), row(0.9, 8.4), row(0.0, 1.0, "b"), row(0.5, 0.9, "b")]
    assert sweep_line(rows) == "sweep: our time rises by at most 5.0% (a N=1, pr 0.5 to 0.9)"
    assert sweep_line([row(0.5, 8.0), {"failure": "why"}]) is None
