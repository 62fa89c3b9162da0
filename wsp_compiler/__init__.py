"""A compiler for Winograd-structured-pruned convolutional networks.

import wsp_compiler
compiled = wsp_compiler.compile(model.eval(), pr=0.8, example_inputs=(x,))
y = compiled(x)
print(compiled.report())
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wsp_compiler import errors
from wsp_compiler.abwsp import Candidate, SearchResult, search, spearman
from wsp_compiler.api import compile
from wsp_compiler.options import CompileOptions, PruneRule
from wsp_compiler.passes import PassBase, Pipeline, Rewrites, pipeline
from wsp_compiler.plan import PruningPlan, SitePlan
from wsp_compiler.sites import ConvSite, find_sites
from wsp_compiler.training import WinogradConv2d, finetune, prune

if TYPE_CHECKING:
    from wsp_compiler.runtime import CompiledModule
    from wsp_compiler.speedup import balanced_speedup, layer_times

__version__ = "0.1.0"

__all__ = [
    "Candidate",
    "CompileOptions",
    "CompiledModule",
    "ConvSite",
    "PassBase",
    "Pipeline",
    "PruneRule",
    "PruningPlan",
    "Rewrites",
    "SearchResult",
    "SitePlan",
    "WinogradConv2d",
    "balanced_speedup",
    "compile",
    "errors",
    "find_sites",
    "finetune",
    "layer_times",
    "pipeline",
    "prune",
    "search",
    "spearman",
]


def __getattr__(name: str) -> Any:
    if name == "CompiledModule":  # its module loads tvm
        from wsp_compiler.runtime import CompiledModule

        return CompiledModule
    if name in ("balanced_speedup", "layer_times"):
        from wsp_compiler import speedup

        return getattr(speedup, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
