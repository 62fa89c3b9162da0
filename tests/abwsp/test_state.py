"""The state on disk: what is written comes back, in one step, and only for the same search."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from wsp_compiler.abwsp import state as state_module
from wsp_compiler.abwsp.choices import LayerPair
from wsp_compiler.abwsp.state import Round, SearchState, StateFolder, digest
from wsp_compiler.errors import SearchError
from wsp_compiler.plan import PruningPlan
from wsp_compiler.refits import NormStatistics

SETTINGS = {"pr": 0.8, "alpha": 30.0, "finetune": {"steps": 3}}


def filled() -> SearchState:
    return SearchState(
        dict(SETTINGS), {"a.b": LayerPair(1 / 3, 0.1)}, 0.7, {"01": 0.1 + 0.2, "10": -1e-30}, {"01": 0, "10": 1},
        [Round("01", 2 / 3)],
    )  # fmt: skip


def test_json_is_exact() -> None:
    assert SearchState.from_json(filled().to_json()) == filled()


def test_a_search_finds_its_own_state(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "deep" / "down")
    assert folder.load(SETTINGS) is None
    folder.save(filled())
    assert StateFolder(tmp_path / "deep" / "down").load(SETTINGS) == filled()
    with pytest.raises(SearchError, match=r"another search: pr 0\.8 -> 0\.7, seed None -> 1"):
        folder.load({**SETTINGS, "pr": 0.7, "seed": 1})


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": 7}', '{"version": 1}'])
def test_a_damaged_state_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "search.json").write_text(text)
    with pytest.raises(SearchError, match="cannot be read as a search's state"):
        StateFolder(tmp_path).load(SETTINGS)


def test_the_state_of_an_older_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text(filled().to_json().replace('"version": 2', '"version": 1'))
    with pytest.raises(SearchError, match="version 1, this package reads 2"):
        StateFolder(tmp_path).load(filled().settings)


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SearchError, match="cannot be read"):
        StateFolder(tmp_path / "file").load(SETTINGS)


def test_writing_takes_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that is cut off leaves what was there."""
    folder = StateFolder(tmp_path)
    folder.save(filled())

    def cut(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(state_module.os, "fsync", cut)
    changed = filled()
    changed.outlooks["11"], changed.sampled["11"] = 1.0, 1
    with pytest.raises(KeyboardInterrupt):
        folder.save(changed)
    assert folder.load(SETTINGS) == filled()


def test_networks(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    plan = PruningPlan(norms={"n": NormStatistics(torch.rand(2), torch.rand(2))})
    linear = nn.Linear(3, 2)
    for index in (0, 1):
        folder.save_network(index, plan, linear)
    checkpoint = folder.checkpoint(1, 2)
    assert checkpoint is not None
    checkpoint.write_bytes(b"x")
    folder.drop_networks(keep=1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["round-1.pt", "round-1.safetensors"]
    assert folder.load_plan("round-1") == plan
    other = nn.Linear(3, 2)
    folder.load_weights(1, other)
    assert torch.equal(other.weight, linear.weight)


def test_without_a_folder_nothing_is_kept() -> None:
    folder = StateFolder(None)
    folder.save(filled())
    folder.save_network(0, PruningPlan(), nn.Linear(1, 1))
    folder.drop_networks(keep=0)
    assert folder.load(SETTINGS) is None
    assert folder.checkpoint(0, 1) is None


def test_the_digest_sees_values_names_and_types() -> None:
    linear = nn.Linear(3, 2)
    found = {
        digest(linear),
        digest(nn.Sequential(linear)),
        digest(nn.Linear(3, 2)),
        digest(linear.bfloat16()),
    }
    assert len(found) == 4
    assert digest(linear) == digest(linear)
