"""What a compiler pass is: a frozen dataclass with a name, its dependencies and ``run``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx, nn

from wsp_compiler import vendor_conv
from wsp_compiler.ops import WinogradSite
from wsp_compiler.plan import PruningPlan
from wsp_compiler.trace import has_hooks

WSP_OPS = (
    torch.ops.wsp.input_transform.default,
    torch.ops.wsp.sparse_bgemm.default,
    torch.ops.wsp.output_transform.default,
    torch.ops.wsp.winograd_conv2d.default,
    vendor_conv.conv2d_op,
)
INPUT_TRANSFORM, SPARSE_BGEMM, OUTPUT_TRANSFORM, WINOGRAD_CONV2D, CONV2D = WSP_OPS


@dataclass(frozen=True)
class Rewrites:
    """What a pass did.

    Attributes:
        count: number of rewritten places.
        declined: (node or site, reason) of every place the pass looked at and left alone.
        notes: what else the report should say of it, in a few words each.
    """

    count: int = 0
    declined: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


@runtime_checkable
class Pass(Protocol):
    """A rewrite of a traced graph.

    ``requires`` names levels (or passes) that must have run before, ``provides`` names the levels that hold
    afterwards, ``after`` orders without requiring. ``run`` edits the graph in place; the pipeline's runner
    does linting, dead-code removal, recompilation, timing, checking and dumps.
    """

    @property
    def name(self) -> str: ...
    @property
    def requires(self) -> tuple[str, ...]: ...
    @property
    def provides(self) -> tuple[str, ...]: ...
    @property
    def after(self) -> tuple[str, ...]: ...

    def run(self, gm: fx.GraphModule, plan: PruningPlan) -> Rewrites: ...


@dataclass(frozen=True)
class PassBase:
    """Defaults for the fields of a pass. Subclass it, override ``name`` and ``run``."""

    name: str = field(default="", init=False)
    requires: tuple[str, ...] = field(default=(), init=False)
    provides: tuple[str, ...] = field(default=(), init=False)
    after: tuple[str, ...] = field(default=(), init=False)

    def run(self, gm: fx.GraphModule, plan: PruningPlan) -> Rewrites:
        """Edit ``gm`` in place and say what was done."""
        raise NotImplementedError(f"{type(self).__name__}.run")


@dataclass(frozen=True)
class PassRecord:
    """One executed pass: its rewrites, seconds, and the unit of the model ("" is the whole) it ran on."""

    name: str
    unit: str
    rewrites: Rewrites
    seconds: float


def called_module(gm: fx.GraphModule, node: object) -> nn.Module | None:
    """The module that a call_module node calls, else None."""
    if isinstance(node, fx.Node) and node.op == "call_module":
        return gm.get_submodule(str(node.target))
    return None


def altered(module: nn.Module) -> str | None:
    """Why a call of ``module`` does something else than its type says, or None."""
    if has_hooks(module):
        return "it has forward hooks"
    return "its forward is replaced" if "forward" in module.__dict__ else None


def first_input(node: fx.Node) -> object:
    """What a call_module node passes first, by position or as ``input``."""
    return node.args[0] if node.args else node.kwargs.get("input")


def only_user(node: fx.Node) -> fx.Node | None:
    """The node that reads ``node``, if it is the only one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_op(node: object, op: Callable[..., Any]) -> bool:
    """True if ``node`` calls the operator ``op``."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is op


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a wsp node by name."""
    normalized = node.normalized_arguments(torch.nn.Module(), normalize_to_only_use_kwargs=True)
    assert normalized is not None
    return dict(normalized.kwargs)


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set one argument of a wsp node by name."""
    node.args, node.kwargs = (), {**arguments(node), name: value}


def site_of(gm: fx.GraphModule, node: fx.Node) -> tuple[str, WinogradSite]:
    """Name and module of the :class:`WinogradSite` whose buffers a wsp node reads."""
    name = str(arguments(node)["rows"].target).rpartition(".")[0]
    site = gm.get_submodule(name)
    assert isinstance(site, WinogradSite)
    return name, site


def get_attribute(gm: fx.GraphModule, node: object) -> object:
    """The value of a get_attr node, else None."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    return getattr(gm.get_submodule(owner), name)


def get_buffer(gm: fx.GraphModule, before: fx.Node, site: str, buffer: str) -> fx.Node:
    """A get_attr node for a site's buffer, inserted before ``before``."""
    with gm.graph.inserting_before(before):
        return gm.graph.get_attr(f"{site}.{buffer}")
