"""Random views: the identity, each change by hand, and nothing that depends on neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_ema_scaling.data.images import ImageRows, RandomViews
from hf_ema_scaling.data.seeding import spread_seed

IMAGES = torch.rand(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))
SEEDS = list(range(100, 106))
ALL = RandomViews(
    min_scale=0.7, shift=0.1, rotation=15, flip=0.5, contrast=0.4, brightness=0.2, noise=0.1, occlusion=0.25
)


def test_without_changes_a_view_is_the_image() -> None:
    torch.testing.assert_close(RandomViews()(IMAGES, SEEDS), IMAGES, rtol=0, atol=1e-6)


def test_a_view_depends_on_its_seed_and_image_alone() -> None:
    state = torch.get_rng_state()
    together = ALL(IMAGES, SEEDS)
    assert torch.equal(torch.get_rng_state(), state)
    for row, seed in enumerate(SEEDS):
        torch.testing.assert_close(ALL(IMAGES[row : row + 1], [seed])[0], together[row], rtol=0, atol=1e-6)
    assert torch.equal(ALL(IMAGES, SEEDS), together)
    # Also where seeds differ in high bits only.
    for step in (1000, 2**32, 2**41):
        other = ALL(IMAGES, [seed + step for seed in SEEDS])
        assert (other - together).abs().flatten(1).mean(1).min() > 0.02
    assert float(together.min()) >= 0 and float(together.max()) <= 1


def test_flips_are_exact_and_as_frequent_as_stated() -> None:
    always = RandomViews(flip=1.0)(IMAGES, SEEDS)
    torch.testing.assert_close(always, IMAGES.flip(-1), rtol=0, atol=1e-6)
    many = IMAGES[:1].expand(2000, -1, -1, -1)
    flipped = (RandomViews(flip=0.3)(many, range(2000)) - IMAGES[:1].flip(-1)).abs().amax((1, 2, 3)) < 1e-5
    assert float(flipped.float().mean()) == pytest.approx(0.3, abs=0.03)


def test_crops_of_a_ramp_stay_inside_it_and_have_the_stated_size() -> None:
    """On a ramp over [0, 1] a crop shows its own borders: bilinear interpolation is exact there."""
    ramp = ((torch.arange(64) + 0.5) / 64).expand(1, 1, 64, 64).expand(500, -1, -1, -1)
    # Without the outermost pixel, half of which may lie outside.
    views = RandomViews(min_scale=0.5)(ramp, range(500))[:, 0, 32, 1:-1]
    width = (views[:, -1] - views[:, 0]) * 64 / 61
    assert 0.5 <= float(width.min()) < 0.52 and 0.98 < float(width.max()) <= 1.001
    assert float(width.mean()) == pytest.approx(0.75, abs=0.02)
    assert float(views.min()) < 0.03 and float(views.max()) > 0.97
    torch.testing.assert_close(views.diff(dim=1), (width / 64)[:, None].expand(-1, 61), rtol=0, atol=1e-4)


def test_a_half_turn_turns_and_shifts_leave_black() -> None:
    turned = RandomViews(rotation=180)
    seeds = [seed for seed in range(3000) if _angle(seed) > 0.998]
    assert seeds
    views = turned(IMAGES[:1].expand(len(seeds), -1, -1, -1), seeds)
    torch.testing.assert_close(views, IMAGES[:1].flip((-1, -2)).expand_as(views), rtol=0, atol=0.06)
    shifted = RandomViews(shift=0.5)(torch.ones(200, 1, 8, 8), range(200))
    share = shifted.flatten(1).mean(1)
    # Both sides lose a share that is uniform in [0, 1/2]: the mean of (1 - u)(1 - v).
    assert float(share.mean()) == pytest.approx(0.75**2, abs=0.03)


def _angle(seed: int) -> float:
    """The share of the largest rotation that a seed draws."""
    drawn = torch.rand(9, generator=torch.Generator().manual_seed(spread_seed(seed)))
    return abs(2 * float(drawn[1]) - 1)


def test_contrast_brightness_and_noise() -> None:
    grey = IMAGES * 0.2 + 0.4
    mean, std = grey.mean((1, 2, 3)), grey.std((1, 2, 3))
    contrast = RandomViews(contrast=0.5)(grey, SEEDS)
    torch.testing.assert_close(contrast.mean((1, 2, 3)), mean)
    factors = contrast.std((1, 2, 3)) / std
    assert 0.5 <= float(factors.min()) < float(factors.max()) <= 1.5 and float(factors.std()) > 0.05
    brightness = RandomViews(brightness=0.2)(grey, SEEDS) - grey
    torch.testing.assert_close(brightness, brightness[:, :1, :1, :1].expand_as(brightness), rtol=0, atol=1e-6)
    assert 0.02 < float(brightness.abs().max()) <= 0.2
    many = torch.full((200, 1, 8, 8), 0.5)
    noise = RandomViews(noise=0.05)(many, range(200)) - 0.5
    assert float(noise.std()) == pytest.approx(0.05, rel=0.03) and abs(float(noise.mean())) < 0.002


def test_the_occluded_square_is_whole_and_lies_anywhere() -> None:
    many = IMAGES[:1].expand(500, -1, -1, -1)
    changed = ((RandomViews(occlusion=0.25)(many, range(500)) - many).abs() > 1e-5).any(1)
    assert set(changed.sum((1, 2)).tolist()) == {4}
    first = changed.flatten(1).float().argmax(1)
    assert set((first // 8).tolist()) == set((first % 8).tolist()) == set(range(7))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"min_scale": 0.0}, "min_scale must be above 0"),
        ({"flip": 1.5}, "flip must lie in"),
        ({"noise": -0.1}, "noise must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomViews(**value)


def test_rows_of_images() -> None:
    pixels = (IMAGES * 255).to(torch.uint8)
    rows = ImageRows(pixels.__getitem__, 6, [0, 1, 2, 0, 1, 2])
    assert len(rows) == 6 and rows[4]["labels"] == 1
    torch.testing.assert_close(rows.__getitems__([5, 2])[0]["pixel_values"], pixels[5] / 255)
    assert set(rows.without_labels()[0]) == {"pixel_values"}
    with pytest.raises(ValueError, match="5 labels for 6 images"):
        ImageRows(pixels.__getitem__, 6, [0] * 5)
    with pytest.raises(ValueError, match="6 images need as many seeds, got 5"):
        ALL(IMAGES, SEEDS[:5])
