"""Packed weights are shared by the kernels of one convolution and die with it."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import torch

from wsp_compiler.codegen import packed as module
from wsp_compiler.codegen.cuda_launch import CudaLayer
from wsp_compiler.codegen.packed import packed
from wsp_compiler.ops import WinogradSite

from .emulation import TARGET, make_case


def test_packed_once_per_site_and_key() -> None:
    first, second = (WinogradSite(torch.ones(1, dtype=torch.bool)) for _ in range(2))
    made: list[int] = []

    def pack() -> int:
        made.append(len(made))
        return made[-1]

    assert [packed(first, "a", pack), packed(first, "a", pack)] == [0, 0]
    assert [packed(first, "b", pack), packed(second, "a", pack)] == [1, 2]
    site = weakref.ref(first)
    before = len(module._packed)
    del first
    gc.collect()
    assert site() is None
    assert len(module._packed) == before - 1


def test_image_sizes_and_epilogues_of_a_layer_share_its_weights() -> None:
    case = make_case()
    others = [
        case.spec,
        replace(case.spec, height=20, width=9, activation="relu6"),
        replace(case.spec, precision="fp32" if case.spec.precision != "fp32" else "tf32"),
    ]
    a, b, c = (CudaLayer(spec, case.site, None, TARGET).weights for spec in others)
    assert a is b
    assert a is not c
