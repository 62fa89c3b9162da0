from pathlib import Path
from typing import Any

import pytest
from torch import nn

from benchmarks import networks
from benchmarks.network_models import NETWORKS
from benchmarks.results import load

RUN = ["--device", "cpu", "--networks", "tiny", "--size", "12"]


@pytest.fixture(autouse=True)
def _tiny_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())

    monkeypatch.setitem(NETWORKS, "tiny", tiny)


def test_end_to_end(
    fake_compile: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(networks, "compile_inductor", lambda model, x, mode: model)
    file, options = tmp_path / "record.json", []
    assert networks.main([*RUN, "--json", str(file)], fake_compile(1.0, options)) == 0
    assert [(option["pr"], option["method"]) for option in options] == [(0.0, "dense"), (0.8, "bwsp")]
    rows = load(file).rows
    assert [row["name"] for row in rows] == ["tiny N=1 pr=0 eager", "tiny N=1 pr=0.8 eager"]
    assert rows[0]["relative_error"] < 1e-5
    assert rows[1]["relative_error"] is None
    assert all(set(row["ratios"]) == {"eager", "torch_compile"} for row in rows)
    assert all(row["strongest_ratio"] == min(row["ratios"].values()) for row in rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("geomean ")
    assert "at pr=0.8 (1 of 1 cases)" in lines[-2]
    assert lines[-1].startswith("minimum ")


def test_a_failing_torch_compile_is_skipped_with_its_reason(
    fake_compile: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(model: nn.Module, x: Any, mode: str) -> None:
        raise RuntimeError("no C++ compiler\nlong trace")

    monkeypatch.setattr(networks, "compile_inductor", fail)
    file = tmp_path / "record.json"
    assert networks.main([*RUN, "--json", str(file)], fake_compile()) == 0
    reason = "torch.compile failed: RuntimeError: no C++ compiler"
    assert f"torch_compile skipped for tiny N=1: {reason}" in capsys.readouterr().out
    rows = load(file).rows
    assert all(row["torch_compile_skipped"] == reason for row in rows)
    assert all(set(row["ratios"]) == {"eager"} for row in rows)


def test_a_failing_compile_is_a_failed_row(fake_compile: Any, capsys: pytest.CaptureFixture[str]) -> None:
    right = fake_compile()

    def fails_when_pruned(model: nn.Module, **options: Any) -> Any:
        if options["pr"]:
            raise RuntimeError("cannot prune")
        return right(model, **options)

    assert networks.main([*RUN, "--no-torch-compile"], fails_when_pruned) == 1
    out = capsys.readouterr().out
    assert "FAILED tiny N=1 pr=0.8 eager: RuntimeError: cannot prune" in out
    assert out.splitlines()[-1] == "minimum -"


def test_a_network_that_cannot_be_built_is_failed_rows(
    fake_compile: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> nn.Module:
        raise RuntimeError("no such layer")

    monkeypatch.setitem(NETWORKS, "broken", broken)
    arguments = [*RUN, "--networks", "broken", "tiny", "--pr", "0.8", "--no-torch-compile"]
    assert networks.main(arguments, fake_compile()) == 1
    out = capsys.readouterr().out
    assert "FAILED broken N=1 pr=0.8 eager: RuntimeError: no such layer" in out
    assert "(1 of 2 cases)" in out


def test_unknown_network_lists_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        networks.main(["--networks", "resnet19"])
    assert "unknown network 'resnet19'; known: resnet18" in capsys.readouterr().err


def test_the_faster_rest_counts() -> None:
    def row(rest: str, us: float, failure: str | None = None) -> dict[str, Any]:
        about = {"network": "tiny", "batch": 1, "pr": 0.8, "rest": rest}
        return (
            {**about, "ours_us": us, "failure": failure} if failure is None else {**about, "failure": failure}
        )

    fast, slow, failed = row("inductor", 1.0), row("eager", 2.0), row("inductor", 0.0, "no compiler")
    assert networks.best_rest([slow, fast]) == [fast]
    assert networks.best_rest([failed, slow]) == [slow]
    assert networks.best_rest([slow, failed]) == [slow]
