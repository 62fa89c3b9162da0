"""CPU runtimes that a compiled convolution is compared with, besides PyTorch's eager mode.

torch.compile with frozen weights, ONNX Runtime, OpenVINO and ncnn with its Winograd convolution, all in float32 and
with PyTorch's number of threads. Weights and input are given to each in the way it likes best, and outputs stay in
its own memory: bound buffers (ONNX Runtime, OpenVINO), packed blobs at both ends (ncnn), so that no conversion counts
against it. Each is optional: one that cannot be imported raises as it is made, which callers list.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from benchmarks.timing import Call


def onnx_convolution(weight: Tensor, shape: tuple[int, ...]) -> bytes:
    """An ONNX model of one 3x3 convolution, padding 1; weight: [k, c, 3, 3], input of ``shape`` [n, c, h, w]."""
    onnx: Any = importlib.import_module("onnx")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    graph = helper.make_graph(
        [node],
        "convolution",
        [helper.make_tensor_value_info("x", float32, list(shape))],
        [helper.make_tensor_value_info("y", float32, [shape[0], weight.shape[0], *shape[2:]])],
        [onnx.numpy_helper.from_array(weight.numpy(), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model.SerializeToString()


def onnx_runtime(model: bytes, x: Tensor) -> Call:
    """ONNX Runtime on a model with one input and one output, of contiguous inputs like x."""
    ort: Any = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    bindings: dict[int, Any] = {}

    def call(x: Tensor) -> Any:
        binding = bindings.get(x.data_ptr())
        if binding is None:
            binding = bindings[x.data_ptr()] = session.io_binding()
            binding.bind_ortvalue_input(given.name, ort.OrtValue.ortvalue_from_numpy(x.numpy()))
            shape = [size if isinstance(size, int) else x.shape[0] for size in made.shape]
            output = ort.OrtValue.ortvalue_from_numpy(numpy.empty(shape, numpy.float32))
            binding.bind_ortvalue_output(made.name, output)
        session.run_with_iobinding(binding)
        return binding

    call.result = lambda binding: binding.copy_outputs_to_cpu()[0]  # type: ignore[attr-defined]
    return call


def openvino(model: bytes, x: Tensor) -> Call:
    """OpenVINO on a model with one input and one output, of contiguous inputs like x."""
    ov: Any = importlib.import_module("openvino")
    core = ov.Core()
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # it would choose bfloat16 where the CPU has it
    }
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    tensors: dict[int, Any] = {}

    def call(x: Tensor) -> Any:
        tensor = tensors.get(x.data_ptr())
        if tensor is None:
            tensor = tensors[x.data_ptr()] = ov.Tensor(x.numpy(), shared_memory=True)
        request.set_input_tensor(tensor)
        request.infer()
        return request

    call.result = lambda request: request.get_output_tensor().data.copy()  # type: ignore[attr-defined]
    return call


def _ncnn_options(net: Any) -> None:
    for name in ("use_winograd_convolution", "use_sgemm_convolution", "use_packing_layout"):
        setattr(net.opt, name, True)
    for name in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(net.opt, name, False)
    net.opt.num_threads = torch.get_num_threads()


def _elements_per_pack(channels: int) -> int:
    """Channels that ncnn keeps side by side on this CPU."""
    widest = {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)
    return next(pack for pack in (widest, 8, 4, 1) if pack <= widest and channels % pack == 0)


def ncnn_network(layers: str, weights: bytes, x: Tensor) -> Call:
    """ncnn on a network from blob "x" to blob "y" and single images like x: [1, c, h, w].

    Its blobs have no batch dimension. ``layers`` and ``weights`` are the contents of a .param and a .bin file.
    """
    ncnn: Any = importlib.import_module("ncnn")
    if x.shape[0] != 1:
        raise ValueError("ncnn takes one image at a time")
    net = ncnn.Net()
    _ncnn_options(net)
    with tempfile.TemporaryDirectory() as folder:
        layout, data = Path(folder) / "net.param", Path(folder) / "net.bin"
        layout.write_text(layers)
        data.write_bytes(weights)
        if net.load_param(str(layout)) or net.load_model(str(data)):
            raise RuntimeError("ncnn cannot load the network")
    pack = _elements_per_pack(x.shape[1])
    blobs: dict[int, Any] = {}

    def call(x: Tensor) -> Any:
        blob = blobs.get(x.data_ptr())
        if blob is None:
            blob = ncnn.Mat(x[0].numpy()).clone()
            if pack > 1:
                blob = ncnn.convert_packing(blob, pack, net.opt)
            blobs[x.data_ptr()] = blob
        extractor = net.create_extractor()
        extractor.input("x", blob)
        return extractor.extract("y", 1)[1]  # 1: as packed as it comes

    def result(blob: Any) -> Any:
        return numpy.array(ncnn.convert_packing(blob, 1, net.opt))[None]

    call.result = result  # type: ignore[attr-defined]
    return call


def ncnn_convolution(weight: Tensor, x: Tensor) -> Call:
    """ncnn on one 3x3 convolution, padding 1; weight: [k, c, 3, 3], x: [1, c, h, w]."""
    layers = "7767517\n2 2\nInput x 0 1 x\nConvolution conv 1 1 x y "
    return ncnn_network(
        f"{layers}0={weight.shape[0]} 1=3 4=1 5=0 6={weight.numel()}\n",
        bytes(4) + weight.numpy().tobytes(),
        x,
    )


def inductor(model: nn.Module, x: Tensor) -> Call:
    """torch.compile with frozen weights, built by calls on x."""
    import torch._inductor.config

    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        compiled: Any = torch.compile(model, dynamic=False)
        for _ in range(2):
            compiled(x)
    return compiled


class Convolution(nn.Module):
    """A 3x3 convolution, padding 1, without bias; weight: [k, c, 3, 3]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[n, c, h, w] -> [n, k, h, w]"""
        return nn.functional.conv2d(x, self.weight, padding=1)


def makers(weight: Tensor) -> dict[str, tuple[str, Callable[[Tensor], Call]]]:
    """Name -> (memory format of its inputs, a function that makes its call for inputs like x)."""

    def compiled(x: Tensor) -> Call:
        return inductor(Convolution(weight.contiguous(memory_format=torch.channels_last)).eval(), x)

    return {
        "torch_compile": ("channels_last", compiled),
        "onnxruntime": ("contiguous", lambda x: onnx_runtime(onnx_convolution(weight, tuple(x.shape)), x)),
        "openvino": ("contiguous", lambda x: openvino(onnx_convolution(weight, tuple(x.shape)), x)),
        "ncnn": ("contiguous", lambda x: ncnn_convolution(weight, x)),
    }


def result(call: Call, x: Tensor) -> Tensor:
    """What a call computes, as a tensor [n, k, h, w]."""
    made = call(x)
    return made if isinstance(made, Tensor) else torch.from_numpy(numpy.asarray(call.result(made)))  # type: ignore[attr-defined]
