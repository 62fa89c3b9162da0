"""Searches of several processes: torchrun with two on the CPU (gloo), and on two GPUs (NCCL) where there are two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wsp_compiler
from tests.abwsp.problem import PATHS, PR, Fidelity, batches, net, options
from wsp_compiler.abwsp.ranks import Ranks, join

SCRIPT = Path(__file__).with_name("two_ranks.py")


def torchrun(folder: Path, kind: str) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        str(SCRIPT), str(folder), kind,
    ]  # fmt: skip
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def check(found: list[dict[str, Any]], device: str, tolerance: float) -> None:
    """Against a search in this process alone."""
    one, two = found
    alone = Fidelity(net())
    alone.x, alone.wanted = alone.x.to(device), alone.wanted.to(device)
    wanted = wsp_compiler.search(net().to(device), PR, alone, batches(), **options())
    for rank in found:
        plain = rank["plain"]
        assert plain["winners"] == [entry.methods for entry in wanted.winners]
        assert plain["accuracies"] == pytest.approx([e.accuracy for e in wanted.winners], abs=tolerance)
        assert plain["outlooks"] == pytest.approx([e.outlook for e in wanted.candidates], abs=tolerance)
        assert set(plain["winners"][0]) == set(PATHS)
        assert rank["initialised"]
        assert rank["loop"]["steps"] == [1, 2, 3, 4]
        assert rank["wrapped"]
    # the work was shared: candidates by both, dense model and winners by the first
    assert one["plain"]["evaluated"] + two["plain"]["evaluated"] == alone.calls
    assert 0 < two["plain"]["evaluated"] < one["plain"]["evaluated"]
    # data-parallel training leaves the same network everywhere
    assert one["loop"] == two["loop"]
    assert one["function"] == two["function"]
    assert one["state left by rank"] == [
        "bwsp.safetensors", "round-0.pt", "round-0.safetensors", "search.json", "wsp.safetensors"
    ]  # fmt: skip
    assert one["broken"].startswith("SearchError: rank 1: it failed with EvaluationError: eval_fn")
    assert two["broken"].startswith("EvaluationError: eval_fn: it raised RuntimeError")
    for rank in found:
        assert "ModelError: search: rank" in rank["different"]
        assert "differ in pr" in rank["different"]


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    check(torchrun(tmp_path, "cpu"), "cpu", 1e-6)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_find_what_one_finds(tmp_path: Path) -> None:
    check(torchrun(tmp_path, "cuda"), "cuda:0", 1e-2)  # decibels; sums in another order


def test_alone() -> None:
    with join(torch.device("cpu")) as ranks:
        assert ranks == Ranks(0, 1)
        assert ranks.all(lambda: 3) == [3]
        assert ranks.first(lambda: "x") == "x"
        linear = nn.Linear(2, 2)
        assert ranks.wrapped(linear) is linear
        ranks.synchronise(linear)
    with pytest.raises(ZeroDivisionError):
        ranks.all(lambda: 1 // 0)


def test_one_process_of_torchrun_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with join(torch.device("cpu")) as ranks:
        assert ranks.size == 1
