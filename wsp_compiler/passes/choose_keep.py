"""Write each planned convolution's SitePlan (the WSP/BWSP choice) to its node and register its ``keep``.

rewrite:
    y = conv(x)                       ->  y = conv(x)        # node.meta["site_plan"] = plan[path]
                                          winograd.PATH.keep # bool buffer, True = kept

The pass decides nothing: the plan did.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx, nn

from wsp_compiler.clone import named_modules
from wsp_compiler.ops import WinogradSite
from wsp_compiler.passes.base import PassBase, Rewrites, called_module
from wsp_compiler.plan import PruningPlan
from wsp_compiler.trace import SITE

SITE_PLAN = "site_plan"
"""Key of ``node.meta`` that holds the SitePlan of a convolution to be lowered."""


class WinogradSites(nn.Module):
    """Holds the WinogradSite of every lowered convolution."""


def site_module_name(gm: fx.GraphModule, path: str) -> str:
    """Name of the WinogradSite of the convolution at ``path`` inside its graph module."""
    root = "winograd"
    while not isinstance(getattr(gm, root, WinogradSites()), WinogradSites):  # a name of the model's own
        root += "_"
    if not hasattr(gm, root):
        gm.add_module(root, WinogradSites())
    return f"{root}.{path.replace('.', '/') or 'model'}"


@dataclass(frozen=True)
class ChooseKeep(PassBase):
    """See the module's docstring."""

    name: str = field(default="choose_keep", init=False)
    provides: tuple[str, ...] = field(default=("keep_chosen",), init=False)

    def run(self, gm: fx.GraphModule, plan: PruningPlan) -> Rewrites:
        """Annotate every planned convolution of ``gm``."""
        count = 0
        declined: list[tuple[str, str]] = []
        for node in gm.graph.nodes:
            path = node.meta.get(SITE)
            conv = called_module(gm, node)
            if path is None or not isinstance(conv, nn.Conv2d):
                continue
            if path not in plan:
                declined.append((path, plan.left_alone.get(path, "not in the plan")))
                continue
            if not plan[path].winograd:
                declined.append((path, "its kept filters are left to the vendor's library"))
                continue
            node.meta[SITE_PLAN] = plan[path]
            name = site_module_name(gm, path)
            if name not in dict(named_modules(gm)):
                gm.add_submodule(name, WinogradSite(plan[path].keep.to(conv.weight.device)))
            count += 1
        return Rewrites(count, tuple(declined))
