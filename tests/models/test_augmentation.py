"""Augmentation: every image is a shift or mirror image of itself, evenly drawn."""

from math import sqrt

import pytest
import torch

from dropserve.models.data import augment

IMAGES = torch.arange(1, 25, dtype=torch.uint8).view(1, 2, 3, 4)


def moved(image, down, right):
    """Shift [C, H, W] by hand, pixel by pixel; black comes in."""
    out = torch.zeros_like(image)
    _, height, width = image.shape
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                out[:, row, column] = image[:, row - down, column - right]
    return out


def test_every_shift_comes_about_as_often_as_every_other():
    draws = 2500
    shifted = augment(IMAGES.expand(draws, -1, -1, -1), shift=2, flip=False)
    assert shifted.dtype == torch.uint8
    allowed = [moved(IMAGES[0], d, r) for d in range(-2, 3) for r in range(-2, 3)]
    counts = torch.tensor([(shifted == one).flatten(1).all(1).sum() for one in allowed])
    assert counts.sum() == draws  # no image is anything else
    assert ((counts - 100).abs() <= 5 * sqrt(100)).all()


def test_about_half_of_the_images_are_mirrored():
    draws = 2000
    got = augment(IMAGES.expand(draws, -1, -1, -1), shift=0, flip=True)
    mirrored = (got == IMAGES.flip(-1)).flatten(1).all(1)
    assert torch.equal(got[~mirrored], IMAGES.expand(draws, -1, -1, -1)[~mirrored])
    assert abs(mirrored.sum() - draws / 2) <= 5 * sqrt(draws / 4)


def test_nothing_asked_changes_nothing():
    assert augment(IMAGES, 0, flip=False) is IMAGES


@pytest.mark.parametrize(("shift", "flip"), [(1, False), (0, True), (3, True)])
def test_the_global_generator_decides(shift, flip):
    images = IMAGES.expand(50, -1, -1, -1)
    torch.manual_seed(1)
    first, other = augment(images, shift, flip), augment(images, shift, flip)
    torch.manual_seed(1)
    assert torch.equal(augment(images, shift, flip), first)
    assert not torch.equal(first, other)
