"""One convolution, timed: ours at one or several pruning ratios, its variants, and the vendors', interleaved.

Ours is conv + bias + ReLU, compiled; the vendors' is the convolution alone. `dense_epilogue` is the vendor's
with the same epilogue, what a plan would leave in place of ours; it is listed, and is no baseline.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.arguments import DTYPES, no_less_precise
from benchmarks.cases import ConvCase
from benchmarks.conv_baselines import FORMATS, Variant, variants
from benchmarks.errors import Errors, check, float64_errors
from benchmarks.report import STDERR
from benchmarks.results import Row
from benchmarks.timing import Call, Times, measure, rotating_inputs
from wsp_compiler.vendor_conv import VendorConv

CompileFunction = Callable[..., Any]
DENSE_EPILOGUE = "dense_epilogue"


@dataclass(frozen=True)
class Options:
    """What is compiled and timed, the same for all cases.

    `tile` is 2, 4 or "auto" (both are timed, the faster counts); `wsp` and `column` add WSP and column pruning
    at the same ratios; `baselines` is "own" (the precision of ours, and cuDNN's Winograd) or "all".
    """

    device: str
    dtype: str
    pr: tuple[float, ...] = (0.8,)
    method: str = "bwsp"
    tile: int | str = 2
    layout: str = "channels_last"
    wsp: bool = False
    column: bool = False
    baselines: str = "own"
    tune: str = "off"


@dataclass(frozen=True)
class Candidate:
    """One way to compile the convolution."""

    kind: str  # "ours", "wsp" or "column"
    pr: float
    method: str
    direction: str
    tile: int

    @property
    def label(self) -> str:
        return f"{self.kind} pr={self.pr:g} F{self.tile}"


def candidates(options: Options) -> list[Candidate]:
    """Everything that is compiled."""
    tiles = (2, 4) if options.tile == "auto" else (int(options.tile),)
    found: list[Candidate] = []
    for pr in options.pr:
        kinds = [("ours", options.method if pr else "dense", "row")]
        kinds += [("wsp", "wsp", "row")] * (options.wsp and pr > 0)
        kinds += [("column", options.method, "column")] * (options.column and pr > 0)
        found += [Candidate(kind, pr, *how, tile) for kind, *how in kinds for tile in tiles]
    return found


def conv_relu(case: ConvCase, options: Options) -> nn.Sequential:
    """Conv2d(c, k, 3, padding=1) + ReLU with Kaiming-normal weights and normal bias, seeded by the shape."""
    model = nn.Sequential(nn.Conv2d(case.channels_in, case.channels_out, 3, padding=1), nn.ReLU())
    generator = torch.Generator().manual_seed(case.channels_out * 1009 + case.height)
    nn.init.kaiming_normal_(model[0].weight, nonlinearity="relu", generator=generator)
    nn.init.normal_(model[0].bias, generator=generator)
    return model.to(options.device, DTYPES[options.dtype]).eval().requires_grad_(False)


class Inputs:
    """Rotating inputs [n, c, h, w], made once per (dtype, memory format) and shared by the candidates."""

    def __init__(self, shape: tuple[int, int, int, int], device: str) -> None:
        self.shape, self.device = shape, device
        self.made: dict[tuple[torch.dtype, str], list[Tensor]] = {}

    def get(self, dtype: torch.dtype, layout: str) -> list[Tensor]:
        key = (dtype, layout)
        if key not in self.made:
            self.made[key] = rotating_inputs(self.shape, dtype, self.device, FORMATS[layout])
        return self.made[key]


def _reason(problem: Exception) -> str:
    return f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}"


def _dense_epilogue(model: nn.Sequential, options: Options) -> Call:
    """The vendor's convolution with bias and ReLU, as a compiled model would run it unpruned."""
    conv: Any = model[0]
    how = (conv.stride, conv.padding, conv.dilation, conv.groups)
    launcher = VendorConv(conv.weight, conv.bias, *how, "relu", True)

    def call(x: Tensor) -> Tensor:
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = options.dtype == "tf32"
        try:
            return launcher(x)
        finally:
            torch.backends.cudnn.allow_tf32 = before

    return call


class CaseRun:
    """The candidates and baselines of one shape: compiled, checked, then timed together."""

    def __init__(
        self, case: ConvCase, batch: int, options: Options, compile_function: CompileFunction
    ) -> None:
        self.case, self.batch, self.options = case, batch, options
        self.inputs = Inputs(case.input_shape(batch), options.device)
        self.model = conv_relu(case, options)
        self.calls: dict[str, Call] = {}
        self.given: dict[str, Sequence[Tensor]] = {}
        self.errors: dict[str, Errors] = {}
        self.reports: dict[str, str] = {}
        self.unavailable: dict[str, str] = {}
        self.timed: list[Variant] = []
        for candidate in candidates(options):
            self._attempt(candidate.label, lambda c=candidate: self._compile(c, compile_function))
        self.failed = not any(label.startswith("ours") for label in self.calls)
        if self.failed:
            return
        self._attempt(DENSE_EPILOGUE, self._add_dense_epilogue)
        weight = self.model[0].weight.detach().float().clone()  # [k, c, 3, 3]
        for variant in variants(options.device, options.dtype, weight):
            if self._wanted(variant):
                self._attempt(variant.label, lambda v=variant: self._add_baseline(v))

    def _wanted(self, variant: Variant) -> bool:
        everything = self.options.baselines == "all" or self.options.device == "cpu"
        own = variant.precision == self.options.dtype or variant.baseline == "cudnn_winograd"
        return everything or own

    def _attempt(self, label: str, add: Callable[[], None]) -> None:
        """One candidate less, with its reason in the row, where it cannot run."""
        try:
            with torch.no_grad():
                add()
            if self.options.device == "cuda":
                torch.cuda.synchronize()
        except Exception as problem:
            STDERR.print(traceback.format_exc(limit=-4), markup=False)
            self.calls.pop(label, None)
            self.unavailable[label] = _reason(problem)

    def _own_inputs(self) -> list[Tensor]:
        return self.inputs.get(DTYPES[self.options.dtype], self.options.layout)

    def _compile(self, candidate: Candidate, compile_function: CompileFunction) -> None:
        options, xs = self.options, self._own_inputs()
        compiled = compile_function(
            self.model,
            pr=candidate.pr,
            method=candidate.method,
            direction=candidate.direction,
            tile=candidate.tile,
            precision="tf32" if options.dtype == "tf32" else None,
            keep_slower=True,
            tune=options.tune,
            example_inputs=(xs[0],),
        )
        shape, dtype = self.case.input_shape(self.batch), DTYPES[options.dtype]
        fresh = rotating_inputs(shape, dtype, options.device, FORMATS[options.layout], count=1, seed=1)[0]
        errors = float64_errors(compiled, compiled.graph_module, fresh)
        check(errors, options.dtype, candidate.tile)
        self.errors[candidate.label], self.reports[candidate.label] = errors, str(compiled.report())
        self.calls[candidate.label], self.given[candidate.label] = compiled, xs

    def _add_dense_epilogue(self) -> None:
        xs = self.inputs.get(DTYPES[self.options.dtype], "channels_last")
        call = _dense_epilogue(self.model, self.options)
        call(xs[0])
        self.calls[DENSE_EPILOGUE], self.given[DENSE_EPILOGUE] = call, xs

    def _add_baseline(self, variant: Variant) -> None:
        xs = self.inputs.get(variant.dtype, variant.memory_format)
        call = variant.make(xs[0])
        call(xs[0])
        self.calls[variant.label], self.given[variant.label] = call, xs
        self.timed.append(variant)

    def rows(self) -> list[Row]:
        """One row per pruning ratio."""
        if self.failed:
            return [self._failure(pr) for pr in self.options.pr]
        times = measure(self.calls, self.given)
        best: dict[str, float] = {}
        for variant in self.timed:
            best[variant.baseline] = min(times[variant.label], best.get(variant.baseline, math.inf))
        precisions = {variant.baseline: variant.precision for variant in self.timed}
        rivals = [name for name in best if no_less_precise(precisions[name], self.options.dtype)]
        if not rivals:
            raise RuntimeError(f"no baseline of {self.options.dtype} or better could run: {self.unavailable}")
        strongest = min(rivals, key=lambda name: best[name])
        return [self._row(pr, times, best, strongest) for pr in self.options.pr]

    def _failure(self, pr: float) -> Row:
        reasons = [why for label, why in self.unavailable.items() if label.startswith(f"ours pr={pr:g} ")]
        return {"failure": "; ".join(dict.fromkeys(reasons)), "unavailable": self.unavailable}

    def _row(self, pr: float, times: Times, best: dict[str, float], strongest: str) -> Row:
        found = {
            kind: {c.tile: times[c.label] for c in candidates(self.options) if (c.kind, c.pr) == (kind, pr)
                   and c.label in times}
            for kind in ("ours", "wsp", "column")
        }  # fmt: skip
        if not found["ours"]:
            return self._failure(pr)
        tile = min(found["ours"], key=lambda side: found["ours"][side])
        ours, dense = found["ours"][tile], times.get(DENSE_EPILOGUE)
        label = next(
            c.label for c in candidates(self.options) if (c.kind, c.pr, c.tile) == ("ours", pr, tile)
        )
        ratios = {name: microseconds / ours for name, microseconds in best.items()}
        row: Row = {
            "ours_us": ours,
            "chosen_tile": tile,
            "tiles_us": {f"F{side}": us for side, us in found["ours"].items()},
            "baselines_us": best,
            "ratios": ratios,
            "strongest": strongest,
            "strongest_ratio": ratios[strongest],
            "dense_epilogue_us": dense,
            "a_plan_leaves_it_dense": dense is not None and dense < ours,
            "relative_error": self.errors[label].relative_l2,
            "largest_error_over_rms": self.errors[label].largest_over_rms,
            "direct_multiplies": self.case.direct_multiplies(self.batch),
            "times_us": dict(times),
            "least_us": dict(times.least),
            "how": times.how,
            "unavailable": self.unavailable,
            "report": self.reports[label],
            "failure": None,
        }
        for kind in ("wsp", "column"):
            if found[kind]:
                other = min(found[kind].values())
                row |= {f"{kind}_us": other, f"{kind}_over_ours": other / ours}
        return row


def run_case(case: ConvCase, batch: int, options: Options, compile_function: CompileFunction) -> list[Row]:
    """One row per pruning ratio: microseconds, ratios (theirs / ours), errors, and what could not run."""
    return CaseRun(case, batch, options, compile_function).rows()
