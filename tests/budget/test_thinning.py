"""thinning: enough images for the layer that needs most, and others to compare outputs on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from wsp_compiler.budget.thinning import PROBE_IMAGES, SAMPLES_PER_UNKNOWN, cut, images_of, thinned
from wsp_compiler.errors import InputError
from wsp_compiler.options import CompileOptions
from wsp_compiler.plan import PruningPlan, make_plan
from wsp_compiler.sites import find_sites
from wsp_compiler.trace import Call, TracedModel, trace


def parts(channels: int = 16) -> tuple[TracedModel, PruningPlan]:
    model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.ReLU(), nn.Conv2d(channels, 16, 3)).eval()
    convolutions = {path: conv for path, conv in model.named_modules() if isinstance(conv, nn.Conv2d)}
    plan = make_plan(find_sites(model), convolutions, CompileOptions(0.5, "wsp"))
    assert list(plan) == ["2"]
    return trace(model), plan


def numbered(count: int, side: int) -> Tensor:
    """Images that hold their own number."""
    return torch.arange(float(count)).view(-1, 1, 1, 1).expand(count, 3, side, side).clone()


def numbers(calls: list[Call]) -> list[list[int]]:
    return [[int(value) for value in args[0][:, 0, 0, 0]] for args, _ in calls]


def test_few_images_are_all_used() -> None:
    traced, plan = parts()
    calls: list[Call] = [((numbered(6, 12),), {})]
    kept, probe = thinned(traced, plan, calls)
    assert numbers(kept) == [[0, 1, 2, 3, 4, 5]]
    assert numbers([probe]) == [[1, 2]]


def test_many_images_are_thinned_evenly_over_batches() -> None:
    traced, plan = parts()
    x = numbered(30, 40)  # 36 * 36 outputs an image, of 12 * 256 needed
    each = -(-SAMPLES_PER_UNKNOWN * 256 // (36 * 36))
    calls: list[Call] = [((part,), {}) for part in x.split(7)]
    kept, probe = thinned(traced, plan, calls)
    found = [number for batch in numbers(kept) for number in batch]
    stride = 30 * 36 * 36 // (SAMPLES_PER_UNKNOWN * 256)
    assert found == list(range(0, 30, stride))
    assert len(found) >= each
    assert numbers([probe]) == [[1, 2]]
    assert not set(numbers([probe])[0]) & set(found)


def test_more_unknowns_need_more_images() -> None:
    calls: list[Call] = [((numbered(60, 20),), {})]
    counts = [len(numbers(thinned(*parts(channels), calls)[0])[0]) for channels in (16, 32, 128)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 60


def test_batches_of_one_image() -> None:
    traced, plan = parts()
    calls: list[Call] = [((part,), {}) for part in numbered(9, 80).split(1)]
    kept, probe = thinned(traced, plan, calls)
    assert 1 <= len(kept) < 9
    assert images_of(probe) == 1


def test_cutting_takes_every_tensor_of_the_batch() -> None:
    call: Call = ((numbered(5, 4), torch.arange(5), torch.tensor(2.0), "text"), {"scale": torch.ones(3)})
    args, kwargs = cut(call, 1, 2, 3)
    assert args[0][:, 0, 0, 0].tolist() == [1, 3]
    assert args[1].tolist() == [1, 3]
    assert args[2] == 2.0
    assert args[3] == "text"
    assert kwargs["scale"].shape == (3,)
    assert images_of(cut(call, 0, 1, PROBE_IMAGES)) == PROBE_IMAGES
    assert images_of(((torch.ones(3),), {})) == 0


def test_a_model_that_takes_whole_batches_only_says_so() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.view(4, 16, 9, 9))

    model = Whole().eval()
    plan = make_plan(find_sites(model), {"conv": model.conv}, CompileOptions(0.5, "wsp"))
    with pytest.raises(InputError, match="fails on batch 0"):
        thinned(trace(model), plan, [((torch.randn(4, 16, 9, 9),), {})])
