"""PlanSpeed: the times that a plan decides by, from a :class:`Tuner`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wsp_compiler.codegen.layer import DTYPES, effective_precision, make_layer
from wsp_compiler.codegen.measure import rotating_inputs
from wsp_compiler.codegen.spec import KernelSpec
from wsp_compiler.codegen.tuner import Tuner
from wsp_compiler.ops import WinogradSite
from wsp_compiler.sites import padding_of
from wsp_compiler.sparse_layer import SparseLayer
from wsp_compiler.speed import MEASURED, CallFormat, Timing, add_timings
from wsp_compiler.winograd import transform_weight

CANONICAL_EPILOGUE = "relu"
"""Before lowering the epilogue is not known: both sides are timed with bias and ReLU."""


@dataclass
class PlanSpeed:
    """A :class:`~wsp_compiler.speed.SpeedSource`.

    Layers are assumed to read and write channels_last images, as chains of lowered layers do.

    Attributes:
        tuner: knows or measures times on the target.
        precision: the user's choice of arithmetic, or None.
    """

    tuner: Tuner
    precision: str | None

    def _spec(
        self, conv: nn.Conv2d, call: CallFormat, tile: int, site: WinogradSite | None
    ) -> KernelSpec | None:
        """The kernels for one call, or None where it has no pixels or a dtype without kernels."""
        positions = (tile + 2) ** 2
        if call.dtype not in DTYPES or 0 in call.shape:
            return None
        spec = KernelSpec(
            filters=conv.out_channels,
            channels=conv.in_channels,
            height=call.shape[-2],
            width=call.shape[-1],
            padding=padding_of(conv),
            tile=tile,
            dtype=DTYPES[call.dtype],
            precision=effective_precision(self.precision, call.dtype, self.tuner.target),
            input_channels_last=True,
            output_channels_last=True,
            columns_pruned=site is not None and site.columns.numel() != positions * conv.in_channels,
            rows_pruned=site is not None and site.rows.numel() != positions * conv.out_channels,
            residual=False,
            activation=CANONICAL_EPILOGUE,
        )
        return spec if min(spec.output_size) >= 1 else None

    def pruned(
        self, path: str, conv: nn.Conv2d, keep: Tensor, tile: int, calls: Sequence[CallFormat]
    ) -> Timing | None:
        """See :class:`~wsp_compiler.speed.SpeedSource`."""
        if not self.tuner.knows_device or any(self._spec(conv, call, tile, None) is None for call in calls):
            return None
        device = self.tuner.target.device
        site = WinogradSite(keep.to(device))
        if site.by_element:
            return self._by_element(path, conv, site, tile, calls)
        if self.tuner.level == "off":  # how many weights there are says enough
            site.index(((tile + 2) ** 2, conv.out_channels, conv.in_channels), device)
            site.register_buffer("bias", torch.zeros(conv.out_channels, device=device))
        else:
            site.fill(transform_weight(conv.weight.to(device), tile), conv.bias)
        timings: list[Timing | None] = []
        for call in calls:
            spec = self._spec(conv, call, tile, site)
            assert spec is not None
            layer = make_layer(spec, site, None, self.tuner.target)
            timings.append(self.tuner.choose(layer, _images(call)).timing)
        return add_timings(timings)

    def _by_element(
        self, path: str, conv: nn.Conv2d, site: WinogradSite, tile: int, calls: Sequence[CallFormat]
    ) -> Timing | None:
        """A library's sparse product, of which no times are recorded: measured now, if anything may be."""
        if self.tuner.level == "off":
            return None
        device = self.tuner.target.device
        site.fill(transform_weight(conv.weight.to(device), tile), conv.bias)
        layer = SparseLayer(path, site, None, padding_of(conv), tile, CANONICAL_EPILOGUE, False)
        timings: list[Timing | None] = []
        for call in calls:
            shape = call.shape if len(call.shape) == 4 else (1, *call.shape)
            inputs = rotating_inputs(shape, call.dtype, device, channels_last=True)
            times, _ = self.tuner.measure({layer.label: layer}, {layer.label: inputs})
            us = times.get(layer.label)
            timings.append(None if us is None else Timing(us, MEASURED, layer.label))
        return add_timings(timings)

    def dense(self, path: str, conv: nn.Conv2d, calls: Sequence[CallFormat]) -> Timing | None:
        """See :class:`~wsp_compiler.speed.SpeedSource`."""
        specs = [self._spec(conv, call, 2, None) for call in calls]
        return add_timings(
            [
                None if spec is None else self.tuner.dense(spec, _images(call))
                for spec, call in zip(specs, calls, strict=True)
            ]
        )


def _images(call: CallFormat) -> int:
    return call.shape[0] if len(call.shape) == 4 else 1
