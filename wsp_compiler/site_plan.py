"""SitePlan: what happens to one convolution, as data and as JSON."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsp_compiler.errors import PlanError
from wsp_compiler.options import DIRECTIONS, METHODS, TILES
from wsp_compiler.winograd import transform

UNDIRECTED = ("dense", "fp", "wwp")
"""Methods to which "row" and "column" mean nothing."""


@dataclass(frozen=True, eq=False)
class SitePlan:
    """What happens to one convolution.

    Attributes:
        path: module path of the convolution.
        method, direction, tile: pattern and output tile side; direction is "row" where it has no meaning.
        pr: the share that was asked for; for "fp" more, where a pruned filter's channel has to stay as a carrier.
        block: rows are balanced within groups of so many filters; None: within each position (or not at all).
        keep: bool, broadcastable to [p*p, n, c], True = kept, in the original filter order. Whole rows or whole
            columns, but for method "wwp", which keeps single elements.
        shape: (p*p, n, c).
        winograd: False for method "fp" where the vendor's library runs the kept filters as a smaller convolution.
    """

    path: str
    method: str
    direction: str
    tile: int
    pr: float
    keep: Tensor
    shape: tuple[int, int, int]
    block: int | None = None
    winograd: bool = True

    def __post_init__(self) -> None:
        fault = self._fault()
        if fault is not None:
            raise PlanError(
                fault, where=self.path or "SitePlan", fix="make plans with wsp_compiler.compile or make_plan"
            )

    def _fault(self) -> str | None:
        """What is wrong with the plan, or None."""
        if self.method not in METHODS or self.direction not in DIRECTIONS or self.tile not in TILES:
            return f"unknown method {self.method!r}, direction {self.direction!r} or tile {self.tile!r}"
        if not 0 <= self.pr < 1:
            return f"pruning ratio {self.pr} is not in [0, 1)"
        if min(self.shape) < 1 or self.shape[0] != transform(self.tile).positions:
            return f"[p*p, n, c] = {list(self.shape)} does not belong to tile {self.tile}"
        sizes = zip(self.keep.shape, self.shape, strict=False)
        if (
            self.keep.dtype != torch.bool
            or self.keep.dim() != 3
            or any(k not in (1, size) for k, size in sizes)
        ):
            found = f"{self.keep.dtype} {list(self.keep.shape)}"
            return f"keep is {found}, not bool and broadcastable to {list(self.shape)}"
        if self.method != "wwp" and 1 not in self.keep.shape[1:]:
            return f"keep {list(self.keep.shape)} has neither whole rows nor whole columns"
        if self.block is not None and (self.block < 1 or self.shape[1] % self.block):
            return f"groups of {self.block} filters do not divide {self.shape[1]}"
        if not self.winograd and self.method != "fp":
            return f"method {self.method!r} has no other form than Winograd"
        return None if bool(self.keep.any()) else "it keeps nothing"

    @property
    def kept_weights(self) -> int:
        """Number of Winograd weights kept."""
        shared = math.prod(size for size, k in zip(self.shape, self.keep.shape, strict=True) if k == 1)
        return int(self.keep.sum()) * shared

    @property
    def kept_fraction(self) -> float:
        """Kept weights / all Winograd weights; 1 - this is the achieved pruning ratio."""
        return self.kept_weights / math.prod(self.shape)

    @property
    def pattern(self) -> str:
        """Short name as in the papers: dense, FP, WWP, WSP-R, BWSP-C; BWSP-R/128 balances groups of 128 filters."""
        if self.method == "dense":
            return "dense"
        suffix = "" if self.method in UNDIRECTED else f"-{self.direction[0].upper()}"
        return self.method.upper() + suffix + (f"/{self.block}" if self.block is not None else "")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SitePlan):
            return NotImplemented
        return site_to_json(self) == site_to_json(other)

    def __hash__(self) -> int:
        return hash((self.path, self.method, self.direction, self.tile, self.pr, self.shape))


def site_to_json(site: SitePlan) -> dict[str, Any]:
    """JSON values; ``keep`` as base64 of its packed bits."""
    bits = np.packbits(site.keep.cpu().flatten().numpy())
    return {
        "path": site.path,
        "method": site.method,
        "direction": site.direction,
        "tile": site.tile,
        "pr": site.pr,
        "shape": list(site.shape),
        "block": site.block,
        "winograd": site.winograd,
        "keep_shape": list(site.keep.shape),
        "keep": base64.b64encode(bits.tobytes()).decode("ascii"),
    }


def site_from_json(entry: dict[str, Any]) -> SitePlan:
    """The inverse of :func:`site_to_json`; raises what damaged values raise."""
    p2, n, c = (int(size) for size in entry["shape"])
    keep_shape = tuple(int(size) for size in entry["keep_shape"])
    bits = np.frombuffer(base64.b64decode(entry["keep"], validate=True), dtype=np.uint8)
    count = math.prod(keep_shape)
    if min(keep_shape) < 1 or len(bits) != -(-count // 8):
        raise ValueError(f"{entry['path']}: {len(bits)} bytes of keep for {list(keep_shape)} bits")
    keep = torch.as_tensor(np.unpackbits(bits, count=count).astype(bool)).view(keep_shape)
    return SitePlan(
        str(entry["path"]), str(entry["method"]), str(entry["direction"]), int(entry["tile"]),
        float(entry["pr"]), keep, (p2, n, c), None if entry.get("block") is None else int(entry["block"]),
        bool(entry.get("winograd", True)),
    )  # fmt: skip
