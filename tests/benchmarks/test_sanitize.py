"""The sanitizer's command and what counts as clean; the tools themselves need a GPU."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from benchmarks import sanitize


def test_families_cover_every_precision_tile_and_format() -> None:
    found = sanitize.families()
    assert {(f.precision, f.tile) for f in found} == {
        (p, t) for p in ("fp16", "bf16", "tf32", "fp32") for t in (2, 4)
    }
    assert {f.channels_last for f in found} == {True, False}
    assert {f.direction for f in found} == {"row", "column"}
    assert len({f.name for f in found}) == len(found)


def test_every_family_is_in_one_share(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize, "run_family", lambda family: "winograd_fused")
    monkeypatch.setattr(sanitize.torch.backends.cudnn, "enabled", True)
    for number in range(sanitize.SHARES):
        sanitize.run_share(number)
    ran = [name for line in capsys.readouterr().out.splitlines() for name in json.loads(line)]
    assert sorted(ran) == sorted(family.name for family in sanitize.families())


CLEAN = "========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    ("output", "clean"),
    [
        (CLEAN + "{}", True),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n{}", True),
        ("========= Invalid read in winograd_fused_kernel\n========= ERROR SUMMARY: 2 errors\n{}", False),
        ("========= Race in cudnn_conv\n========= RACECHECK SUMMARY: 1 hazard displayed\n{}", False),
        (CLEAN, False),
        ("{}", False),
    ],
)
def test_clean_means_a_summary_without_findings(
    monkeypatch: pytest.MonkeyPatch, output: str, clean: bool
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:3] == ["compute-sanitizer", "--tool", "memcheck"]
        assert "kns=winograd_fused" in command
        lines = [
            json.dumps({f.name: "winograd_fused"})
            for f in sanitize.families()[int(command[-1]) :: sanitize.SHARES]
        ]
        text = output.replace("{}", "\n".join(lines))
        return subprocess.CompletedProcess(command, 0, text, "")

    monkeypatch.setattr(subprocess, "run", run)
    row = sanitize.sanitize("memcheck", "  --kernel-name arg  which kernels")
    assert (row["failure"] is None) == clean
    assert len(row["families"]) == (len(sanitize.families()) if "{}" in output else 0)


def test_a_wrong_result_is_not_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    text = CLEAN + "\n".join(json.dumps({f.name: "failed: error 0.5"}) for f in sanitize.families())
    done = subprocess.CompletedProcess([], 0, text, "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert "error 0.5" in sanitize.sanitize("memcheck", "")["failure"]


def test_a_family_that_did_not_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, CLEAN, "died")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    failure = sanitize.sanitize("memcheck", "")["failure"]
    assert all(f"{family.name}: did not run" in failure for family in sanitize.families())


def test_without_a_gpu_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        sanitize.main([])
    assert "compute-sanitizer" in capsys.readouterr().err
