"""Times of several candidates, measured in interleaved rounds: every candidate once in each.

CUDA: replays of one CUDA graph per candidate, which holds many calls over rotating inputs that together are
at least twice the L2 cache. What cannot be captured is timed by events around plain calls, and says so. Before each
timed replay the candidate runs for 100 ms: a GPU at its power limit changes its clock over tens of milliseconds, and
a candidate that is timed sooner runs at the clock that the one before it left behind (docs/benchmarks.md). The order
of the candidates is drawn anew in every round.
CPU: groups of calls of at least five milliseconds, after a pause and one untimed call.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wsp_compiler.codegen.measure import elapsed_us

Call = Callable[[Tensor], object]

CPU_COVER_BYTES = 64 << 20
CPU_MOST_INPUTS = 16
CPU_GROUP_SECONDS = 5e-3
CPU_PAUSE_SECONDS = 5e-3  # idle worker threads of either library spin for a few milliseconds, then sleep
CUDA_LEAST_CALLS = 32
CUDA_REPLAY_US = 10_000.0
CUDA_SETTLE_US = 100_000.0
CUDA_ROUNDS = 7
BUDGET_SECONDS = 4.0  # per candidate; slow calls get fewer rounds
LEAST_ROUNDS = 5


class Times(dict[str, float]):
    """Label -> median microseconds of one call.

    `how[label]` says how it was measured; `least[label]` is the fastest round, which a busy machine disturbs least.
    """

    def __init__(self) -> None:
        super().__init__()
        self.how: dict[str, str] = {}
        self.least: dict[str, float] = {}

    def enter(self, label: str, samples: Sequence[float], how: str) -> None:
        """The median of one sample per round; `how` also tells their spread."""
        self[label], self.least[label] = statistics.median(samples), min(samples)
        self.how[label] = f"{how}, {len(samples)} rounds from {min(samples):.4g} to {max(samples):.4g} us"


def rotating_inputs(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: str,
    memory_format: torch.memory_format = torch.contiguous_format,
    count: int | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Normal random inputs, at least two, each of `shape`.

    Without `count`, as many as cover twice the L2 cache (CUDA) or 64 MiB with at most 16 inputs (CPU).
    """
    if count is None:
        each = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
        if torch.device(device).type == "cuda":
            count = math.ceil(2 * torch.cuda.get_device_properties(device).L2_cache_size / each)
        else:
            count = min(CPU_MOST_INPUTS, math.ceil(CPU_COVER_BYTES / each))
    generator = torch.Generator(device).manual_seed(seed)
    return [
        torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=memory_format).normal_(
            generator=generator
        )
        for _ in range(max(2, count))
    ]


def measure(
    candidates: Mapping[str, Call],
    inputs: Sequence[Tensor] | Mapping[str, Sequence[Tensor]],
    *,
    rounds: int = 15,
    uncaptured: Collection[str] = (),
) -> Times:
    """Median microseconds of one call of every candidate.

    `inputs` are shared by all candidates, or given per label (other layouts, dtypes); all on one device.
    `uncaptured` names candidates that replay CUDA graphs of their own and must not be captured again.
    """
    if not candidates:
        raise ValueError("nothing to measure: no candidates")
    own = {label: inputs[label] if isinstance(inputs, Mapping) else inputs for label in candidates}
    devices = {x.device.type for xs in own.values() for x in xs}
    if len(devices) != 1 or not all(own.values()):
        raise ValueError(f"each candidate needs inputs, and all of one device; found {sorted(devices)}")
    with torch.no_grad():
        if devices == {"cuda"}:
            return _measure_cuda(candidates, own, rounds, uncaptured)
        return _measure_cpu(candidates, own, rounds)


def _rounds(rounds: int, seconds: float) -> int:
    """Rounds that fit the time budget when one round takes `seconds`."""
    return max(min(rounds, LEAST_ROUNDS), min(rounds, int(BUDGET_SECONDS / max(seconds, 1e-9))))


def _measure_cpu(calls: Mapping[str, Call], inputs: Mapping[str, Sequence[Tensor]], rounds: int) -> Times:
    group: dict[str, int] = {}
    for label, call in calls.items():
        call(inputs[label][0])
        seconds = math.inf
        for i in range(3):
            start = time.perf_counter()
            call(inputs[label][i % len(inputs[label])])
            seconds = min(seconds, time.perf_counter() - start)
        group[label] = min(1000, math.ceil(CPU_GROUP_SECONDS / max(seconds, 1e-7)))
        rounds = _rounds(rounds, seconds * (group[label] + 1))
    samples: dict[str, list[float]] = {label: [] for label in calls}
    for turn in range(rounds):
        for label, call in calls.items():
            xs = inputs[label]
            time.sleep(CPU_PAUSE_SECONDS)
            call(xs[(turn - 1) % len(xs)])
            start = time.perf_counter()
            for i in range(group[label]):
                call(xs[(turn + i) % len(xs)])
            samples[label].append((time.perf_counter() - start) * 1e6 / group[label])
    times = Times()
    for label in calls:
        times.enter(label, samples[label], f"wall clock, groups of {group[label]} calls")
    return times


@dataclass(frozen=True)
class _Batch:
    """Work that is launched and timed as one: `calls` calls, on `stream`."""

    launch: Callable[[], object]
    calls: int
    stream: torch.cuda.Stream
    how: str


def _calls_per_graph(inputs: int, microseconds: float) -> int:
    """Whole turns over the inputs: 32 calls, fewer where those would take over 10 ms."""
    wanted = min(CUDA_LEAST_CALLS, math.ceil(CUDA_REPLAY_US / max(microseconds, 1e-3)))
    return inputs * math.ceil(wanted / inputs)


def _prepare_cuda(call: Call, inputs: Sequence[Tensor], side: torch.cuda.Stream, capture: bool) -> _Batch:
    stream = side if capture else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        for i in range(3):  # builds kernels, lets cuDNN choose its algorithm, fills allocator caches
            call(inputs[i % len(inputs)])
        stream.synchronize()
        calls = _calls_per_graph(len(inputs), elapsed_us(lambda: call(inputs[0]), stream))

        def run() -> None:
            for i in range(calls):
                call(inputs[i % len(inputs)])

        if not capture:
            return _Batch(run, calls, stream, f"events around {calls} calls")
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                run()
        except Exception as error:
            torch.cuda.synchronize()
            reason = str(error).partition("\n")[0]
            return _Batch(run, calls, stream, f"events around {calls} calls (capture failed: {reason})")
        return _Batch(graph.replay, calls, stream, f"CUDA graph of {calls} calls")


def _launch_settled(batch: _Batch) -> float:
    """Microseconds of one launch after others of the same candidate have run for CUDA_SETTLE_US."""
    with torch.cuda.stream(batch.stream):
        once = elapsed_us(batch.launch, batch.stream)
        for _ in range(1 + int(CUDA_SETTLE_US / max(once, 1.0))):
            batch.launch()
        return elapsed_us(batch.launch, batch.stream)


def _measure_cuda(
    candidates: Mapping[str, Call],
    inputs: Mapping[str, Sequence[Tensor]],
    rounds: int,
    uncaptured: Collection[str],
) -> Times:
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    batches = {
        label: _prepare_cuda(call, inputs[label], side, label not in uncaptured)
        for label, call in candidates.items()
    }
    rounds = min(rounds, CUDA_ROUNDS)
    for batch in batches.values():
        rounds = _rounds(rounds, 2e-6 * _launch_settled(batch))
    samples: dict[str, list[float]] = {label: [] for label in batches}
    order = random.Random(0)
    for _ in range(rounds):
        for label in order.sample(list(batches), len(batches)):  # not always warmed by the same neighbour
            samples[label].append(_launch_settled(batches[label]) / batches[label].calls)
    times = Times()
    for label, batch in batches.items():
        times.enter(label, samples[label], batch.how)
    return times
