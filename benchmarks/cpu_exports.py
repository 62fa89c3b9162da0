"""A traced network as an ONNX model and as ncnn files, for the runtimes that do not read PyTorch modules.

Covers what the timed networks have: convolutions (batch norm is folded in first), ReLU, max pooling, adaptive average
pooling to one pixel or to what is there, linear layers, additions and subtractions.
"""

from __future__ import annotations

import copy
import importlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from torch.fx.passes.shape_prop import ShapeProp


@dataclass(frozen=True)
class Layer:
    """One operation: ``kind`` with the names of its inputs and its module, if it has one; shapes without batch."""

    name: str
    kind: str  # conv, relu, max_pool, mean, flatten, linear, add or sub
    inputs: tuple[str, ...]
    module: Any
    shape: tuple[int, ...]


FUNCTIONS: dict[Any, str] = {
    operator.add: "add", operator.iadd: "add", torch.add: "add", operator.sub: "sub", torch.sub: "sub",
    torch.flatten: "flatten", torch.relu: "relu", nn.functional.relu: "relu",
}  # fmt: skip
MODULES: dict[type[nn.Module], str] = {
    nn.Conv2d: "conv", nn.ReLU: "relu", nn.MaxPool2d: "max_pool", nn.AdaptiveAvgPool2d: "mean",
    nn.Linear: "linear", nn.Flatten: "flatten", nn.Dropout: "same", nn.Identity: "same",
}  # fmt: skip


def layers_of(model: nn.Module, x: Tensor) -> list[Layer]:
    """The operations of ``model`` in order, batch norm folded into convolutions; the last one is the output.

    Raises:
        ValueError: an operation that is not covered.
    """
    gm = fuse(copy.deepcopy(model).eval())
    with torch.no_grad():
        ShapeProp(gm).propagate(x)
    names: dict[fx.Node, str] = {}
    found: list[Layer] = []
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            names[node] = "x"
            continue
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        kind = FUNCTIONS.get(node.target) if module is None else MODULES.get(type(module))
        inputs = tuple(names[value] for value in node.all_input_nodes)
        shape, before = (tuple(n.meta["tensor_meta"].shape[1:]) for n in (node, node.all_input_nodes[0]))
        if kind == "same" or (kind == "mean" and shape == before):
            names[node] = inputs[0]
            continue
        if kind is None or (kind == "mean" and shape[1:] != (1, 1)):
            raise ValueError(f"{node.format_node()} is not covered")
        names[node] = node.name
        found.append(Layer(node.name, kind, inputs, module, shape))
    return found


def to_onnx(model: nn.Module, x: Tensor) -> bytes:
    """An ONNX model from "x" to the last layer's output."""
    onnx: Any = importlib.import_module("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    nodes: list[Any] = []
    constants: list[Any] = []
    layers = layers_of(model, x)
    for layer in layers:
        own = layer.module
        inputs = list(layer.inputs)
        if layer.kind in ("conv", "linear"):
            for name, values in (("w", own.weight), ("b", own.bias)):
                if values is not None:
                    inputs.append(f"{layer.name}.{name}")
                    constants.append(numpy_helper.from_array(values.detach().numpy(), inputs[-1]))
        kinds: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
            "conv": ("Conv", lambda own=own: dict(
                kernel_shape=list(own.kernel_size), strides=list(own.stride), pads=[*own.padding, *own.padding])),
            "relu": ("Relu", dict),
            "max_pool": ("MaxPool", lambda own=own: dict(
                kernel_shape=[own.kernel_size] * 2, strides=[own.stride] * 2, pads=[own.padding] * 4)),
            "mean": ("GlobalAveragePool", dict),
            "flatten": ("Flatten", dict),
            "linear": ("Gemm", lambda: dict(transB=1)),
            "add": ("Add", dict),
            "sub": ("Sub", dict),
        }  # fmt: skip
        operation, attributes = kinds[layer.kind]
        nodes.append(helper.make_node(operation, inputs, [layer.name], **attributes()))
    float32 = onnx.TensorProto.FLOAT
    last = layers[-1]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", float32, list(x.shape))],
        [helper.make_tensor_value_info(last.name, float32, [x.shape[0], *last.shape])],
        constants,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 8
    return made.SerializeToString()


def to_ncnn(model: nn.Module, x: Tensor) -> tuple[str, bytes]:
    """Contents of ncnn's .param and .bin files, from blob "x" to blob "y"; ReLU is fused into its convolution."""
    layers = layers_of(model, x)
    readers: dict[str, list[Layer]] = {}
    for layer in layers:
        for name in layer.inputs:
            readers.setdefault(name, []).append(layer)
    blob = {"x": "x"}  # value -> blob
    copies: dict[str, list[str]] = {}
    lines: list[str] = []
    weights: list[bytes] = []
    blobs = 0

    def emit(kind: str, name: str, inputs: list[str], value: str, settings: str = "") -> None:
        nonlocal blobs
        out = "y" if value == layers[-1].name else f"{value}_"
        out = "x" if kind == "Input" else out
        lines.append(f"{kind} {name} {len(inputs)} 1 {' '.join([*inputs, out])} {settings}".rstrip())
        blob[value] = out
        blobs += 1
        count = len(readers.get(value, []))
        if count > 1:
            copies[value] = [f"{out}{number}" for number in range(count)]
            lines.append(f"Split {name}_copies 1 {count} {out} {' '.join(copies[value])}")
            blobs += count

    def take(value: str) -> str:
        return copies[value].pop() if value in copies else blob[value]

    emit("Input", "x", [], "x")
    fused: set[str] = set()
    for layer in layers:
        if layer.name in fused:
            continue
        own, inputs, value = layer.module, [take(name) for name in layer.inputs], layer.name
        if layer.kind in ("conv", "linear"):
            bias = own.bias is not None
            weights += [bytes(4), own.weight.detach().numpy().astype(numpy.float32).tobytes()]
            weights += [own.bias.detach().numpy().tobytes()] if bias else []
        if layer.kind == "conv":
            users = readers.get(value, [])
            relu = len(users) == 1 and users[0].kind == "relu"
            if relu:
                value = users[0].name
                fused.add(value)
            shape = f"0={own.out_channels} 1={own.kernel_size[0]} 3={own.stride[0]} 4={own.padding[0]}"
            settings = f"{shape} 5={int(bias)} 6={own.weight.numel()}" + " 9=1" * relu
            emit("Convolution", layer.name, inputs, value, settings)
        elif layer.kind == "linear":
            settings = f"0={own.out_features} 1={int(bias)} 2={own.weight.numel()}"
            emit("InnerProduct", layer.name, inputs, value, settings)
        elif layer.kind == "max_pool":
            settings = f"0=0 1={own.kernel_size} 2={own.stride} 3={own.padding} 5=1"
            emit("Pooling", layer.name, inputs, value, settings)
        elif layer.kind == "mean":
            emit("Pooling", layer.name, inputs, value, "0=1 4=1")
        elif layer.kind in ("add", "sub"):
            emit("BinaryOp", layer.name, inputs, value, f"0={('add', 'sub').index(layer.kind)}")
        else:
            emit({"relu": "ReLU", "flatten": "Flatten"}[layer.kind], layer.name, inputs, value)
    return f"7767517\n{len(lines)} {blobs}\n" + "\n".join(lines) + "\n", b"".join(weights)
