"""Small networks whose pruned filters can leave, and the network that their removal must equal."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from wsp_compiler.filters.removal import pruned_filters
from wsp_compiler.filters.settle import settle_filters
from wsp_compiler.options import CompileOptions
from wsp_compiler.plan import PruningPlan, make_plan
from wsp_compiler.sites import collect_sites
from wsp_compiler.trace import TracedModel, trace


def conv(c: int, n: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c, n, 3, **{"padding": 1, **options})


class Chain(nn.Module):
    """Convolutions in a row: batch norm, several activations, pooling, flatten, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True), conv(8, 8), nn.PReLU(8), nn.MaxPool2d(2),
            conv(8, 8, padding=0), nn.LeakyReLU(0.1), nn.Dropout(), conv(8, 12, bias=False), nn.BatchNorm2d(12),
            nn.SiLU(), nn.AdaptiveAvgPool2d(2),
        )  # fmt: skip
        self.head = nn.Linear(12 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.head(F.dropout(y.view(y.size(0), -1), training=self.training))


class Residual(nn.Module):
    """A trunk that three convolutions add up to, and one inside a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = conv(3, 10), nn.BatchNorm2d(10)
        self.a, self.a_norm = conv(10, 6), nn.BatchNorm2d(6)
        self.b, self.b_norm = conv(6, 10, bias=False), nn.BatchNorm2d(10)
        self.c = conv(10, 10)
        self.out = conv(10, 4)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.stem_norm(self.stem(x)))
        y = F.relu(y + self.b_norm(self.b(F.relu(self.a_norm(self.a(y))))))
        z = self.c(y)
        z += y
        return self.out(z * 2 + 1), self.head(z.mean([2, 3]))


class Dense(nn.Module):
    """Concatenations, each read by batch norm, ReLU and a 1x1 convolution, as in DenseNet."""

    def __init__(self, growth: int = 6, layers: int = 3) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        widths = [8 + growth * index for index in range(layers)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.squeezes = nn.ModuleList(nn.Conv2d(width, 8, 1, bias=False) for width in widths)
        self.middles = nn.ModuleList(nn.BatchNorm2d(8) for _ in widths)
        self.grows = nn.ModuleList(conv(8, growth, bias=False) for _ in widths)
        self.norm = nn.BatchNorm2d(8 + growth * layers)
        self.head = nn.Linear(8 + growth * layers, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, squeeze, middle, grow in zip(
            self.norms, self.squeezes, self.middles, self.grows, strict=True
        ):
            y = F.relu(norm(torch.cat(features, 1)), inplace=True)
            features.append(grow(F.relu(middle(squeeze(y)))))
        y = F.relu(self.norm(torch.cat(features, dim=1)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))


class Grouped(nn.Module):
    """Depthwise and grouped convolutions behind prunable ones."""

    def __init__(self, bias: bool = True, padding: int = 1) -> None:
        super().__init__()
        self.a = conv(3, 8, bias=bias)
        self.depthwise = nn.Conv2d(8, 16, 3, groups=8, padding=padding)
        self.b = conv(16, 12, bias=bias)
        self.grouped = nn.Conv2d(12, 6, 3, groups=3, padding=padding)
        self.c = conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.grouped(F.relu(self.b(F.relu(self.depthwise(F.relu(self.a(x))))))))


def randomised(model: nn.Module) -> nn.Module:
    """In eval mode, with batch norms and biases of their own: constants of pruned filters differ from zero."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                nn.init.normal_(tensor)  # type: ignore[arg-type]
            for tensor in (module.running_var, module.weight):
                nn.init.uniform_(tensor, 0.5, 2.0)  # type: ignore[arg-type]
        elif isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight)
    return model.eval()


def planned(model: nn.Module, *rules: Any, **options: Any) -> tuple[TracedModel, PruningPlan]:
    """(graphs, settled plan) of method "fp" at pr=0.5 for every eligible convolution."""
    options = {"method": "fp", "pr": 0.5, "channel_threshold": 0, "rules": rules, **options}
    traced = trace(model)
    convolutions = {path: module for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    chosen, sites = CompileOptions(**options), collect_sites(traced)
    plan = make_plan(sites, convolutions, chosen)
    return traced, settle_filters(plan, traced.units, sites, convolutions, chosen)


def without_filters(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """A float64 copy whose pruned filters are zero; their biases stay."""
    result = copy.deepcopy(model).double()
    for path, keep in pruned_filters(plan).items():
        layer = result.get_submodule(path)
        with torch.no_grad():
            layer.weight[~keep] = 0.0  # type: ignore[index, operator]
    return result


def convolutions(gm: fx.GraphModule) -> dict[str, nn.Conv2d]:
    return {path: module for path, module in gm.named_modules() if isinstance(module, nn.Conv2d)}
