"""Calibration: choose and refit the kept Winograd weights on sample inputs, layer by layer, without labels.

Layers are taken in the order in which the model calls them. A layer sees what the network that is already
pruned up to there sends it, and is fitted to what the dense network returns there. Batch norms that do not
follow a refitted layer directly get the statistics that make up for how their input has changed.

Memory: one layer's moments, 4 (p*p*c)^2 bytes and a few times 4 n p*p*c (c = 512, F(2x2): 0.27 GB and 8 x 17 MB),
one batch's activations, the inputs, and at most :data:`wsp_compiler.frontier.KEPT_BYTES` of activations between layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from wsp_compiler.activations import Networks, Replay
from wsp_compiler.clone import named_modules
from wsp_compiler.errors import PlanError
from wsp_compiler.frontier import Frontier
from wsp_compiler.plan import PruningPlan, SitePlan, choose_keep
from wsp_compiler.pruning.moments import Moments, MomentsBuilder
from wsp_compiler.pruning.output_aware import MeasuredEnergy
from wsp_compiler.pruning.refit import refit
from wsp_compiler.pruning.refit_filters import refit_filters
from wsp_compiler.refits import NormStatistics, SiteRefit
from wsp_compiler.sites import padding_of
from wsp_compiler.trace import Call, TracedModel
from wsp_compiler.winograd import transform_weight
from wsp_compiler.winograd_conv import tile_filters, winograd_convolution


def calibrate(
    traced: TracedModel,
    plan: PruningPlan,
    calls: Sequence[Call],
    *,
    choose: bool = True,
    settled: Collection[str] = (),
    on_step: Callable[[str], None] | None = None,
) -> PruningPlan:
    """A plan with chosen and refitted weights, from sample inputs.

    Args:
        traced: a model in eval mode, its graphs before any pass; not modified. It is run where its tensors are.
        plan: which convolutions are pruned, how, and how far. It is not modified.
        calls: the inputs, see :func:`wsp_compiler.batches.calibration_calls`.
        choose: choose ``keep`` anew by measured energy; False keeps the plan's.
        settled: paths that keep the plan's in any case: filters that were chosen together.
        on_step: called with the module's path after every batch of every module.

    Returns:
        The plan with new ``keep``, ``refits``, ``norms`` and ``errors``. What prunes nothing is not refitted.

    Raises:
        InputError: the model fails on the inputs, or an activation is not finite.
    """
    result = replace(
        plan,
        sites=dict(plan.sites),
        refits=dict(plan.refits),
        norms=dict(plan.norms),
        errors=dict(plan.errors),
    )
    with exact_float32(), torch.no_grad():
        networks = networks_of(traced, calls)
        for path, is_convolution in networks.order(plan):
            step = partial(on_step, path) if on_step is not None else _nothing
            if not is_convolution:
                result.norms[path] = norm_statistics(networks, path, step)
                continue
            conv = networks.module(path, pruned=False)
            assert isinstance(conv, nn.Conv2d)
            entry, fitted, error = fit_site(networks, conv, plan[path], choose and path not in settled, step)
            result.sites[path], result.refits[path], result.errors[path] = entry, fitted, error
            use_weights(networks.module(path, pruned=True), *result.weights(path, conv), entry.tile)
    return result


def networks_of(traced: TracedModel, calls: Sequence[Call]) -> Networks:
    """The dense and the pruned network on the inputs."""
    if set(traced.units) == {""}:
        return Frontier(traced.units[""], traced.calls[""], calls)
    return Replay(traced.model, calls)


def _nothing() -> None:
    pass


def site_moments(
    networks: Networks, conv: nn.Conv2d, path: str, tile: int, step: Callable[[], None] = _nothing
) -> Moments:
    """Moments of a convolution's input in the pruned network and its output in the dense one."""
    builder = MomentsBuilder(conv.in_channels, conv.out_channels, tile, padding_of(conv), conv.weight.device)
    for index in range(networks.batches):
        wanted = networks.capture(path, index, pruned=False, output=True)
        builder.add(networks.capture(path, index, pruned=True, output=False), wanted)
        step()
    return builder.build()


def fit_site(
    networks: Networks, conv: nn.Conv2d, entry: SitePlan, choose: bool, step: Callable[[], None]
) -> tuple[SitePlan, SiteRefit, float]:
    """(plan with the chosen keep, refitted weights, relative output error) of one convolution."""
    moments = site_moments(networks, conv, entry.path, entry.tile, step)
    U = transform_weight(conv.weight, entry.tile)  # [p*p, n, c]
    if choose:
        entry = choose_keep(entry, U.float(), MeasuredEnergy(moments))
    fitted = (refit if entry.winograd else refit_filters)(moments, U, entry.keep)
    return entry, SiteRefit.pack(fitted.U, fitted.bias, entry.keep, fitted.steps), fitted.error


def use_weights(conv: nn.Module, U: Tensor, bias: Tensor | None, tile: int) -> None:
    """Let a clone's convolution compute with Winograd weights U [p*p, n, c] from now on, in float32."""
    assert isinstance(conv, nn.Conv2d)
    W, padding = tile_filters(U, tile).float(), padding_of(conv)

    def forward(input: Tensor) -> Tensor:
        return winograd_convolution(input.float(), W, bias, padding, tile).to(input.dtype)

    conv.__dict__["forward"] = forward


def norm_statistics(networks: Networks, path: str, step: Callable[[], None]) -> NormStatistics:
    """Statistics under which a batch norm's output has the mean and variance it had, set in the pruned network.

    The model's own statistics are changed by how the input's have changed on the calibration data, rather than
    replaced by the data's: few samples say that much better.
    """
    norm = networks.module(path, pruned=True)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    sums = torch.zeros((2, 3, norm.num_features), dtype=torch.float64, device=norm.running_mean.device)
    for index in range(networks.batches):
        for which in (0, 1):
            x = networks.capture(path, index, pruned=bool(which), output=False).double()
            sums[which] += torch.stack(
                (x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), torch.full_like(x[0, :, 0, 0], x[:, 0].numel()))
            )
        step()
    means = sums[:, 0] / sums[:, 2]  # [2, channels]
    variances = (sums[:, 1] / sums[:, 2] - means.square()).clamp_min(0)
    ratio = torch.where(variances[0] > 1e-12, variances[1] / variances[0].clamp_min(1e-12), 1.0)
    mean = means[1] + (norm.running_mean.double() - means[0]) * ratio.sqrt()
    found = NormStatistics(mean.float().cpu(), (norm.running_var.double() * ratio).float().cpu())
    set_statistics(norm, found)
    return found


def set_statistics(norm: nn.BatchNorm2d, statistics: NormStatistics) -> None:
    """Give a clone's batch norm other statistics; the tensors that it had stay as they are."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean = statistics.mean.to(norm.running_mean)
    norm.running_var = statistics.variance.to(norm.running_var)


@contextlib.contextmanager
def exact_float32() -> Generator[None]:
    """Full float32 products on CUDA: TF32's ten bits are too few for second moments."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def apply_norms(module: nn.Module, model: nn.Module, plan: PruningPlan) -> None:
    """Give the plan's batch-norm statistics to clones, in ``module``, of ``model``'s batch norms.

    Raises:
        PlanError: the model has no such batch norm.
    """
    known: dict[int, NormStatistics] = {}
    norms = {path: norm for path, norm in named_modules(model) if isinstance(norm, nn.BatchNorm2d)}
    for path, statistics in plan.norms.items():
        norm = norms.get(path)
        if norm is None or norm.num_features != len(statistics.mean):
            raise PlanError("no such batch norm", where=path, fix="make the plan from this model")
        known[id(norm.running_mean)] = statistics
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d) and id(part.running_mean) in known:
            set_statistics(part, known[id(part.running_mean)])
