import json
import subprocess
from pathlib import Path

import pytest

from benchmarks.results import (
    Record,
    environment,
    geomean,
    git_commit,
    load,
    minimum,
    new_record,
    own_version,
)


def test_geomean() -> None:
    assert geomean([2.0, 8.0]) == pytest.approx(4.0)
    with pytest.raises(ValueError, match="positive"):
        geomean([])
    with pytest.raises(ValueError, match="positive"):
        geomean([1.0, 0.0])


def test_minimum_names_where() -> None:
    assert minimum([("a", 2.0), ("b", 1.5)]) == ("b", 1.5)
    with pytest.raises(ValueError, match="at least one"):
        minimum([])


def test_environment_has_versions_and_cpu() -> None:
    found = environment("cpu")
    assert found["cpu_threads"] >= 1
    assert all(found[key] for key in ("device", "cpu", "torch", "tvm", "wsp_compiler", "onednn", "python"))


def test_record_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WSP_COMMIT", "abc")
    record = new_record("benchmarks.conv_layers", ["--cases", "64@56", "a b"], "cpu")
    record.rows.append({"name": "64@56 N=1", "ours_us": 1.5, "failure": None})
    path = tmp_path / "deep" / "record.json"
    record.save(path)
    record.save(path)
    assert load(path) == record
    assert record.command == "python -m benchmarks.conv_layers --cases 64@56 'a b'"
    assert record.commit == "abc"
    assert [found.name for found in path.parent.iterdir()] == ["record.json"]


def test_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record = Record("command", {}, "commit")
    record.save(path)
    record.rows.append({"ours_us": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        record.save(path)
    assert json.loads(path.read_text())["rows"] == []


def test_commit_outside_git_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WSP_COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit(tmp_path) == "unknown"


def test_commit_says_whether_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WSP_COMMIT", raising=False)

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    file = tmp_path / "file"
    file.write_text("one")
    git("init", "--quiet")
    git("add", "file")
    git("-c", "commit.gpgsign=false", "commit", "--quiet", "--no-verify", "-m", "one")
    clean = git_commit(tmp_path)
    assert len(clean) == 40
    (tmp_path / "untracked").write_text("not counted")
    assert git_commit(tmp_path) == clean
    file.write_text("two")
    assert git_commit(tmp_path) == f"{clean}-dirty"


def test_own_version_is_known_without_an_installation() -> None:
    assert own_version()[0].isdecimal()
