"""Images as rows of tensors, and random views of them that are the same for an image at every batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from hf_ema_scaling.data.seeding import spread_seed


class ImageRows(Dataset[dict[str, Any]]):
    """Rows of `pixel_values`, float32 `(channels, height, width)` in [0, 1], and of `labels` where there are any.

    Args:
        read: from row numbers to uint8 `(rows, channels, height, width)`.
        rows: how many there are.
        labels: the class of each row, or None.
    """

    def __init__(self, read: Callable[[list[int]], Tensor], rows: int, labels: Sequence[int] | None = None) -> None:
        if labels is not None and len(labels) != rows:
            raise ValueError(f"{len(labels)} labels for {rows} images")
        self.read = read
        self.rows = rows
        self.labels = None if labels is None else [int(label) for label in labels]

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[dict[str, Any]]:
        """All `rows` with one access to the images."""
        images = self.read(rows).float() / 255
        if self.labels is None:
            return [{"pixel_values": image} for image in images]
        return [{"pixel_values": image, "labels": self.labels[row]} for image, row in zip(images, rows, strict=True)]

    def without_labels(self) -> ImageRows:
        """The same images, and nothing that says what they show."""
        return ImageRows(self.read, self.rows)


class DecodedImages:
    """Reads rows of an image column of `datasets` as square uint8 images.

    Args:
        dataset: rows with decoded images in `column`.
        column: the column of images.
        size: height and width that images are resized to, regardless of their proportions.
        channels: 1 for grey, 3 for colour.
    """

    def __init__(self, dataset: Any, column: str, *, size: int, channels: int) -> None:
        self.dataset = dataset.select_columns([column])
        self.column = column
        self.size = size
        self.mode = {1: "L", 3: "RGB"}[channels]

    def __call__(self, rows: list[int]) -> Tensor:
        """uint8 `(rows, channels, size, size)`."""
        images = self.dataset[rows][self.column]
        made = [np.array(image.convert(self.mode).resize((self.size, self.size))) for image in images]
        pixels = torch.from_numpy(np.stack(made))
        return pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class RandomViews:
    """Random views of images: crop, shift, rotation, flip, contrast, brightness, noise, occlusion, in this order.

    What a row becomes depends on its seed and content, not on its neighbours or the global random state. There is no
    change of colours and no blur.

    Args:
        min_scale: smallest side of a crop as a share of the image's; the crop lies anywhere in the image.
        shift: further shift of the crop, up to this share of the image's side; what lies outside is black.
        rotation: up to so many degrees either way.
        flip: probability of a horizontal flip.
        contrast: factor on the distance from the mean, up to `1 +- contrast`.
        brightness: added to all pixels, up to `+- brightness`.
        noise: standard deviation of Gaussian noise on every pixel.
        occlusion: side of a square set to the image's mean, as a share of the image's.

    Raises:
        ValueError: for a value out of range.
    """

    min_scale: float = 1.0
    shift: float = 0.0
    rotation: float = 0.0
    flip: float = 0.0
    contrast: float = 0.0
    brightness: float = 0.0
    noise: float = 0.0
    occlusion: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"min_scale must be above 0 and at most 1, got {self.min_scale}")
        for name in ("shift", "flip", "contrast", "occlusion"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("rotation", "brightness", "noise"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """One view of each image.

        Args:
            images: float `(rows, channels, height, width)` in [0, 1].
            seeds: one per row.

        Returns:
            As `images`.
        """
        if len(seeds) != len(images):
            raise ValueError(f"{len(images)} images need as many seeds, got {len(seeds)}")
        uniform = torch.empty(len(images), 9)
        noise = torch.empty(images.shape)
        generator = torch.Generator()
        for row, seed in enumerate(seeds):
            generator.manual_seed(spread_seed(seed))
            torch.rand(9, generator=generator, out=uniform[row])
            if self.noise:
                torch.randn(noise.shape[1:], generator=generator, out=noise[row])
        drawn = uniform.to(images.device).unbind(1)
        signed = [2 * value - 1 for value in drawn]
        grid = F.affine_grid(self._maps(drawn, signed), list(images.shape), align_corners=False)
        views = F.grid_sample(images, grid, align_corners=False)
        mean = views.mean((1, 2, 3), keepdim=True)
        views = mean + (views - mean) * (1 + self.contrast * _per_row(signed[5]))
        views = views + self.brightness * _per_row(signed[6])
        if self.noise:
            views = views + self.noise * noise.to(images)
        if self.occlusion:
            views = torch.where(self._occluded(views, drawn[7], drawn[8]), mean, views)
        return views.clamp(0, 1)

    def _maps(self, drawn: Sequence[Tensor], signed: Sequence[Tensor]) -> Tensor:
        """Where each view's pixels come from, `(rows, 2, 3)`, in units of half the image's side."""
        scale = self.min_scale + (1 - self.min_scale) * drawn[0]
        angle = math.radians(self.rotation) * signed[1]
        room = 1 - scale + 2 * self.shift
        mirror = torch.where(drawn[4] < self.flip, -1.0, 1.0)
        cos, sin = scale * angle.cos(), scale * angle.sin()
        first = torch.stack([mirror * cos, -sin, room * signed[2]], 1)
        second = torch.stack([mirror * sin, cos, room * signed[3]], 1)
        return torch.stack([first, second], 1)

    def _occluded(self, views: Tensor, down: Tensor, right: Tensor) -> Tensor:
        """True `(rows, 1, height, width)` inside each row's square, which lies in the image."""
        height, width = views.shape[-2:]
        inside = []
        for size, start in ((height, down), (width, right)):
            side = round(self.occlusion * size)
            first = _per_row((start * (size - side + 1)).floor()).flatten(1)
            place = torch.arange(size, device=views.device)[None]
            inside.append((place >= first) & (place < first + side))
        return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]


def _per_row(values: Tensor) -> Tensor:
    return values[:, None, None, None]
