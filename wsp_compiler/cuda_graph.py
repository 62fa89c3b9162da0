"""Calls as replays of CUDA graphs: one graph per kind of input, captured at its first call."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from wsp_compiler.errors import CompiledModuleError, InputError

WARM_UP_CALLS = 3
"""Calls before a capture: they build kernels and let the vendor's libraries choose their algorithms."""


@dataclass(frozen=True)
class Captured:
    """A captured graph with the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[object, ...]
    structure: Any


def signature(leaves: list[Any], structure: Any) -> tuple[Any, ...]:
    """What a captured graph depends on: shapes, dtypes and strides of tensors, values of everything else."""
    kinds: list[Any] = [
        (tuple(leaf.shape), leaf.dtype, leaf.stride(), leaf.device)
        if isinstance(leaf, Tensor)
        else (type(leaf), repr(leaf))
        for leaf in leaves
    ]
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    return (str(structure), *kinds, autocast, torch.backends.cudnn.allow_tf32)


class CudaGraphs:
    """Runs ``function`` as CUDA graphs.

    The first call with a new signature runs ``function`` a few times and captures it; later ones copy their inputs
    into the graph's and replay it. Every signature keeps its graph's inputs, outputs and intermediate results
    allocated until the object dies; graphs share one memory pool. Calls from several threads take turns.

    Args:
        function: what is captured; it must not depend on the values of its inputs in Python.
        device: the CUDA device of all inputs.
        clone: return copies of the outputs; otherwise results are overwritten by the next call.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device, clone: bool = True) -> None:
        self.function, self.device, self.clone = function, device, clone
        self.captured: dict[tuple[Any, ...], Captured] = {}
        self._pool: Any = None
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``function(*args, **kwargs)``.

        Raises:
            InputError: a tensor is not on the device.
            CompiledModuleError: the model cannot be captured. PyTorch (seen with 2.11) then leaves its CUDA random
                generator unusable in this process.
        """
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for tensor in tensors:
            if tensor.device != self.device:
                raise InputError(
                    f"expected tensors on {self.device}, got one on {tensor.device}",
                    where="cuda_graph=True",
                    fix="move the inputs to the model's device",
                )
        key = signature(leaves, structure)
        with self._lock, torch.cuda.device(self.device):
            if self._done is not None:  # the last replay may still run, on another stream
                torch.cuda.current_stream().wait_event(self._done)
            if key not in self.captured:
                self.captured[key] = self._capture(leaves, structure)
            captured = self.captured[key]
            for static, given in zip(captured.inputs, tensors, strict=True):
                static.copy_(given)
            captured.graph.replay()
            outputs = [
                leaf.clone() if isinstance(leaf, Tensor) and self.clone else leaf for leaf in captured.outputs
            ]
            self._done = self._done or torch.cuda.Event()
            self._done.record()
        return pytree.tree_unflatten(outputs, captured.structure)

    def __deepcopy__(self, memo: dict[int, Any]) -> CudaGraphs:
        return CudaGraphs(copy.deepcopy(self.function, memo), self.device, self.clone)

    def _capture(self, leaves: list[Any], structure: Any) -> Captured:
        static = [torch.empty_like(leaf).copy_(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(static, structure)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_CALLS):
                self.function(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=side):
                result = self.function(*args, **kwargs)
        except RuntimeError as error:
            torch.cuda.synchronize()
            raise CompiledModuleError(
                f"the model cannot be captured: {str(error).partition(chr(10))[0]}",
                where="cuda_graph=True",
                fix="use cuda_graph=False; a model that reads values back from the GPU cannot be a graph",
            ) from error
        outputs, shape = pytree.tree_flatten(result)
        inputs = tuple(leaf for leaf in static if isinstance(leaf, Tensor))
        return Captured(graph, inputs, tuple(outputs), shape)
