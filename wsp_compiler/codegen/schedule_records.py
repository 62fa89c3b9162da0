"""Records of the schedule database: what was run (:class:`LayerKey`, kernel kind, knobs) and how long it took."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VENDOR = "vendor"
"""Kernel kind of the records of PyTorch's dense convolution (cuDNN, oneDNN)."""


@dataclass(frozen=True)
class LayerKey:
    """What a measured time depends on, apart from the kernel.

    Attributes:
        device: GPU name, or vector width and cache sizes of a CPU.
        arch: what cost models are shared across: "sm_90", or "cpu16" for 16 float32 lanes.
        threads: intra-op threads on the CPU, multiprocessors of a GPU.
        filters, channels, height, width, padding, batch: n, c, H, W, (vertical, horizontal), N.
        input_channels_last, output_channels_last: element order of the images.
        dtype, precision: see KernelSpec.
        tile: output tile side m; 0 for the dense convolution, like the next three.
        rows, columns: (mean, largest) number of kept rows and columns per position, padded to a multiple of 8.
        block: size of the filter groups that keep the same number of rows in every position; 0 if there is none.
        epilogue: activation, with "+residual" if one is added.
        generator: digest of the kernel generators, or the version of the vendor's library.
    """

    device: str
    arch: str
    threads: int
    filters: int
    channels: int
    height: int
    width: int
    padding: tuple[int, int]
    batch: int
    input_channels_last: bool
    output_channels_last: bool
    dtype: str
    precision: str
    tile: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    block: int
    epilogue: str
    generator: str

    @property
    def output_size(self) -> tuple[int, int]:
        """(H_out, W_out)."""
        return (self.height + 2 * self.padding[0] - 2, self.width + 2 * self.padding[1] - 2)


_KEY_NAMES = tuple(entry.name for entry in dataclasses.fields(LayerKey))


@dataclass(frozen=True)
class Record:
    """One measurement: median ``us`` microseconds of a call, or the ``error`` that building or running raised."""

    key: LayerKey
    kind: str
    knobs: Mapping[str, Any]
    us: float | None
    error: str = ""

    def __post_init__(self) -> None:
        if self.us is not None and not (math.isfinite(self.us) and self.us > 0):
            raise ValueError(f"a time of {self.us} us")

    @property
    def identity(self) -> str:
        """Equal for two measurements of the same thing."""
        key = [getattr(self.key, name) for name in _KEY_NAMES]
        return json.dumps([key, self.kind, self.knobs], sort_keys=True)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "key": dataclasses.asdict(self.key),
            "kind": self.kind,
            "knobs": dict(self.knobs),
            "us": None if self.us is None else float(f"{self.us:.6g}"),
            **({"error": self.error} if self.error else {}),
        }


def record_from_json(data: Any) -> Record:
    """The inverse of :meth:`Record.to_json`.

    Raises:
        ValueError: not such a record.
    """
    try:
        fields = dict(data["key"])
        for name in ("padding", "rows", "columns"):
            first, second = (int(value) for value in fields[name])
            fields[name] = (first, second)
        us = data["us"]
        return Record(
            LayerKey(**fields),
            str(data["kind"]),
            dict(data["knobs"]),
            None if us is None else float(us),
            str(data.get("error", "")),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
