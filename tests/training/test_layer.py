"""WinogradConv2d: the pruned convolution, its gradients, and what PyTorch expects of a module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.reference import pruned_convolution, relative_error
from wsp_compiler.pruning.moments import white_gram
from wsp_compiler.training import layer as module_of_layer
from wsp_compiler.training.layer import WinogradConv2d, position_scale
from wsp_compiler.winograd import transform_weight


def layer(tile: int = 2, dtype: torch.dtype = torch.float64) -> tuple[nn.Conv2d, Tensor, WinogradConv2d]:
    conv = nn.Conv2d(3, 4, 3, padding=(1, 0)).to(dtype)
    U = transform_weight(conv.weight, tile).to(dtype)
    keep = torch.rand(len(U), 4, 1) < 0.5
    assert conv.bias is not None
    return conv, keep, WinogradConv2d(U, conv.bias, keep, (1, 0), tile)


@pytest.mark.parametrize("tile", [2, 4])
def test_computes_the_pruned_convolution(tile: int) -> None:
    conv, keep, module = layer(tile)
    x = torch.randn(2, 3, 7, 10, dtype=torch.float64)
    assert relative_error(module(x), pruned_convolution(x, conv, keep, tile)) < 1e-12
    assert torch.allclose(module.winograd_weight(), transform_weight(conv.weight, tile) * keep, atol=1e-15)


@pytest.mark.parametrize("tile", [2, 4])
def test_gradcheck(tile: int) -> None:
    _, _, module = layer(tile)
    x = torch.randn(1, 3, 5, 6, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, module.weight, module.bias), fast_mode=True)


def test_pruned_weights_stay_pruned() -> None:
    _, keep, module = layer(dtype=torch.float32)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randn(2, 3, 6, 6)).square().mean().backward()
        assert module.weight.grad is not None
        assert not bool(module.weight.grad[~keep.expand(16, 4, 3)].any())
        optimizer.step()
    assert not bool(module.winograd_weight()[~keep.expand(16, 4, 3)].any())
    assert not bool(module.weight[~keep.expand(16, 4, 3)].any())


def test_state_dict_copies_and_autocast() -> None:
    _, _, module = layer(dtype=torch.float32)
    _, _, other = layer(dtype=torch.float32)
    x = torch.randn(1, 3, 6, 6)
    assert list(module.state_dict()) == ["weight", "bias", "keep", "scale"]
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    with torch.autocast("cpu", torch.bfloat16):
        narrow = module(x)
    assert relative_error(narrow, module(x)) < 2e-2
    with pytest.raises(ValueError, match="does not belong to tile 4"):
        WinogradConv2d(
            torch.zeros(16, 4, 3), torch.zeros(4), torch.ones(1, 1, 1, dtype=torch.bool), (1, 1), 4
        )


@pytest.mark.parametrize(("tile", "low", "high"), [(2, 1, 2), (4, 8, 256)])
def test_position_scales_are_powers_of_two(tile: int, low: int, high: int) -> None:
    scale = position_scale(tile)
    assert torch.equal(torch.log2(scale), torch.log2(scale).round())
    assert (float(scale.min()), float(scale.max())) == (low, high)


def test_ties_are_the_same_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some positions of F(2x2, 3x3) reach by the square root of two: a last digit must not decide."""
    for relative in (-1e-12, 0.0, 1e-12):
        monkeypatch.setattr(
            module_of_layer, "white_gram", lambda tile, r=relative: white_gram(tile) * (1 + r)
        )
        line = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 1.0])
        assert torch.equal(position_scale(2).flatten(), torch.cat([line, line.flip(0)]).double())


def test_a_state_dict_brings_its_own_scale() -> None:
    _, _, trained = layer()
    trained.scale.mul_(4)
    _, _, other = layer()
    other.load_state_dict(trained.state_dict())
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    assert torch.equal(other(x), trained(x))


def test_torch_compile_sees_one_graph() -> None:
    _, _, module = layer(dtype=torch.float32)
    x = torch.randn(1, 3, 6, 6)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), module(x))
    compiled(x).sum().backward()
    assert module.weight.grad is not None
