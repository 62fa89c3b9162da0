"""A cost model for layers without records: time = sum of work / rate, the rates fitted to the records there are.

    t = launches * a + bytes * b + multiplies * c + ...          (all rates >= 0, one set per arch, kernel kind,
                                                                  precision and dtype)

is fitted by least squares of log t (Levenberg-Marquardt on the logarithms of the rates), so that a ratio counts the
same for short and for long layers. What the knobs of a configuration change beyond its amounts of work is one factor
per knob value, fitted to the remaining error by ridge regression. The amounts come from the shape alone: this is a
roofline whose ceilings are measured. For the fused kernel the estimate of its launcher is one of the amounts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wsp_compiler.codegen.candidates import flat
from wsp_compiler.codegen.fused_estimate import estimated_cycles
from wsp_compiler.codegen.schedule_records import VENDOR, LayerKey, Record
from wsp_compiler.codegen.spec import FusedConfig, KernelSpec

LEAST_RECORDS = 4
"""Fewer layers than that fit nothing."""
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
OPERAND_BYTES = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2}
KNOB_RIDGE = 1.0
Group = tuple[str, str, str, str]
Array = Any
"""numpy array of float64; its own types defeat the type checker in arithmetic."""
_solve: Any = np.linalg.solve


def _ceil(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _image_bytes(key: LayerKey) -> float:
    """Input, output and residual, each once."""
    (height, width), residual = key.output_size, key.epilogue.endswith("+residual")
    pixels_in, pixels_out = key.height * key.width, height * width
    elements = key.channels * pixels_in + key.filters * pixels_out * (2 if residual else 1)
    return float(key.batch * elements * ITEM_BYTES[key.dtype])


def _tiles(key: LayerKey) -> int:
    height, width = key.output_size
    return key.batch * -(-height // key.tile) * -(-width // key.tile)


def _spec(key: LayerKey) -> KernelSpec:
    return KernelSpec(
        filters=key.filters,
        channels=key.channels,
        height=key.height,
        width=key.width,
        padding=key.padding,
        tile=key.tile,
        dtype=key.dtype,
        precision=key.precision,
        input_channels_last=key.input_channels_last,
        output_channels_last=key.output_channels_last,
        columns_pruned=key.columns[0] < key.channels,
        rows_pruned=key.rows[0] < key.filters,
        residual=key.epilogue.endswith("+residual"),
        activation=key.epilogue.partition("+")[0],
    )


def _fused_config(knobs: Mapping[str, Any]) -> FusedConfig:
    try:
        return FusedConfig(**knobs)
    except TypeError as error:  # knobs of another version of the kernel; values out of range are ValueErrors
        raise ValueError(str(error)) from error


def amounts(key: LayerKey, kind: str, knobs: Mapping[str, Any]) -> tuple[float, ...]:
    """The amounts of work of one call, in a fixed order for each kernel kind; launches first.

    Raises:
        ValueError: ``knobs`` are not those of the kernel as it is now.
    """
    images = _image_bytes(key)
    if kind == VENDOR:
        height, width = key.output_size
        multiplies = 9.0 * key.filters * key.channels * key.batch * height * width
        weights = 9.0 * key.filters * key.channels * OPERAND_BYTES[key.precision]
        depth = 9.0 * key.channels  # the longest chain: what a layer of few blocks waits for
        per_thread = multiplies / max(key.threads, 1)
        return (1.0, images, per_thread, weights, depth)
    positions, T = (key.tile + 2) ** 2, _tiles(key)
    c, n, rows = key.columns[0], key.filters, key.rows[0]
    transforms = float(positions * T) * (key.channels + n)
    if kind == "fused":
        cycles = estimated_cycles(_spec(key), _fused_config(knobs), T, max(key.threads, 1))
        return (1.0, images, cycles)
    if kind == "three_kernels":
        item = OPERAND_BYTES[key.precision]
        widest = max(positions * c, positions * rows)
        slice_elements = int(knobs.get("slice_elements", 0)) or 1 << 25
        slices = math.ceil(T * widest / slice_elements)
        block = int(flat(knobs).get("block_filters", 32))
        padded = _ceil(max(key.rows[1], 1), block)
        spilled = 1.0 if T * positions * c * item > slices * 3e7 else 0.0  # V of a slice leaves the L2 cache
        moved = float(positions * T) * (c * item + 4 * rows)
        return (float(slices), images, moved, spilled * moved, float(positions * padded) * T * c, transforms)
    if kind == "cpu":
        threads = max(key.threads, 1)
        padded = positions * _ceil(rows, int(knobs["rows"]))
        return (
            1.0,
            images / threads,
            float(positions * T * key.channels) / threads,
            float(positions * T * n) / threads,
            float(padded * T * c) / threads,
            float(padded * c) * 4.0,
        )
    raise ValueError(f"unknown kernel kind {kind!r}")


def _fit_rates(work: Array, log_us: Array, rounds: int = 100) -> Array:
    """Rates >= 0 that minimise the squares of log(work @ rates) - log_us; work [records, terms], float64."""
    terms = work.shape[1]
    scale = work.max(axis=0)
    scale[scale == 0] = 1.0
    scaled = work / scale
    logs: Array = np.full(terms, float(log_us.mean()) - math.log(terms))
    # A weak pull to where it stands keeps terms that the records do not tell apart from running away.
    pull, damping = 1e-6 * np.eye(terms), 1.0

    def residual(logs: Array) -> tuple[Array, Array]:
        parts = scaled * np.exp(logs)  # [records, terms]
        total = parts.sum(axis=1)
        return np.log(total) - log_us, parts / total[:, None]

    error, jacobian = residual(logs)
    for _ in range(rounds):
        normal = jacobian.T @ jacobian + pull
        step = _solve(normal + damping * normal * np.eye(terms), -(jacobian.T @ error))
        trial = (logs + step.clip(-3.0, 3.0)).clip(-40.0, 40.0)
        new_error, new_jacobian = residual(trial)
        gain = float(error @ error) - float(new_error @ new_error)
        if gain > 0:
            logs, error, jacobian, damping = trial, new_error, new_jacobian, max(damping / 4, 1e-6)
        else:
            damping *= 4
        if damping > 1e8 or 0 < gain < 1e-9 * float(error @ error):
            break
    return np.exp(logs) / scale


@dataclass(frozen=True)
class FittedKind:
    """The model of one kernel kind on one arch: rates, knob factors, and how well they fit.

    Attributes:
        rates: microseconds per unit of each amount of :func:`amounts`.
        knob_logs: "name=value" -> logarithm of its factor.
        error: root mean square of log(predicted / measured) over the records.
        records: number of records it was fitted to.
    """

    rates: tuple[float, ...]
    knob_logs: Mapping[str, float]
    error: float
    records: int

    def predict(self, key: LayerKey, kind: str, knobs: Mapping[str, Any]) -> float:
        """Microseconds."""
        base = math.fsum(
            rate * work for rate, work in zip(self.rates, amounts(key, kind, knobs), strict=True)
        )
        return base * math.exp(sum(self.knob_logs.get(name, 0.0) for name in _knob_names(knobs)))


def _knob_names(knobs: Mapping[str, Any]) -> list[str]:
    """ "name=value" of every knob."""
    return [f"{name}={value}" for name, value in sorted(flat(knobs).items())]


def _fit_knobs(records: Sequence[Record], left: Array) -> dict[str, float]:
    """Factors, as logarithms, for the values of knobs that vary; ``left`` is log(measured / predicted)."""
    values: dict[str, set[str]] = {}
    for record in records:
        for name in _knob_names(record.knobs):
            values.setdefault(name.partition("=")[0], set()).add(name)
    columns = [name for names in values.values() if len(names) > 1 for name in sorted(names)]
    if not columns:
        return {}
    index = {name: i for i, name in enumerate(columns)}
    design: Array = np.zeros((len(records), len(columns)))
    for row, record in enumerate(records):
        for name in _knob_names(record.knobs):
            if name in index:
                design[row, index[name]] = 1.0
    solved = _solve(design.T @ design + KNOB_RIDGE * np.eye(len(columns)), design.T @ left)
    return {name: float(solved[i]) for name, i in index.items()}


def fit_kind(records: Sequence[Record]) -> FittedKind | None:
    """Fit one group of successful records; None if they are of too few layers."""
    if len({record.key for record in records}) < LEAST_RECORDS:
        return None
    work: Array = np.array([amounts(r.key, r.kind, r.knobs) for r in records])
    log_us: Array = np.log(np.array([r.us for r in records], dtype=np.float64))
    knobs: dict[str, float] = {}

    def knob_part() -> Array:
        return np.array([sum(knobs.get(name, 0.0) for name in _knob_names(r.knobs)) for r in records])

    rates = _fit_rates(work, log_us)
    for _ in range(3):  # rates and factors in turn, each on what the other leaves
        knobs = _fit_knobs(records, log_us - np.log(work @ rates))
        rates = _fit_rates(work, log_us - knob_part())
    error = np.log(work @ rates) + knob_part() - log_us
    rms = math.sqrt(float(error @ error) / len(records))
    return FittedKind(tuple(float(rate) for rate in rates), knobs, rms, len(records))


def group_of(key: LayerKey, kind: str) -> Group:
    """Which records share one fit: arch, kernel kind, precision, dtype."""
    return (key.arch, kind, key.precision, key.dtype)


@dataclass(frozen=True)
class CostModel:
    """A :class:`FittedKind` for every group of records that is large enough."""

    fitted: Mapping[Group, FittedKind]

    def predict(self, key: LayerKey, kind: str, knobs: Mapping[str, Any]) -> float | None:
        """Microseconds, or None where nothing was fitted."""
        found = self.fitted.get(group_of(key, kind))
        try:
            return None if found is None else found.predict(key, kind, knobs)
        except ValueError:
            return None


def _is_current(record: Record) -> bool:
    try:
        amounts(record.key, record.kind, record.knobs)
    except (ValueError, KeyError):
        return False
    return True


def fit(records: Iterable[Record]) -> CostModel:
    """Fit every group of the records that succeeded, leaving out knobs of other versions of the kernels."""
    groups: dict[Group, list[Record]] = {}
    for record in records:
        if record.us is not None and _is_current(record):
            groups.setdefault(group_of(record.key, record.kind), []).append(record)
    fits = {group: fit_kind(members) for group, members in groups.items()}
    return CostModel({group: found for group, found in fits.items() if found is not None})
