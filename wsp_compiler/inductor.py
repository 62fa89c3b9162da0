"""A unit whose graph is compiled by torch.compile around the opaque kernel launchers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from wsp_compiler import opaque
from wsp_compiler.errors import CompiledModuleError, InputError, WspError

RECOMPILE_LIMIT = 64
"""Kinds of input that one unit is compiled for."""
_compiling = threading.RLock()


def input_kind(args: Sequence[object]) -> tuple[object, ...]:
    """What a compiled graph depends on: shapes, strides, dtypes, devices; other values themselves."""

    def kind(value: object) -> object:
        if isinstance(value, Tensor):
            return (tuple(value.shape), value.stride(), value.dtype, value.device)
        return (type(value), repr(value))

    tf32 = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    return (*map(kind, args), tf32)


class InductorUnit(nn.Module):
    """Calls ``torch.compile(graph_module)``, compiled anew for every kind of input, with frozen weights.

    Args:
        graph_module: a graph that calls ``wsp::winograd_layer`` with the handles of ``layers``.
        layers: the launchers, in the order of their calls.
    """

    def __init__(self, graph_module: fx.GraphModule, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.layers = nn.ModuleList(layers)
        self._state: dict[str, Any] = {"call": None, "known": set()}

    def forward(self, *args: Any) -> Any:
        """The graph's result.

        Raises:
            InputError: autocast is on.
            CompiledModuleError: torch.compile cannot compile the graph.
        """
        for device in ("cuda", "cpu"):
            if torch.is_autocast_enabled(device):
                raise InputError(
                    "autocast is on, which rest='inductor' does not follow",
                    where="compiled module",
                    fix="compile model.to(dtype), or use rest='eager'",
                )
        known: set[object] = self._state["known"]
        kind = input_kind(args)
        if kind in known:
            return self._state["call"](*args)
        with _compiling:
            result = self._compile(args)
            known.add(kind)
        return result

    def _compile(self, args: tuple[Any, ...]) -> Any:
        compile_: Callable[..., Any] = torch.compile
        if self._state["call"] is None:
            self._state["call"] = compile_(self.graph_module, fullgraph=True, dynamic=False)
        inductor: Any = torch._inductor  # pyright: ignore[reportPrivateUsage]
        dynamo: Any = torch._dynamo  # pyright: ignore[reportPrivateUsage]
        limits = dict(recompile_limit=RECOMPILE_LIMIT, accumulated_recompile_limit=16 * RECOMPILE_LIMIT)
        try:
            with inductor.config.patch(freezing=True), dynamo.config.patch(**limits):
                return self._state["call"](*args)
        except WspError:
            raise
        except dynamo.exc.TorchDynamoException as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise CompiledModuleError(
                f"torch.compile fails on the rest of the model: {lines[0]}",
                where="rest='inductor'",
                fix="use rest='eager'",
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> InductorUnit:
        graph_module, layers = copy.deepcopy((self.graph_module, list(self.layers)), memo)
        for node in graph_module.graph.nodes:
            if node.target is opaque.WINOGRAD_LAYER:
                number = graph_module.meta["handles"].index(node.args[3])
                node.args = (*node.args[:3], opaque.register(cast("Any", layers[number])))
        graph_module.meta["handles"] = [
            node.args[3] for node in graph_module.graph.nodes if node.target is opaque.WINOGRAD_LAYER
        ]
        graph_module.recompile()
        return InductorUnit(graph_module, cast("Any", layers))
