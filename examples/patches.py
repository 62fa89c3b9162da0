"""Random training patches, cut and augmented in batches on the device that trains.

Every photo, at several scales, stays on the device in one flat table of pixels. A batch of patches is one
indexing operation into that table: mirroring and rotation are a matter of the order of the indices, so no
loop over patches and no copy of a photo is ever made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from examples import photos

SCALES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
FAVOURED = {"china": 4.0, "rocket": 4.0, "motorcycle_left": 3.0, "motorcycle_right": 3.0}
"""How much more often a patch comes from one of these, photos of natural scenes, than from another photo."""


class PatchSource:
    """Photos kept on one device, from which batches of augmented square patches are gathered.

    Args:
        names: photos to load, in colour, at every scale of `scales` at which a patch fits.
        patch: side of a patch in pixels.
        device: where the photos are kept and the patches are made.
        seed: of the generator that makes every choice.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        patch: int,
        device: torch.device,
        *,
        scales: tuple[float, ...] = SCALES,
        seed: int = 0,
    ) -> None:
        pictures: list[Tensor] = []  # each [3, height, width]
        weights: list[float] = []
        for name in names:
            sized = [photos.load_color(name, scale) for scale in scales]
            sized = [picture for picture in sized if min(picture.shape[1:]) >= patch]
            pictures += sized
            weights += [FAVOURED.get(name, 1.0) / len(sized) for _ in sized]
        if not pictures:
            raise ValueError(f"none of the photos {names} is as large as a patch of {patch} pixels")
        areas = torch.tensor([picture[0].numel() for picture in pictures])
        self.patch = patch
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.pixels = torch.cat([picture.flatten(1) for picture in pictures], dim=1).to(
            device
        )  # [3, all pixels]
        self.offsets = (areas.cumsum(0) - areas).to(device)  # [pictures], of each in `pixels`
        self.sizes = torch.tensor([picture.shape[1:] for picture in pictures], device=device)  # [pictures, 2]
        self.luma = torch.tensor([0.299, 0.587, 0.114], device=device)  # of red, green, blue
        self.weights = torch.tensor(weights, device=device)  # [pictures], how often each is chosen

    def sample(self, count: int) -> Tensor:
        """A batch of clean patches: [count, 1, patch, patch], float32 in [0, 1]."""
        colour = self.pixels[:, self._indices(count)]  # [3, count, patch, patch]
        gray = torch.einsum("cnyx,nc->nyx", colour, self._colour_mixes(count))
        contrast = 0.7 + 0.3 * self._uniform(count, 1, 1)  # never leaves [0, 1]
        brightness = (1.0 - contrast) * self._uniform(count, 1, 1)
        return (gray * contrast + brightness).unsqueeze(1)

    def noise(self, shape: torch.Size, sigma: float) -> Tensor:
        """Gaussian noise of standard deviation `sigma` / 255."""
        return torch.randn(shape, generator=self.generator, device=self.device) * (sigma / 255.0)

    def _indices(self, count: int) -> Tensor:
        """Columns of `pixels` in each patch, mirrored and rotated at random: [count, patch, patch]."""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=self.generator)
        sizes = self.sizes[chosen]  # [count, 2]
        places = sizes - self.patch + 1  # [count, 2], how many a patch can start at
        corners = (self._uniform(count, 2) * places).long().minimum(places - 1)  # [count, 2]
        steps = torch.arange(self.patch, device=self.device)  # [patch]
        mirrored = self._uniform(count, 2, 1) < 0.5  # [count, 2, 1]: rows, columns
        along = torch.where(mirrored, self.patch - 1 - steps, steps)  # [count, 2, patch]
        rows, columns = (corners.unsqueeze(2) + along).unbind(1)  # [count, patch] each
        indices = rows.unsqueeze(2) * sizes[:, 1].view(-1, 1, 1) + columns.unsqueeze(1)
        indices = indices + self.offsets[chosen].view(-1, 1, 1)
        turned = self._uniform(count, 1, 1) < 0.5  # a transposed mirror image is a rotation by 90 degrees
        return torch.where(turned, indices.transpose(1, 2), indices)

    def _colour_mixes(self, count: int) -> Tensor:
        """Weights of red, green and blue, [count, 3]: luma for half of the patches, random for the rest."""
        mixes = -self._uniform(count, 3).clamp_min(1e-6).log()
        mixes = mixes / mixes.sum(1, keepdim=True).clamp_min(1e-6)
        return torch.where(self._uniform(count, 1) < 0.5, self.luma, mixes)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)
