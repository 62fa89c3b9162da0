"""Packed files of fine-tuned networks: everything comes back, nothing pruned is stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import wsp_compiler
from examples.pruned_file import load_pruned_state, save_pruned


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 3)
    ).eval()


@pytest.mark.parametrize("method", ["wsp", "bwsp", "fp"])
def test_everything_comes_back(tmp_path: Path, method: str) -> None:
    model = wsp_compiler.prune(network(), 0.75, method=method, importance="l2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for layer in (model[0], model[3]):
            layer.weight.mul_(layer.keep)
    x = torch.randn(2, 16, 9, 9)
    path = tmp_path / "new" / "a.safetensors"
    size = save_pruned(model, path, {"pr": "0.75"})
    assert size == path.stat().st_size < 0.4 * 4 * sum(value.numel() for value in model.parameters())
    other = wsp_compiler.prune(network(), 0.2, method="wsp", importance="l2")
    load_pruned_state(other, path)
    assert torch.equal(other(x), model(x))
    assert torch.equal(other[0].keep, model[0].keep)


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    model = wsp_compiler.prune(network(), 0.5)
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match="finetune_denoiser"):
        load_pruned_state(model, path)
    save_pruned(model, path)
    state = safetensors.torch.load_file(path)
    del state["0.scale"]
    safetensors.torch.save_file(state, tmp_path / "old.safetensors")
    with pytest.raises(ValueError, match=r"no 0\.scale: it is from an older version"):
        load_pruned_state(model, tmp_path / "old.safetensors")
    longer = nn.Sequential(*network(), nn.Conv2d(16, 16, 3)).eval()
    with pytest.raises(ValueError, match=r"no 4\.kept: it belongs to another network"):
        load_pruned_state(wsp_compiler.prune(longer, 0.5), path)
    with pytest.raises(ValueError, match="belongs to another network"):
        load_pruned_state(nn.Sequential(nn.Linear(2, 2)), path)
