"""Distances between images `[B, ...]`."""

from __future__ import annotations

import torch
from torch import Tensor


def closeness(image: Tensor, target: Tensor, scale: float = 4.0) -> Tensor:
    """`exp(-scale * MSE)` per sample, `[B]` in (0, 1]; 1 where the image is the target.

    Raises:
        ValueError: unequal shapes.
    """
    if image.shape != target.shape:
        raise ValueError(f"closeness: image {list(image.shape)} and target {list(target.shape)} differ")
    return torch.exp(-scale * (image - target).square().flatten(1).mean(1))


def nearest_distance(images: Tensor, real: Tensor) -> Tensor:
    """Root mean squared distance of each image `[B, ...]` to the nearest of the real ones `[N, ...]`, `[B]`.

    An image that pleases a judge and lies far from everything real is adversarial.
    """
    distance = torch.cdist(images.flatten(1), real.flatten(1)).amin(1)
    return distance / images[0].numel() ** 0.5
