"""Adaptive batch norm: what pruning has done to the inputs of batch norms is put right without training.

Li et al. 2020 (EagleEye), as used by the ABWSP paper, section 4.3: run the pruned network forward, batch norms in train
mode, and let them take the statistics of what they see. Here they do not take them as they are: the model's own
statistics are changed as those of the data have changed between the dense and the pruned network. With many data both
are the same, with few this says much more, and data of another kind than the model was trained on do no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wsp_compiler.activations import device_and_dtype, run_call
from wsp_compiler.clone import named_modules
from wsp_compiler.errors import InputError
from wsp_compiler.refits import NormStatistics
from wsp_compiler.trace import Call

Moments = dict[str, tuple[Tensor, Tensor]]
"""Batch norm's path -> (mean, variance) of its inputs, float64 [channels] each, on the CPU."""


def norms_of(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """The batch norms that have statistics of their own, by path."""
    found = {path: norm for path, norm in named_modules(model) if type(norm) is nn.BatchNorm2d}
    return {path: norm for path, norm in found.items() if norm.running_var is not None}


def input_moments(model: nn.Module, calls: Sequence[Call]) -> Moments:
    """Mean and variance of every batch norm's input on ``calls``, all batch norms using their batch's statistics.

    Args:
        model: in eval mode, as it is again afterwards; nothing in it changes.
        calls: see :func:`wsp_compiler.batches.calibration_calls`; a batch needs more than one value per channel.

    Raises:
        InputError: the model fails on a batch, or an activation is NaN or infinite.
    """
    norms = norms_of(model)
    if not norms:
        return {}
    sums: dict[str, Tensor] = {}
    device, dtype = device_and_dtype(model)
    restore = {path: (norm.momentum, norm.num_batches_tracked) for path, norm in norms.items()}
    handles: list[Any] = []
    try:
        for path, norm in norms.items():
            norm.train()
            norm.momentum = 0.0  # the running statistics stay as they are
            norm.num_batches_tracked = None
            handles.append(norm.register_forward_pre_hook(_recorder(path, sums)))
        for index, call in enumerate(calls):
            run_call(model, call, device, dtype, index)
    finally:
        for handle in handles:
            handle.remove()
        for path, norm in norms.items():
            norm.eval()
            norm.momentum, norm.num_batches_tracked = restore[path]
    return {path: _moments(path, total) for path, total in sums.items()}


def _recorder(path: str, sums: dict[str, Tensor]) -> Callable[..., None]:
    """A hook that adds up [count, count * mean, count * mean square] of a batch norm's inputs."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0].detach().float()
        variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        variance, mean = variance.double(), mean.double()
        count = float(x[:, 0].numel())
        found = torch.stack((torch.ones_like(mean), mean, variance + mean.square())) * count
        sums[path] = sums[path] + found if path in sums else found

    return hook


def _moments(path: str, total: Tensor) -> tuple[Tensor, Tensor]:
    mean = total[1] / total[0]
    variance = (total[2] / total[0] - mean.square()).clamp_min(0)
    if not bool(torch.isfinite(total).all()):
        raise InputError(
            "its input is NaN or infinite on the calibration data",
            where=path or "the model itself",
            fix="check the data and the model, for instance for overflow in float16",
        )
    return mean.cpu(), variance.cpu()


def adapt_norms(model: nn.Module, dense: Moments, calls: Sequence[Call]) -> dict[str, NormStatistics]:
    """Re-estimate the batch-norm statistics of a pruned model, in place.

    Args:
        model: what :func:`wsp_compiler.prune` returned, in eval mode, with the dense model's own statistics.
        dense: :func:`input_moments` of the dense model on the same calls.
        calls: calibration inputs.

    Returns:
        The new statistics, by path, as a plan holds them.

    Raises:
        InputError: as :func:`input_moments`.
    """
    found: dict[str, NormStatistics] = {}
    norms = norms_of(model)
    for path, (mean, variance) in input_moments(model, calls).items():
        if path not in dense:  # the model takes another way than the dense one
            continue
        own_mean, own_variance = norms[path].running_mean, norms[path].running_var
        assert own_mean is not None
        assert own_variance is not None
        dense_mean, dense_variance = dense[path]
        live = dense_variance > 1e-12
        ratio = torch.where(live, variance / torch.where(live, dense_variance, 1.0), 1.0)
        scale = ratio.sqrt()
        own_mean.copy_(own_mean.cpu().double() * scale + (mean - dense_mean * scale))
        own_variance.copy_(own_variance.cpu().double() * ratio)
        found[path] = NormStatistics(
            own_mean.detach().to("cpu", torch.float32, copy=True),
            own_variance.detach().to("cpu", torch.float32, copy=True),
        )
    return found
