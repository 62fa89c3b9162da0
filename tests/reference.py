"""The truth that tests compare with, computed in float64 and apart from the package's own operators."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from wsp_compiler.winograd import transform, transform_weight

TOLERANCE = {("fp32", 2): 1e-5, ("fp32", 4): 1e-4, ("bf16", 2): 2e-2, ("bf16", 4): 1e-1}
"""(arithmetic, output tile side) -> relative L2 error that is allowed."""


def pruned_convolution(x: Tensor, conv: nn.Conv2d, keep: Tensor, tile: int) -> Tensor:
    """The float64 output of ``conv`` with those Winograd weights that ``keep`` ([p*p, n, c]) keeps.

    Args:
        x: [N, c, H, W].
        conv: 3x3, stride 1.
        keep: bool, broadcastable to [p*p, n, c].
        tile: output tile side m.
    """
    matrices = transform(tile)
    AT, BT = matrices.tensor("AT", torch.float64), matrices.tensor("BT", torch.float64)  # [m, p], [p, p]
    p, padding = tile + 2, (1, 1) if conv.padding == "same" else conv.padding
    batch, channels, height, width = x.shape
    size = [height + 2 * int(padding[0]) - 2, width + 2 * int(padding[1]) - 2]
    tiles = [-(-extent // tile) for extent in size]
    padded = torch.zeros(batch, channels, height + 2 * p + 9, width + 2 * p + 9, dtype=torch.float64)
    padded[:, :, int(padding[0]) :, int(padding[1]) :][:, :, :height, :width] = x.double()
    U = transform_weight(conv.weight, tile) * keep  # [p*p, n, c]
    y = torch.zeros(batch, conv.out_channels, tiles[0] * tile, tiles[1] * tile, dtype=torch.float64)
    for i in range(tiles[0]):
        for j in range(tiles[1]):
            rows, columns = slice(i * tile, i * tile + p), slice(j * tile, j * tile + p)
            V = torch.einsum("ah,Nchw,bw->abcN", BT, padded[:, :, rows, columns], BT)
            M = torch.einsum("knc,kcN->knN", U, V.reshape(p * p, channels, batch))
            y[:, :, i * tile : (i + 1) * tile, j * tile : (j + 1) * tile] = torch.einsum(
                "ia,abnN,jb->Nnij", AT, M.reshape(p, p, conv.out_channels, batch), AT
            )
    y = y[:, :, : size[0], : size[1]]
    return (y if conv.bias is None else y + conv.bias.double().view(1, -1, 1, 1)).detach()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 distance in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Shape, finite in every element, relative L2, and no single element far off.

    The last is what a wrong border would break: max|error| < 8 * tolerance * rms(expected).
    """
    assert actual.shape == expected.shape
    assert bool(torch.isfinite(actual).all())
    if not expected.numel():
        return
    expected = expected.double()
    assert relative_error(actual, expected) < tolerance
    rms = float(expected.square().mean().sqrt())
    assert float((actual.double() - expected).abs().max()) < 8 * tolerance * rms


def randomise(model: nn.Module, x: Tensor) -> nn.Module:
    """``model`` in eval mode, with batch norm as if trained on inputs like ``x``, so that outputs differ."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.7, 1.3)
        nn.init.normal_(norm.bias, 0.0, 0.1)
        norm.momentum = 1.0
    if norms:
        with torch.no_grad():
            model.train()(x)
    for norm in norms:
        norm.momentum = 0.1
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.mul_(torch.empty_like(norm.running_mean).uniform_(0.8, 1.2))
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.8, 1.2)).clamp_(min=1e-3)
    return model.eval()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything in the model's state_dict."""
    return copy.deepcopy(model.state_dict())


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    """The model's tensors are bitwise those of ``before``; it is in eval mode and has no hooks."""
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    for module in model.modules():
        assert not module.training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
