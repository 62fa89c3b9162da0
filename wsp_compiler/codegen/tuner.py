"""Tuner: how a layer runs fastest, and how fast the vendor's dense convolution is.

What is known is asked in this order: the user's own records, the shipped table of this device, records of the layer
with somewhat more kept rows, a cost model fitted to the tables of its architecture, the launchers' own rules. What
is measured depends on the level:

- "off": nothing.
- "fast": where no record says, the vendor and the few candidates that the cost model thinks best.
- "full": all candidates that have no record of the user's own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from wsp_compiler.codegen import measure as measuring
from wsp_compiler.codegen.build_together import build_together
from wsp_compiler.codegen.candidates import Candidate, candidate_from_knobs
from wsp_compiler.codegen.cost_model import CostModel, fit, group_of
from wsp_compiler.codegen.measure import Call, rotating_inputs
from wsp_compiler.codegen.pack_fused import fit_rows
from wsp_compiler.codegen.schedule_keys import arch_of, layer_key, vendor_key
from wsp_compiler.codegen.schedule_records import VENDOR, LayerKey, Record
from wsp_compiler.codegen.schedules import Schedules, open_schedules
from wsp_compiler.codegen.spec import FusedConfig, KernelSpec
from wsp_compiler.codegen.targets import CodeTarget
from wsp_compiler.codegen.vendor import DTYPES, vendor_calls, vendor_settings
from wsp_compiler.errors import OptionError
from wsp_compiler.ops import WinogradSite
from wsp_compiler.speed import LESS_PRUNED, MEASURED, MODEL, TABLE, Timing

FAST_CANDIDATES = 6
"""How many candidates of a layer "fast" measures."""
CPU_NOISE = 0.1
"""On two idle cores the configurations with the best recorded times were as fast as the default, measured again: 1.00x
over twelve layers, 0.92x to 1.18x."""
Measure = Callable[
    [Mapping[str, Call], Mapping[str, Sequence[Tensor]]], tuple[dict[str, float], dict[str, str]]
]


class TunableLayer(Protocol):
    """What :class:`CudaLayer` and :class:`CpuLayer` have in common for tuning."""

    spec: KernelSpec
    site: WinogradSite
    target: CodeTarget

    def candidates(self, tiles: int) -> list[Candidate]: ...
    def accepts(self, candidate: Candidate) -> bool: ...
    def use(self, candidate: Candidate, tiles: int) -> None: ...
    def run(self, x: Tensor, residual: Tensor | None) -> Tensor: ...


@dataclass(frozen=True)
class Choice:
    """The candidate for a layer and its time; ``timing`` is None where nothing is known on this device."""

    candidate: Candidate
    timing: Timing | None


@dataclass
class Tuner:
    """Chooses among the candidates of layers on one target.

    Attributes:
        target: the device.
        level: one of options.TUNE_LEVELS.
        schedules: what has been measured.
        measure: times labelled calls; tests pass their own.
        model_only: ask the cost model even where there are records, for times that compare with each other.
        on_measure: called with a text before each layer that is measured (progress displays).
    """

    target: CodeTarget
    level: str = "off"
    schedules: Schedules = field(default_factory=open_schedules)
    measure: Measure = field(default_factory=lambda: measuring.measure)
    on_measure: Callable[[str], None] | None = None
    model_only: bool = False
    _model: tuple[int, CostModel] | None = field(default=None, init=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tuner:
        return self  # compiled modules that are copied share what has been measured

    @property
    def model(self) -> CostModel:
        """The cost model of the records known now, of this architecture."""
        count = len(self.schedules.records)
        if self._model is None or self._model[0] != count:
            arch = arch_of(self.target)
            self._model = (count, fit(record for record in self.schedules.records if record.key.arch == arch))
        return self._model[1]

    @property
    def knows_device(self) -> bool:
        """True if anything could be known about times on this device: measured now, recorded, or modelled."""
        arch = arch_of(self.target)
        return self.level != "off" or any(record.key.arch == arch for record in self.schedules.records)

    def choose(self, layer: TunableLayer, batch: int) -> Choice:
        """The fastest known way to run ``layer`` on ``batch`` images; it is not applied to the layer."""
        key = layer_key(layer.spec, layer.site, batch, self.target)
        if self._may_measure():
            self._tune(layer, key)
        records, source = self.schedules.find(key)
        best = self._fastest(records, layer)
        if best is not None and source == TABLE:
            other = self._fastest(self.schedules.in_other_groups(key), layer)
            best = other if other is not None and other[1] < best[1] else best
        if best is not None and not self.target.is_cuda:
            best = self._default_unless_slower(records, layer, batch, best)
        if best is not None and not self.model_only:
            return Choice(best[0], Timing(best[1], source, best[0].label))
        near = None if self.model_only else self._fastest(self.schedules.less_pruned(key), layer)
        if near is not None:
            return Choice(near[0], Timing(near[1], LESS_PRUNED, near[0].label))
        return self._modelled(key, layer.candidates(batch * layer.spec.tiles_per_image))

    def dense(self, spec: KernelSpec, batch: int) -> Timing | None:
        """The vendor's convolution with bias and activation in place of a layer of ``spec``."""
        key = vendor_key(spec, batch, self.target)
        if self._may_measure():
            found, source = self.schedules.find(key)
            known = source == MEASURED or (source == TABLE and self.level == "fast")
            if not found or not known:
                self._measure_vendor(spec, key, batch)
        records, source = self.schedules.find(key)
        known = [record.us for record in records if record.us is not None]
        if known:
            return Timing(min(known), source, VENDOR)
        us = self.model.predict(key, VENDOR, {})
        return None if us is None else Timing(us, MODEL, VENDOR)

    @staticmethod
    def _default_unless_slower(
        records: Sequence[Record], layer: TunableLayer, batch: int, best: tuple[Candidate, float]
    ) -> tuple[Candidate, float]:
        """The launcher's own choice where ``best`` is faster by no more than a busy CPU's times vary."""
        default = layer.candidates(batch * layer.spec.tiles_per_image)[0]
        times = [
            r.us
            for r in records
            if r.kind == default.kind and r.knobs == default.knobs() and r.us is not None
        ]
        us = min(times, default=math.inf)
        return (default, us) if us <= best[1] * (1 + CPU_NOISE) else best

    def _may_measure(self) -> bool:
        capturing = self.target.is_cuda and torch.cuda.is_current_stream_capturing()
        return self.level != "off" and not capturing

    @staticmethod
    def _fastest(records: Sequence[Record], layer: TunableLayer) -> tuple[Candidate, float] | None:
        """The fastest record that ``layer`` can run: others do not fit its kept rows or this version."""
        known: list[tuple[float, Candidate]] = []
        for record in records:
            try:
                candidate = candidate_from_knobs(record.kind, record.knobs)
                if isinstance(candidate.config, FusedConfig):
                    candidate = Candidate("fused", fit_rows(candidate.config, layer.site))
            except (ValueError, OptionError):
                continue
            if record.us is not None and layer.accepts(candidate):
                known.append((record.us, candidate))
        if not known:
            return None
        us, candidate = min(known, key=lambda pair: pair[0])
        return candidate, us

    def _modelled(self, key: LayerKey, candidates: Sequence[Candidate]) -> Choice:
        """The launcher's own choice, unless the model finds one that is better by more than the model's error."""
        model, default = self.model, candidates[0]
        expected = model.predict(key, default.kind, default.knobs())
        if expected is None:
            return Choice(default, None)
        best, best_us = default, expected
        for candidate in candidates[1:]:
            us = model.predict(key, candidate.kind, candidate.knobs())
            if us is None:
                continue
            error = model.fitted[group_of(key, candidate.kind)].error
            if us * (1 + error) < expected and us < best_us:
                best, best_us = candidate, us
        return Choice(best, Timing(best_us, MODEL, best.label))

    def _tune(self, layer: TunableLayer, key: LayerKey) -> None:
        records, source = self.schedules.find(key)
        exact = [record for record in records if record.key == key]
        trusted = source in (MEASURED, TABLE) and self._fastest(records, layer) is not None
        if self.level == "fast" and trusted:
            return
        candidates = layer.candidates(key.batch * layer.spec.tiles_per_image)
        if self.level == "fast":
            wanted = self.promising(key, candidates, FAST_CANDIDATES)
        else:
            done = {record.identity for record in exact if source == MEASURED}
            wanted = [c for c in candidates if Record(key, c.kind, c.knobs(), None).identity not in done]
        if wanted:
            self.measure_candidates(layer, key, wanted)

    def promising(self, key: LayerKey, candidates: Sequence[Candidate], count: int) -> list[Candidate]:
        """At most ``count``: the default, the best by the cost model, and of those that it does not know some.

        Of the unknown ones half are the first, since launchers list what they think best first, and half are
        spread over the rest.
        """
        times = {i: self.model.predict(key, c.kind, c.knobs()) for i, c in enumerate(candidates) if i > 0}
        known = sorted((us, i) for i, us in times.items() if us is not None)
        unknown = [i for i, us in times.items() if us is None]
        wanted = min(count, len(candidates)) - 1
        chosen = [
            i for _, i in known[: max(wanted - wanted // 2 * (len(unknown) > 0), wanted - len(unknown))]
        ]
        left = wanted - len(chosen)
        first, rest = unknown[: left - left // 2], unknown[left - left // 2 :]
        spread = [rest[i * len(rest) // (left // 2)] for i in range(left // 2)]
        return [candidates[0], *(candidates[i] for i in (*chosen, *first, *spread))]

    def _say(self, key: LayerKey, what: str) -> None:
        if self.on_measure is not None:
            size = f"{key.filters}x{key.channels} @ {key.height}x{key.width}, N={key.batch}"
            self.on_measure(f"measuring {what} for {size}")

    def _inputs(self, key: LayerKey, channels_last: bool) -> list[Tensor]:
        shape = (key.batch, key.channels, key.height, key.width)
        return rotating_inputs(shape, DTYPES[key.dtype], self.target.device, channels_last)

    def measure_candidates(
        self, layer: TunableLayer, key: LayerKey, candidates: Sequence[Candidate]
    ) -> list[Record]:
        """Time the candidates on copies of ``layer`` and file the records, failures too."""
        self._say(key, f"{len(candidates)} kernels")
        tiles, residual = key.batch * layer.spec.tiles_per_image, None
        if layer.spec.residual:
            size = (key.batch, key.filters, *key.output_size)
            layout = torch.channels_last if key.output_channels_last else torch.contiguous_format
            residual = torch.randn(size, dtype=DTYPES[key.dtype], device=self.target.device)
            residual = residual.contiguous(memory_format=layout)
        inputs = self._inputs(key, key.input_channels_last)
        calls: dict[str, Call] = {}
        by_label: dict[str, Candidate] = {}
        for number, candidate in enumerate(candidates):
            label = f"{number} {candidate.label}"
            by_label[label] = candidate
            calls[label] = _call(layer, candidate, tiles, residual)
        if self.target.is_cuda:
            prepare: Callable[[Candidate], None] = cast("Any", layer).prepare
            build_together([partial(prepare, candidate) for candidate in candidates])
        times, errors = self.measure(calls, dict.fromkeys(calls, inputs))
        records = [
            Record(key, c.kind, c.knobs(), times.get(label), errors.get(label, ""))
            for label, c in by_label.items()
        ]
        self.schedules.add(records)
        return records

    def _measure_vendor(self, spec: KernelSpec, key: LayerKey, batch: int) -> None:
        self._say(key, "the dense convolution")
        made = vendor_calls(spec, self.target.device, batch)
        inputs = {last: self._inputs(key, last) for last in {last for _, last in made.values()}}
        with vendor_settings(spec.precision):
            times, _ = self.measure(
                {label: call for label, (call, _) in made.items()},
                {label: inputs[last] for label, (_, last) in made.items()},
            )
        if times:
            label, us = min(times.items(), key=lambda item: item[1])
            self.schedules.add([Record(key, VENDOR, {"how": label}, us)])


def _call(layer: TunableLayer, candidate: Candidate, tiles: int, residual: Tensor | None) -> Call:
    """A call that builds the candidate at its first use, on a layer of its own."""
    made: list[TunableLayer] = []

    def call(x: Tensor) -> Tensor:
        if not made:
            own = cast("TunableLayer", dataclasses.replace(cast("Any", layer)))
            own.use(candidate, tiles)
            made.append(own)
        return made[0].run(x, residual)

    return call
