"""Makes `benchmarks`, which is not installed, importable; gives the fakes that several files use."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)


class FakeCompiled(nn.Module):
    """Stands for a compiled model: runs a copy of the model, scaled."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.graph_module = copy.deepcopy(model)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.graph_module(x) * self.scale

    def report(self) -> str:
        return "fake report"


@pytest.fixture
def fake_compile() -> Callable[..., Callable[..., FakeCompiled]]:
    """`fake_compile(scale, calls)` -> a compile function; scale 1 computes the right result."""

    def make(scale: float = 1.0, calls: list[dict[str, object]] | None = None) -> Callable[..., FakeCompiled]:
        def compile_function(model: nn.Module, **options: object) -> FakeCompiled:
            if calls is not None:
                calls.append(options)
            return FakeCompiled(model, scale)

        return compile_function

    return make


@pytest.fixture(autouse=True)
def _process_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread and short groups keep timings quick on a busy machine; what `prepare` sets is undone."""
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    monkeypatch.setattr("benchmarks.timing.CPU_PAUSE_SECONDS", 1e-4)
    monkeypatch.setattr("benchmarks.timing.CPU_GROUP_SECONDS", 5e-4)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
