"""Random training patches of the example denoiser."""

from __future__ import annotations

import pytest
import torch

from examples import photos
from examples.patches import PatchSource

CPU = torch.device("cpu")


@pytest.fixture
def ramp(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Stands in for every photo: a pixel tells its own place, 20 * row + column, in [0, 1]. [3, 12, 20]."""
    picture = (torch.arange(240.0) / 240).reshape(1, 12, 20).expand(3, 12, 20).contiguous()
    monkeypatch.setattr(photos, "load_color", lambda name, scale: picture)
    return picture


def test_patches_are_batches_of_intensities():
    source = PatchSource(("camera", "coffee"), 32, CPU, scales=(1.0, 0.5))
    patches = source.sample(64)
    assert patches.shape == (64, 1, 32, 32)
    assert patches.dtype == torch.float32
    assert patches.min() >= 0
    assert patches.max() <= 1
    assert not torch.equal(patches[0], patches[1])


def test_every_patch_is_a_mirrored_or_rotated_part_of_a_photo(ramp: torch.Tensor):
    source = PatchSource(("first", "second"), 5, CPU, scales=(1.0,))
    expected = ramp[0].unfold(0, 5, 1).unfold(1, 5, 1).reshape(-1, 5, 5)  # [8 * 16, 5, 5]
    expected = {tuple(patch.flatten().tolist()) for patch in expected}
    seen = set()
    for indices in source._indices(400):
        patch = source.pixels[0, indices]
        for turns in range(4):
            for mirrored in (False, True):
                candidate = torch.rot90(patch.flip(0) if mirrored else patch, turns)
                if tuple(candidate.flatten().tolist()) in expected:
                    seen.add((turns, mirrored, tuple(candidate[0, :1].tolist())))
                    break
            else:
                continue
            break
        else:
            pytest.fail("a patch is no part of the photo")
    assert len({(turns, mirrored) for turns, mirrored, _ in seen}) == 8
    assert len({corner for _, _, corner in seen}) > 100  # of 128 places


def test_both_ends_of_a_photo_are_reached(ramp: torch.Tensor):
    source = PatchSource(("first",), 12, CPU, scales=(1.0,))
    columns = {int(indices.min()) for indices in source._indices(500)}
    assert columns == set(range(9))  # 20 - 12 + 1 places


def test_photos_smaller_than_a_patch_are_left_out(ramp: torch.Tensor):
    with pytest.raises(ValueError, match="as large as a patch of 13"):
        PatchSource(("first",), 13, CPU)


def test_noise_has_its_standard_deviation(ramp: torch.Tensor):
    source = PatchSource(("first",), 5, CPU)
    assert source.noise(torch.Size([1000, 100]), 25.0).std() == pytest.approx(25 / 255, rel=0.01)


def test_a_seed_repeats_its_patches(ramp: torch.Tensor):
    first, again, other = (PatchSource(("a", "b"), 5, CPU, seed=seed).sample(8) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
