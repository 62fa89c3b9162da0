"""The kernels that a compiled model will want for its example inputs, built before it runs on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import fx, nn

from wsp_compiler.codegen.build_together import build_together
from wsp_compiler.codegen.layer import WinogradLayer
from wsp_compiler.passes.base import WINOGRAD_CONV2D, arguments, is_op
from wsp_compiler.speed import CallFormat
from wsp_compiler.trace import SITE


def prebuild(
    layers: Iterable[WinogradLayer], lowered: nn.Module, formats: Mapping[str, Sequence[CallFormat]]
) -> None:
    """Build the kernels that ``layers`` will want for the inputs that their convolutions have seen.

    What is wanted is inferred from the graphs and ``formats``; a wrong guess costs time and nothing else. On the CPU
    there is nothing to gain: TVM compiles there.

    Args:
        layers: launchers of a compiled model.
        lowered: the model's graphs with wsp operators.
        formats: path of a convolution -> format of each of its calls in the original model.
    """
    residuals: dict[str, set[bool]] = {}
    for graph_module in (part for part in lowered.modules() if isinstance(part, fx.GraphModule)):
        for node in graph_module.graph.nodes:
            if is_op(node, WINOGRAD_CONV2D):
                path = str(node.meta.get(SITE, node.name))
                residuals.setdefault(path, set()).add(arguments(node)["residual"] is not None)
    build_together(
        [
            lambda layer=layer, call=call, residual=residual: layer.prebuild(call, residual)
            for layer in layers
            if layer.target.is_cuda
            for call in dict.fromkeys(formats.get(layer.path, ()))
            for residual in residuals.get(layer.path, ())
        ]
    )
