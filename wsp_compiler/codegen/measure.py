"""Times of calls on the device, interleaved: A B A B, never A A B B; medians.

CUDA: replays of one CUDA graph per call, each graph holding calls on rotating inputs that together are larger than
the L2 cache. CPU: groups of calls over rotating inputs. Inputs are random and not zero: zeros draw less power and
run faster.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from wsp_compiler.errors import BuildError

Call = Callable[[Tensor], object]

CUDA_CALLS = 24
CUDA_GRAPH_US = 6_000.0
MOST_INPUTS = 2048
CPU_COVER_BYTES = 48 << 20
CPU_MOST_INPUTS = 8
CPU_GROUP_SECONDS = 2e-3
CPU_PAUSE_SECONDS = 3e-3
"""Idle workers of OpenMP and of TVM's pool spin for a few milliseconds and would slow the next library down."""


def rotating_inputs(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, channels_last: bool
) -> list[Tensor]:
    """At least two normal random inputs [N, c, H, W] that together exceed the last cache between them and memory."""
    each = max(1, math.prod(shape) * torch.empty((), dtype=dtype).element_size())
    if device.type == "cuda":
        properties = cast("Any", torch.cuda).get_device_properties(device)
        count = math.ceil(1.5 * properties.L2_cache_size / each)
    else:
        count = min(CPU_MOST_INPUTS, math.ceil(CPU_COVER_BYTES / each))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=layout).normal_(
            generator=generator
        )
        for _ in range(max(2, min(count, MOST_INPUTS)))
    ]


def measure(
    calls: Mapping[str, Call], inputs: Mapping[str, Sequence[Tensor]], rounds: int = 7
) -> tuple[dict[str, float], dict[str, str]]:
    """Median microseconds of one call under each label, and why the labels without a time failed.

    A call that raises, also one that cannot be captured in a CUDA graph, is dropped; the others go on.

    Raises:
        BuildError: a kernel has made the device unusable for this process.
    """
    errors: dict[str, str] = {}
    samples: dict[str, list[float]] = {}
    runs: dict[str, Callable[[], float]] = {}
    with torch.no_grad():
        for label, call in calls.items():
            try:
                make = _cuda_run if inputs[label][0].is_cuda else _cpu_run
                runs[label] = make(call, inputs[label])
            except Exception as error:  # a kernel that does not build or launch: anything may be raised
                errors[label] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                _check_device(inputs[label][0].device, label)
        for _ in range(rounds):
            for label, run in runs.items():
                samples.setdefault(label, []).append(run())
    return {label: statistics.median(found) for label, found in samples.items()}, errors


def _check_device(device: torch.device, label: str) -> None:
    """Raise if ``device`` is of no use any more: what follows would fail too, through no fault of its own."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).add_(1)
    except RuntimeError as error:
        raise BuildError(
            f"measuring has made {device} unusable: {' '.join(str(error).split())[:200]}",
            where=label,
            fix="start a new process; please report the kernel",
        ) from error


def _cpu_run(call: Call, inputs: Sequence[Tensor]) -> Callable[[], float]:
    """A function that times one group of calls, in microseconds per call."""
    call(inputs[0])
    seconds = math.inf
    for i in range(3):
        start = time.perf_counter()
        call(inputs[i % len(inputs)])
        seconds = min(seconds, time.perf_counter() - start)
    count = min(200, max(1, math.ceil(CPU_GROUP_SECONDS / max(seconds, 1e-7))))
    turn = 0

    def run() -> float:
        nonlocal turn
        time.sleep(CPU_PAUSE_SECONDS)
        call(inputs[turn % len(inputs)])
        start = time.perf_counter()
        for i in range(count):
            call(inputs[(turn + 1 + i) % len(inputs)])
        spent = time.perf_counter() - start
        turn += count
        return spent * 1e6 / count

    return run


def _cuda_run(call: Call, inputs: Sequence[Tensor]) -> Callable[[], float]:
    """A function that times the replay of one graph of calls, in microseconds per call."""
    device = inputs[0].device
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for i in range(3):  # builds kernels, lets cuDNN choose, fills the allocator
                call(inputs[i % len(inputs)])
            side.synchronize()
            once = elapsed_us(lambda: call(inputs[0]), side)
        wanted = min(CUDA_CALLS, math.ceil(CUDA_GRAPH_US / max(once, 1.0)))
        count = len(inputs) * math.ceil(wanted / len(inputs))  # whole turns over the inputs
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for i in range(count):
                call(inputs[i % len(inputs)])

    def run() -> float:
        with torch.cuda.device(device), torch.cuda.stream(side):
            graph.replay()  # the device is busy while the timed replay is queued
            return elapsed_us(graph.replay, side) / count

    return run


def elapsed_us(launch: Callable[[], object], stream: torch.cuda.Stream) -> float:
    """Microseconds on the device for what ``launch`` puts on ``stream``."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(stream)
    launch()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) * 1e3
