"""Small graphs for the tests of passes: trace, plan, run passes one at a time, read the result."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from wsp_compiler.options import CompileOptions
from wsp_compiler.passes import Pass, Rewrites, pipeline
from wsp_compiler.passes.pipeline import remove_dead_code
from wsp_compiler.plan import PruningPlan, make_plan
from wsp_compiler.sites import collect_sites
from wsp_compiler.trace import SITE, TracedModel, trace


@dataclass
class Lowering:
    """A model's graph on its way through the passes."""

    model: nn.Module
    gm: fx.GraphModule
    plan: PruningPlan

    def run(self, entry: Pass) -> Rewrites:
        """Run one pass as the pipeline's runner does."""
        rewrites = entry.run(self.gm, self.plan)
        remove_dead_code(self.gm)
        self.gm.graph.lint()
        self.gm.recompile()
        return rewrites

    def through(self, name: str) -> Lowering:
        """Run the default passes up to and including ``name``."""
        for entry in pipeline.ordered():
            self.run(entry)
            if entry.name == name:
                return self
        raise AssertionError(name)

    @property
    def calls(self) -> list[str]:
        """What the graph calls, in order: operators, functions, .methods and module classes."""
        names: list[str] = []
        for node in self.gm.graph.nodes:
            if node.op == "call_module":
                names.append(type(self.gm.get_submodule(node.target)).__name__)
            elif node.op == "call_method":
                names.append(f".{node.target}")
            elif node.op == "call_function":
                name = str(getattr(node.target, "__name__", node.target))
                names.append(name.removesuffix(".default"))
        return names

    def assert_equals_model(self, *inputs: Tensor, tolerance: float = 1e-6) -> None:
        """The graph, run in float64, gives what the model gives; only for plans that prune nothing.

        The lowered weights are stored in float32, hence the tolerance.
        """
        model, gm = as_double(self.model), as_double(self.gm)
        with torch.no_grad():
            expected = model(*(x.double() for x in inputs))
            actual = gm(*(x.double() for x in inputs))
        assert actual.shape == expected.shape
        assert float((actual - expected).norm()) <= tolerance * float(expected.norm())


def as_double(module: Any) -> Any:
    """A float64 copy."""
    return copy.deepcopy(module).double()


def lowering(model: nn.Module, example: Any = None, **options: Any) -> Lowering:
    """Trace ``model`` whole and plan it; by default dense Winograd for every eligible convolution."""
    model.eval()
    options = {"method": "dense", "channel_threshold": 0, **options}
    traced = trace(model, example)
    assert list(traced.units) == [""], traced.untraced
    convolutions = {path: module for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    plan = make_plan(collect_sites(traced), convolutions, CompileOptions(**options))
    return Lowering(model, traced.units[""], plan)


def randomise_norms(model: nn.Module) -> nn.Module:
    """Give every batch norm statistics and parameters of its own."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                if tensor is not None:
                    nn.init.normal_(tensor)
            for tensor in (module.running_var, module.weight):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 2.0)
    return model.eval()


def conv(c: int = 4, n: int = 4, **options: Any) -> nn.Conv2d:
    """An eligible convolution that keeps the image's size."""
    return nn.Conv2d(c, n, 3, padding=1, **options)


def small_network() -> nn.Sequential:
    """Two eligible convolutions, one with too few channels, one 1x1."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 16, 3, padding=1, bias=False),
        nn.Conv2d(16, 4, 1),
    ).eval()


class Net(nn.Module):
    """Base of small test models in eval mode: attributes from keyword arguments."""

    def __init__(self, **children: Any) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self.eval()


def site_paths(traced: TracedModel) -> list[str]:
    """Paths of the convolution calls of every unit."""
    return [node.meta[SITE] for gm in traced.units.values() for node in gm.graph.nodes if SITE in node.meta]


def run_traced(traced: TracedModel, *args: Any, **kwargs: Any) -> Any:
    """Call the model made of the traced units."""
    with torch.no_grad():
        return traced.assemble(traced.units)(*args, **kwargs)
