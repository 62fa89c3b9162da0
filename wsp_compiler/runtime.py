"""LoweredGraph -> CompiledModule: the lowered operators replaced by launchers of the generated kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from wsp_compiler import opaque, report
from wsp_compiler.codegen.layer import WinogradLayer
from wsp_compiler.codegen.targets import CodeTarget
from wsp_compiler.cuda_graph import CudaGraphs
from wsp_compiler.errors import CompiledModuleError, InputError
from wsp_compiler.filters.shrink import Shrunk
from wsp_compiler.inductor import InductorUnit
from wsp_compiler.passes.base import (
    CONV2D,
    INPUT_TRANSFORM,
    OUTPUT_TRANSFORM,
    SPARSE_BGEMM,
    WINOGRAD_CONV2D,
    PassRecord,
    arguments,
    get_attribute,
    is_op,
    site_of,
)
from wsp_compiler.plan import PruningPlan
from wsp_compiler.sites import ConvSite
from wsp_compiler.sparse_layer import SparseLayer
from wsp_compiler.speed import SiteTimes
from wsp_compiler.trace import SITE
from wsp_compiler.vendor_conv import VendorConv


class Stage(nn.Module):
    """One of a layer's stages as a module, for graphs whose stages are not merged."""

    def __init__(self, layer: WinogradLayer, run: str) -> None:
        super().__init__()
        self.layer = layer
        self._run = run

    def forward(self, *args: Any) -> Tensor:
        result: Tensor = getattr(self.layer, self._run)(*args)
        return result


def _layer(
    gm: fx.GraphModule,
    output: fx.Node,
    target: CodeTarget,
    precision: str | None,
    dtypes: Mapping[str, torch.dtype],
) -> WinogradLayer | SparseLayer:
    """The launcher for an output_transform or winograd_conv2d node."""
    given = arguments(output)
    _, site = site_of(gm, output)
    slope: Tensor | None = None
    if isinstance(given["slope"], fx.Node):
        owner, _, name = str(given["slope"].target).rpartition(".")
        slope = getattr(gm.get_submodule(owner), name)
    path = str(output.meta.get(SITE, output.name))
    padding = (given["padding"][0], given["padding"][1])
    if site.by_element:
        return SparseLayer(
            path,
            site,
            slope,
            padding,
            given["tile"],
            given["activation"],
            given["channels_last"],
            dtypes.get(path),
        )
    return WinogradLayer(
        path=path,
        site=site,
        slope=slope,
        padding=padding,
        tile=given["tile"],
        activation=given["activation"],
        channels_last=given["channels_last"],
        precision=precision,
        target=target,
        dtype=dtypes.get(path),
    )


def _vendor_conv(gm: fx.GraphModule, given: Mapping[str, Any]) -> VendorConv:
    """The launcher for a conv2d node with the arguments ``given``."""
    weight, bias = get_attribute(gm, given["weight"]), get_attribute(gm, given["bias"])
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    return VendorConv(
        weight, bias, given["stride"], given["padding"], given["dilation"], given["groups"],
        given["activation"], given["channels_last"],
    )  # fmt: skip


def _separate(graph: fx.Graph, home: str, conv: VendorConv, given: Mapping[str, Any]) -> fx.Node:
    """The same as PyTorch's own operations, which torch.compile fuses."""
    weight = graph.get_attr(f"{home}.weight")
    bias = None if conv.bias is None else graph.get_attr(f"{home}.bias")
    how = (conv.stride, conv.padding, conv.dilation, conv.groups)
    y = graph.call_function(F.conv2d, (given["x"], weight, bias, *how))
    if given["residual"] is not None:
        y = graph.call_function(torch.add, (y, given["residual"]))
    return graph.call_function(F.relu, (y,)) if conv.activation == "relu" else y


def emit(
    gm: fx.GraphModule,
    target: CodeTarget,
    precision: str | None,
    dtypes: Mapping[str, torch.dtype],
    rest: str = "eager",
) -> fx.GraphModule | InductorUnit:
    """A copy of the lowered graph whose wsp operators are calls of kernel launchers; ``gm`` stays as it is.

    Stages that a custom pass has connected differently keep their eager meaning.

    Args:
        gm: the lowered graph.
        target: where the kernels run.
        precision: arithmetic of the matrix products, None to follow the inputs.
        dtypes: module path of a convolution -> dtype of its weight.
        rest: "inductor" compiles the graph around the launchers with torch.compile.
    """
    graph = copy.deepcopy(gm.graph)
    emitted = fx.GraphModule(gm, graph, class_name=type(gm).__name__)
    count = 0
    home = "kernels"
    while hasattr(gm, home):  # the model's own attributes keep their names
        home += "_"

    def replace_by(node: fx.Node, new: fx.Node) -> None:
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)

    def call(node: fx.Node, module: nn.Module, args: tuple[Any, ...]) -> fx.Node:
        nonlocal count
        emitted.add_submodule(f"{home}.{count}", module)
        with graph.inserting_before(node):
            new = graph.call_module(f"{home}.{count}", args)
        replace_by(node, new)
        count += 1
        return new

    layers: list[nn.Module] = []
    handles: list[int] = []
    for node in list(graph.nodes):
        if is_op(node, WINOGRAD_CONV2D):
            given = arguments(node)
            layer = _layer(gm, node, target, precision, dtypes)
            inputs = (given["x"], given["residual"], given.get("like"))
            if rest == "eager":
                call(node, layer, inputs)
                continue
            layers.append(layer)
            handles.append(opaque.register(layer))
            with graph.inserting_before(node):
                replace_by(node, graph.call_function(opaque.WINOGRAD_LAYER, (*inputs, handles[-1])))
        elif is_op(node, CONV2D):
            given = arguments(node)
            conv = _vendor_conv(gm, given)
            if rest == "eager":
                call(node, conv, (given["x"], given["residual"]))
                continue
            emitted.add_submodule(f"{home}.{count}", conv)
            with graph.inserting_before(node):
                replace_by(node, _separate(graph, f"{home}.{count}", conv, given))
            count += 1
        elif is_op(node, OUTPUT_TRANSFORM) and is_op(M := arguments(node)["M"], SPARSE_BGEMM):
            V = arguments(M)["V"]
            if not is_op(V, INPUT_TRANSFORM) or len(M.users) > 1 or len(V.users) > 1:
                continue
            given, first = arguments(node), arguments(V)
            if any(given[name] != first[name] for name in ("x", "padding", "tile")):
                continue
            layer, x = _layer(gm, node, target, precision, dtypes), first["x"]
            if isinstance(layer, SparseLayer):
                continue
            new_V = call(V, Stage(layer, "input_transform"), (x,))
            new_M = call(M, Stage(layer, "sparse_bgemm"), (new_V, x))
            call(node, Stage(layer, "output_transform"), (new_M, x, given["residual"]))
    graph.eliminate_dead_code(lambda node: node.op != "get_attr")
    emitted.delete_all_unused_submodules()
    graph.lint()
    emitted.recompile()
    if rest == "eager":
        return emitted
    emitted.meta["handles"] = handles
    return InductorUnit(emitted, layers)


@dataclass(frozen=True)
class CompilationRecord:
    """What a compilation decided and did, for the report; ``shrunk`` says which convolutions got smaller."""

    sites: tuple[ConvSite, ...]
    plan: PruningPlan
    untraced: Mapping[str, str] = field(default_factory=dict[str, str])
    passes: tuple[PassRecord, ...] = ()
    times: Mapping[str, SiteTimes] = field(default_factory=dict[str, SiteTimes])
    shrunk: Shrunk | None = None


class CompiledModule(nn.Module):
    """A compiled model: call it like the model it was made from. Inference only.

    Attributes:
        plan: the :class:`PruningPlan`.
        graph_module: the lowered torch.fx.GraphModule, which runs in plain PyTorch; if the model could not be
            traced whole, the model with its traced submodules lowered.
        target: where the kernels run.
        cuda_graphs: the captured :class:`CudaGraphs` if compiled with ``cuda_graph=True``, else None.
    """

    def __init__(
        self,
        executable: nn.Module,
        graph_module: nn.Module,
        record: CompilationRecord,
        target: CodeTarget,
        cuda_graph: bool = False,
    ) -> None:
        super().__init__()
        self.executable = executable
        self.__dict__["graph_module"] = graph_module  # its tensors are the executable's: not registered twice
        self.record = record
        self.target = target
        self.cuda_graphs = CudaGraphs(executable, target.device) if cuda_graph else None
        self.training = False

    @property
    def plan(self) -> PruningPlan:
        """What was decided for every convolution."""
        return self.record.plan

    @property
    def achieved_pr(self) -> float:
        """1 - kept Winograd weights / all of the lowered convolutions; channels that have left count as pruned."""
        entries = [self.plan[site.path] for site in self.record.sites if report.is_lowered(site, self.plan)]
        kept, total = report.kept_of(entries, self.record.shrunk or Shrunk(self.plan))
        return 1 - kept / total if total else 0.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; arguments and results as the original's.

        Raises:
            InputError: an input requires grad, or does not fit a layer.
        """
        if torch.is_grad_enabled():
            plain = not kwargs and all(type(value) is Tensor for value in args)
            for leaf in args if plain else pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    raise InputError(
                        "an input requires grad, but a compiled module is for inference only",
                        where="compiled module",
                        fix="call it under torch.no_grad() or detach the input; to train a pruned model use "
                        "wsp_compiler.prune",
                    )
        with torch.no_grad():
            if self.cuda_graphs is not None:
                return self.cuda_graphs(args, kwargs)
            return self.executable(*args, **kwargs)

    def layers(self) -> Iterable[WinogradLayer]:
        """Every kernel launcher, in model order."""
        seen: set[int] = set()
        for module in self.executable.modules():
            if isinstance(module, WinogradLayer) and id(module) not in seen:
                seen.add(id(module))
                yield module

    def sparse_layers(self) -> Iterable[SparseLayer]:
        """Every launcher of a library's sparse product (method "wwp"), in model order."""
        found = (module for module in self.executable.modules() if isinstance(module, SparseLayer))
        return {id(layer): layer for layer in found}.values()

    def report(self) -> str:
        """A text table: every convolution with its decision, pattern and multiplies, or the reason."""
        shapes: dict[str, list[tuple[int, ...]]] = {}
        notes: list[str] = []
        for layer in self.layers():
            if layer.last_shape is not None:
                shapes.setdefault(layer.path, []).append(layer.last_shape)
            notes += [f"{layer.path}: {note}" for note in layer.notes]
        for sparse in self.sparse_layers():
            if sparse.last_shape is not None:
                shapes.setdefault(sparse.path, []).append(sparse.last_shape)
        sites = [
            replace(site, input_shapes=tuple(shapes[site.path])) if site.path in shapes else site
            for site in self.record.sites
        ]
        kernels = {layer.path: layer.choices[-1].candidate.label for layer in self.layers() if layer.choices}
        kernels |= {layer.path: layer.label for layer in self.sparse_layers()}
        record = self.record
        return report.format_report(
            sites, self.plan, record.untraced, record.passes, notes, record.times, kernels, record.shrunk
        )

    def kernel_source(self, path: str) -> str:
        """The generated text (CUDA C or LLVM IR) of the kernels built so far for the convolution at ``path``.

        Raises:
            CompiledModuleError: the convolution was not lowered, or nothing has been built for it yet.
        """
        layers = [layer for layer in self.layers() if layer.path == path]
        if not layers:
            why = self.plan.left_alone.get(path)
            known = ", ".join(list(self.plan)[:5])
            raise CompiledModuleError(
                why or "no such convolution", where=f"kernel_source({path!r})", fix=f"lowered are: {known}"
            )
        texts = [text for layer in layers for text in layer.sources()]
        if not texts:
            raise CompiledModuleError(
                "no kernel is built before shapes are known",
                where=f"kernel_source({path!r})",
                fix="compile with example_inputs, or call the module once",
            )
        return "\n".join(dict.fromkeys(texts))

    def __copy__(self) -> CompiledModule:
        clone = object.__new__(type(self))
        clone.__dict__.update(self.__dict__)
        return clone

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModule:
        clone = object.__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: kernels are code of this process."""
        raise CompiledModuleError(
            "a compiled module cannot be pickled",
            where="pickle",
            fix="save model.state_dict() and compiled.plan.to_json(), then compile with plan=; kernels are cached",
        )

    def train(self, mode: bool = True) -> CompiledModule:
        """Only eval mode exists."""
        if mode:
            raise CompiledModuleError(
                "a compiled module cannot be trained",
                where="train()",
                fix="fine-tune the model first (wsp_compiler.prune), then compile it",
            )
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompiledModule:
        """Conversions that change nothing pass; others would write into the user's model and are refused."""
        tensors: Sequence[Tensor] = [*self.executable.parameters(), *self.executable.buffers()]
        for dtype, device in dict.fromkeys((t.dtype, t.device) for t in tensors):
            probe = torch.empty((1, 2, 2, 2), dtype=dtype, device=device)
            moved = fn(probe)
            if (moved.dtype, moved.device, moved.stride()) != (dtype, device, probe.stride()):
                raise CompiledModuleError(
                    f"kernels are built for {self.target.device} and the model's dtype and memory format; "
                    "they cannot be moved or converted",
                    where="compiled module",
                    fix="convert the model first: wsp_compiler.compile(model.to(...))",
                )
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: kernels hold packed weights, and the other tensors are the user's model's."""
        raise CompiledModuleError(
            "a compiled module's weights cannot be replaced",
            where="load_state_dict()",
            fix="load them into the model, then compile it again (compiled.plan can be passed as plan=)",
        )

    def requires_grad_(self, requires_grad: bool = True) -> CompiledModule:
        """Refused for True; False changes nothing, since nothing of a compiled module is trained."""
        if requires_grad:
            self.train()
        return self
