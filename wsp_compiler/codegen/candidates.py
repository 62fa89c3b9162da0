"""Candidates: exact equivalents of one planned layer, among which measurements or a cost model choose."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wsp_compiler.codegen.cpu_configs import cpu_configs
from wsp_compiler.codegen.spec import CpuConfig, CudaConfig, FusedConfig, KernelSpec, ThreeKernelsConfig
from wsp_compiler.errors import OptionError
from wsp_compiler.ops import WinogradSite

Config = FusedConfig | ThreeKernelsConfig | CpuConfig
CONFIGS: dict[str, type[Any]] = {
    "fused": FusedConfig,
    "three_kernels": ThreeKernelsConfig,
    "cpu": CpuConfig,
}
"""Kernel kind -> the dataclass of its knobs."""


@dataclass(frozen=True)
class Candidate:
    """One way to run a layer: a kernel kind of :data:`CONFIGS` and its configuration."""

    kind: str
    config: Config

    def __post_init__(self) -> None:
        if not isinstance(self.config, CONFIGS.get(self.kind, ())):
            raise OptionError(
                f"{self.config!r} does not belong to kernel kind {self.kind!r}",
                where="Candidate",
                fix=f"kinds are {', '.join(CONFIGS)}",
            )

    @property
    def label(self) -> str:
        """Short text for reports, such as "fused tiles=32 groups=1 rows=16"."""
        return " ".join([self.kind, *(f"{name}={value}" for name, value in flat(self.knobs()).items())])

    def knobs(self) -> dict[str, Any]:
        """The configuration as plain data for JSON."""
        return dataclasses.asdict(self.config)


def flat(knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Nested knobs as one level of names."""
    found: dict[str, Any] = {}
    for name, value in knobs.items():
        found |= flat(value) if isinstance(value, Mapping) else {name: value}  # pyright: ignore[reportUnknownArgumentType]
    return found


def candidate_from_knobs(kind: str, knobs: Mapping[str, Any]) -> Candidate:
    """The inverse of :meth:`Candidate.knobs`.

    Raises:
        ValueError: an unknown kind or knob, or a value out of range: a record of another version.
    """
    given = dict(knobs)
    try:
        if kind == "three_kernels":
            given["gemm"] = CudaConfig(**given["gemm"])
        return Candidate(kind, CONFIGS[kind](**given))
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a configuration of kernel kind {kind!r}: {error}") from error


def three_kernels_candidates(max_rows: int, precision: str) -> list[ThreeKernelsConfig]:
    """Block shapes for positions with up to ``max_rows`` kept rows, over slices that fit the L2 cache or not.

    The GEMM in fp32 has one block shape, 128 tiles on 256 threads.
    """
    widths = [16] if max_rows <= 16 else [32] if max_rows <= 32 else [64, 32]
    gemms: list[CudaConfig] = []
    for width in widths:
        warps = 2 if width == 64 else 1
        gemms.append(CudaConfig(block_filters=width, warps_filters=warps))
        if precision != "fp32":
            gemms.append(CudaConfig(block_filters=width, warps_filters=warps, stages=4))
            gemms.append(CudaConfig(64, width, warps_tiles=2, warps_filters=warps))
            gemms.append(CudaConfig(block_filters=width, warps_filters=warps, chunks=8))
    return [ThreeKernelsConfig(gemm, size) for size in (0, 1 << 23, 1 << 22) for gemm in gemms]


def cpu_candidates(spec: KernelSpec, site: WinogradSite, lanes: int, dot: bool = False) -> list[CpuConfig]:
    """Register blockings, slice sizes and ways to use threads; the default one first."""
    return cpu_configs(spec, lanes, [int(count) for count in site.row_offset.diff()], dot)
