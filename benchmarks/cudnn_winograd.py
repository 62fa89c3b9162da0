"""cuDNN's own Winograd convolution, called by name through its v7 API with ctypes.

PyTorch cannot force one algorithm. cuDNN 9 still has cudnnConvolutionForward, which takes it as a number;
WINOGRAD_NONFUSED (7) is the only Winograd left on recent GPUs, in NCHW only.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import weakref
from pathlib import Path

import torch
from torch import Tensor

ALGORITHMS = {"WINOGRAD": 6, "WINOGRAD_NONFUSED": 7}
LIBRARY = "libcudnn.so.9"
_DATA_TYPES = {torch.float32: 0, torch.float16: 2}
_FLOAT, _NCHW, _CROSS_CORRELATION = 0, 0, 1
_MATH = {torch.float32: 3, torch.float16: 1}  # fp32: FMA only, no TF32; fp16: tensor cores allowed


class CudnnUnavailableError(RuntimeError):
    """There is no GPU or no cuDNN to call."""


class CudnnError(RuntimeError):
    """A cuDNN call failed; `status` is cuDNN's number."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def _open(name: str, mode: int) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name, mode=mode)
    except OSError:
        return None


@functools.cache
def library() -> ctypes.CDLL:
    """cuDNN as PyTorch has loaded it, else from the nvidia.cudnn package, else from the system's path."""
    loaded = getattr(os, "RTLD_NOLOAD", None)
    found = None if loaded is None else _open(LIBRARY, loaded | os.RTLD_NOW)
    if found is None:
        try:
            spec = importlib.util.find_spec("nvidia.cudnn")
        except ModuleNotFoundError:
            spec = None
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            found = found or _open(str(Path(folder) / "lib" / LIBRARY), ctypes.RTLD_GLOBAL)
    found = found or _open(LIBRARY, ctypes.RTLD_GLOBAL)
    if found is None:
        raise CudnnUnavailableError(
            f"{LIBRARY} is neither loaded by PyTorch, nor in the nvidia.cudnn package, "
            "nor on the library path; install a CUDA build of PyTorch or nvidia-cudnn"
        )
    found.cudnnGetErrorString.restype = ctypes.c_char_p
    found.cudnnGetVersion.restype = ctypes.c_size_t
    return found


def _check(status: int, what: str) -> None:
    if status:
        name = library().cudnnGetErrorString(status).decode()
        raise CudnnError(f"cuDNN {library().cudnnGetVersion()}, {what}: {name}", status)


class _Handles:
    """A cuDNN handle and the four descriptors of a convolution; destroyed with their owner."""

    KINDS = ("Tensor", "Tensor", "Filter", "Convolution")

    def __init__(self) -> None:
        self.context = ctypes.c_void_p()
        _check(library().cudnnCreate(ctypes.byref(self.context)), "cudnnCreate")
        self.descriptors: list[ctypes.c_void_p] = []
        for kind in self.KINDS:
            descriptor = ctypes.c_void_p()
            create = getattr(library(), f"cudnnCreate{kind}Descriptor")
            _check(create(ctypes.byref(descriptor)), f"cudnnCreate{kind}Descriptor")
            self.descriptors.append(descriptor)

    def destroy(self) -> None:
        for kind, descriptor in zip(self.KINDS, self.descriptors, strict=False):
            getattr(library(), f"cudnnDestroy{kind}Descriptor")(descriptor)
        library().cudnnDestroy(self.context)


class WinogradNonfused:
    """`call(x)` = 3x3, stride 1, padding 1 convolution by one named cuDNN algorithm, without bias.

    x: [n, c, h, w] and weight: [k, c, 3, 3], both fp32 or both fp16, contiguous (NCHW), on one GPU.
    The output, [n, k, h, w], is the same tensor at every call unless one is given. `CudnnError` tells what cuDNN
    refuses.
    """

    def __init__(self, x: Tensor, weight: Tensor, algorithm: str | int = "WINOGRAD_NONFUSED") -> None:
        if not torch.cuda.is_available() or not x.is_cuda:
            raise CudnnUnavailableError(
                f"cuDNN's {algorithm} needs tensors on a CUDA GPU; got {x.device}, "
                f"and PyTorch sees {torch.cuda.device_count()} GPUs"
            )
        if x.dtype not in _DATA_TYPES or weight.dtype != x.dtype:
            raise ValueError(f"needs fp32 or fp16 for both tensors, got {x.dtype} and {weight.dtype}")
        n, c, h, w = x.shape
        k = weight.shape[0]
        if weight.shape != (k, c, 3, 3):
            raise ValueError(f"weight must be [k, {c}, 3, 3], got {list(weight.shape)}")
        self.shape, self.dtype, self.weight = x.shape, x.dtype, weight.contiguous()
        if isinstance(algorithm, str) and algorithm not in ALGORITHMS:
            raise ValueError(f"unknown algorithm {algorithm!r}; known: {', '.join(ALGORITHMS)}")
        self.algorithm = ALGORITHMS[algorithm] if isinstance(algorithm, str) else algorithm
        self._what = f"algorithm {algorithm} on {x.dtype} NCHW {n}x{c}x{h}x{w}, {k} filters"
        self._handles = _Handles()
        weakref.finalize(self, self._handles.destroy).atexit = False
        lib, (dx, dy, dw, conv) = library(), self._handles.descriptors
        kind = _DATA_TYPES[x.dtype]
        _check(lib.cudnnSetTensor4dDescriptor(dx, _NCHW, kind, n, c, h, w), "input descriptor")
        _check(lib.cudnnSetTensor4dDescriptor(dy, _NCHW, kind, n, k, h, w), "output descriptor")
        _check(lib.cudnnSetFilter4dDescriptor(dw, kind, _NCHW, k, c, 3, 3), "filter descriptor")
        _check(  # padding, stride and dilation are 1 in both directions
            lib.cudnnSetConvolution2dDescriptor(conv, 1, 1, 1, 1, 1, 1, _CROSS_CORRELATION, _FLOAT),
            "convolution descriptor",
        )
        _check(lib.cudnnSetConvolutionMathType(conv, _MATH[x.dtype]), "math type")
        size = ctypes.c_size_t()
        _check(
            lib.cudnnGetConvolutionForwardWorkspaceSize(
                self._handles.context, dx, dw, conv, dy, self.algorithm, ctypes.byref(size)
            ),
            self._what,
        )
        self._workspace_bytes = size
        self._workspace = torch.empty(max(size.value, 1), dtype=torch.uint8, device=x.device)
        self.output = torch.empty((n, k, h, w), dtype=x.dtype, device=x.device)  # [n, k, h, w]
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)

    def __call__(self, x: Tensor, output: Tensor | None = None) -> Tensor:
        """x: [n, c, h, w], as at construction -> [n, k, h, w]; runs on PyTorch's current stream."""
        output = self.output if output is None else output
        if x.shape != self.shape or x.dtype != self.dtype or not x.is_contiguous():
            raise ValueError(f"made for contiguous {self.dtype} {list(self.shape)}, got {list(x.shape)}")
        lib, (dx, dy, dw, conv) = library(), self._handles.descriptors
        stream = ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream)
        _check(lib.cudnnSetStream(self._handles.context, stream), "stream")
        status = lib.cudnnConvolutionForward(
            self._handles.context,
            ctypes.byref(self._one),
            dx,
            ctypes.c_void_p(x.data_ptr()),
            dw,
            ctypes.c_void_p(self.weight.data_ptr()),
            conv,
            self.algorithm,
            ctypes.c_void_p(self._workspace.data_ptr()),
            self._workspace_bytes,
            ctypes.byref(self._zero),
            dy,
            ctypes.c_void_p(output.data_ptr()),
        )
        _check(status, self._what)
        return output
