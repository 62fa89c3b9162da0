from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cases
from benchmarks.conv_layers import main
from benchmarks.results import load

TINY = cases.ConvCase("8@6", 8, 8, 6, 6, "tiny")
RUN = ["--device", "cpu", "--cases", "8@6", "--batch", "1", "3"]


@pytest.fixture(autouse=True)
def _tiny_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.CASES, TINY.name, TINY)


def test_end_to_end(fake_compile: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, options = tmp_path / "record.json", []
    assert main([*RUN, "--pr", "0.5", "--json", str(file)], fake_compile(1.0, options)) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[-2].startswith("geomean ")
    assert lines[-1].startswith("minimum ")
    assert any(line.startswith("vs torch_fp32: geomean") for line in lines)
    assert "8@6 N=3" in err
    assert [option["pr"] for option in options] == [0.5, 0.5]
    assert options[0]["method"] == "bwsp"
    assert options[0]["precision"] is None

    rows = load(file).rows
    assert [row["name"] for row in rows] == ["8@6 N=1", "8@6 N=3"]
    for row in rows:
        assert set(row["times_us"]) == {"ours", "torch_fp32/contiguous", "torch_fp32/channels_last"}
        formats = [us for label, us in row["times_us"].items() if label != "ours"]
        assert row["baselines_us"]["torch_fp32"] == min(formats) > 0
        assert row["strongest"] == "torch_fp32"
        assert row["strongest_ratio"] == pytest.approx(min(formats) / row["ours_us"])
        assert row["relative_error"] < 1e-5
        assert row["report"] == "fake report"
        assert row["unavailable"] == {}


def test_a_wrong_result_fails_and_the_run_goes_on(
    fake_compile: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "record.json"
    assert main([*RUN, "--json", str(file)], fake_compile(1.01)) == 1
    out = capsys.readouterr().out
    assert "FAILED 8@6 N=1: ArithmeticError: relative error" in out
    assert out.splitlines()[-2:] == ["geomean - (none of 2 cases succeeded)", "minimum -"]
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
    assert "(1 of 2 cases)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "alexnet"], "unknown case 'alexnet'; known: resnet18, vgg16, superres, twelve"),
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
