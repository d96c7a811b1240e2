"""Distances between images."""

from __future__ import annotations

import math

import pytest
import torch

from regimen.functions import closeness, nearest_distance


def test_closeness() -> None:
    image = torch.zeros(2, 1, 2, 2)
    target = torch.stack([image[0], image[0] + 0.5])
    assert closeness(image, target, 4.0).tolist() == pytest.approx([1.0, math.exp(-1.0)])
    with pytest.raises(ValueError, match=r"image \[2, 1, 2, 2\] and target \[1, 1, 2, 2\] differ"):
        closeness(image, target[:1])


def test_nearest_distance() -> None:
    real = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    images = torch.stack([torch.ones(1, 2, 2), torch.full((1, 2, 2), 0.25)])
    assert nearest_distance(images, real).tolist() == pytest.approx([0.0, 0.25], abs=1e-4)
