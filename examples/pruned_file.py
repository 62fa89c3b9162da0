"""A file format for fine-tuned networks that holds what is kept, not the zeros: safetensors of a packed state_dict.

For every pruned convolution at PATH the file has PATH.keep (bool) and PATH.kept, the weights where it is true, in
order; all other entries are those of the state_dict.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from examples import optional_module
from wsp_compiler import WinogradConv2d


def _layers(model: nn.Module) -> dict[str, WinogradConv2d]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, WinogradConv2d)}


def save_pruned(model: nn.Module, path: Path, metadata: dict[str, str] | None = None) -> int:
    """Write the state of a network that `wsp_compiler.prune` returned; returns the file's size in bytes."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    for name, layer in _layers(model).items():
        weight: Tensor = state.pop(f"{name}.weight")
        state[f"{name}.kept"] = weight[layer.keep.cpu().expand(weight.shape)]
    content: bytes = optional_module("safetensors.torch").save(state, metadata=metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return len(content)


def load_pruned_state(model: nn.Module, path: Path) -> nn.Module:
    """Give `model`, pruned in the same layers at any ratio, the weights and the `keep` of a file, in place.

    Raises:
        FileNotFoundError: no such file. ValueError: the file belongs to another network.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no fine-tuned network at {path}: examples/finetune_denoiser.py writes one")
    state: dict[str, Tensor] = optional_module("safetensors.torch").load_file(path)
    for name, layer in _layers(model).items():
        for part, why in (
            ("kept", "it belongs to another network"),
            ("scale", "it is from an older version"),
        ):
            if f"{name}.{part}" not in state:
                raise ValueError(f"{path} has no {name}.{part}: {why}")
        keep = state[f"{name}.keep"]
        weight = torch.zeros(layer.weight.shape)
        weight[keep.expand(weight.shape)] = state.pop(f"{name}.kept")
        state[f"{name}.weight"] = weight
        layer.keep = keep.to(layer.weight.device)
    try:
        model.load_state_dict(state)
    except RuntimeError as problem:
        raise ValueError(f"{path} belongs to another network: {problem}") from problem
    return model.eval()
