import itertools

import pytest
import torch

from benchmarks.timing import Times, _calls_per_graph, _rounds, measure, rotating_inputs

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def _small(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def _large(x: torch.Tensor) -> torch.Tensor:
    for _ in range(20):
        x = torch.sin(x)
    return x


def _check_order(times: Times) -> None:
    assert set(times) == {"large", "small"}
    assert 0 < times["small"] < times["large"]


def test_inputs_are_random_and_distinct_in_the_format_asked_for() -> None:
    xs = rotating_inputs((2, 3, 8, 8), torch.float32, "cpu", torch.channels_last)
    assert 2 <= len(xs) <= 16
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in xs)
    assert all(x.count_nonzero() == x.numel() for x in xs)
    assert not torch.equal(xs[0], xs[1])
    again = rotating_inputs((2, 3, 8, 8), torch.float32, "cpu", torch.channels_last)
    assert torch.equal(xs[0], again[0])


def test_input_count_can_be_given() -> None:
    assert len(rotating_inputs((4,), torch.float16, "cpu", count=3)) == 3


def test_measure_on_the_cpu_tells_the_slower_from_the_faster() -> None:
    times = measure({"large": _large, "small": _small}, rotating_inputs((64, 512), torch.float32, "cpu"))
    _check_order(times)
    assert all("wall clock" in times.how[label] for label in times)


def test_measure_takes_inputs_per_label() -> None:
    inputs = {"a": [torch.randn(4)], "b": [torch.randn(8), torch.randn(8)]}
    seen: dict[str, set[int]] = {"a": set(), "b": set()}
    calls = {label: lambda x, label=label: seen[label].add(x.numel()) for label in inputs}
    measure(calls, inputs, rounds=2)
    assert seen == {"a": {4}, "b": {8}}


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    calls = {label: lambda x, label=label: order.append(label) for label in "ab"}
    measure(calls, [torch.randn(1)], rounds=5)
    switches = sum(before != after for before, after in itertools.pairwise(order))
    assert switches == 1 + 2 * 5  # the estimates a b, then a b five times


def test_measure_needs_candidates_and_one_device() -> None:
    with pytest.raises(ValueError, match="no candidates"):
        measure({}, [torch.zeros(1)])
    with pytest.raises(ValueError, match="one device"):
        measure({"a": _small}, [torch.zeros(1), torch.zeros(1, device="meta")])
    with pytest.raises(ValueError, match="needs inputs"):
        measure({"a": _small}, [])


def test_a_failing_candidate_is_not_hidden() -> None:
    def fail(x: torch.Tensor) -> None:
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        measure({"a": fail}, [torch.zeros(1)])


def test_slow_rounds_are_fewer_but_at_least_five() -> None:
    assert _rounds(15, 1e-3) == 15
    assert _rounds(15, 0.5) == 8
    assert _rounds(15, 60.0) == 5
    assert _rounds(3, 60.0) == 3


@pytest.mark.parametrize(
    ("inputs", "microseconds", "calls"), [(2, 5.0, 32), (17, 5.0, 34), (250, 5.0, 250), (2, 3000.0, 4)]
)
def test_a_graph_holds_whole_turns_over_the_inputs(inputs: int, microseconds: float, calls: int) -> None:
    assert _calls_per_graph(inputs, microseconds) == calls


@needs_cuda
@pytest.mark.cuda
def test_measure_on_cuda_replays_graphs() -> None:
    xs = rotating_inputs((256, 1024), torch.float16, "cuda")
    l2 = torch.cuda.get_device_properties("cuda").L2_cache_size
    assert sum(x.nbytes for x in xs) >= 2 * l2
    times = measure({"large": _large, "small": _small}, xs)
    _check_order(times)
    assert all(times.how[label].startswith("CUDA graph") for label in times)


@needs_cuda
@pytest.mark.cuda
def test_what_cannot_be_captured_is_timed_by_events_and_says_so() -> None:
    xs = rotating_inputs((256, 1024), torch.float32, "cuda", count=2)
    times = measure({"synchronises": lambda x: x.sum().item(), "small": _small}, xs, uncaptured=("small",))
    assert "capture failed" in times.how["synchronises"]
    assert times.how["small"].startswith("events")
    assert min(times.values()) > 0
