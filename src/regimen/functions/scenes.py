"""Scenes of coloured shapes: how they are drawn, and how they are read back by an exact rule.

A scene is a grid of 4 x 4 cells, int64 `[B, 16]` in row order: 0 for an empty cell, else 1 + kind * 4 + colour. Its
image is `[B, 3, 32, 32]` in [-1, 1]: shapes with smooth edges on black.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from regimen.functions.geneval import Detections

KINDS = ("square", "disc", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow")
GRID, CELL = 4, 8
CELLS, SIDE = GRID * GRID, GRID * CELL
SHAPE = (3, SIDE, SIDE)
OBJECTS = len(KINDS) * len(COLOURS)
MESS = -1
"""What `read_scenes` says of a cell that holds something which is no object."""

_PALETTE = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0], [1.0, 1.0, -1.0]])
_BACKGROUND = -1.0
_FINE = 8


def code(kind: Tensor, colour: Tensor) -> Tensor:
    """A cell's content from indices into `KINDS` and `COLOURS`, any shape."""
    return 1 + kind * len(COLOURS) + colour


def kind_and_colour(scenes: Tensor) -> tuple[Tensor, Tensor]:
    """Kind and colour of every cell, of the scenes' shape; what they say of cells without an object means nothing."""
    content = (scenes - 1).clamp(min=0)
    return content // len(COLOURS), content % len(COLOURS)


@lru_cache(maxsize=1)
def silhouettes() -> Tensor:
    """Share of every pixel of a cell that each kind covers, `[kinds, CELL, CELL]` in [0, 1]."""
    fine = (torch.arange(CELL * _FINE) + 0.5) / _FINE - CELL / 2
    y, x = torch.meshgrid(fine, fine, indexing="ij")
    shapes = torch.stack(
        [
            torch.maximum(x.abs(), y.abs()) <= 3,
            x.square() + y.square() <= 3.4**2,
            (y <= 3) & (2 * x.abs() <= y + 3.5),
            (torch.minimum(x.abs(), y.abs()) <= 1) & (torch.maximum(x.abs(), y.abs()) <= 3),
        ]
    )
    return shapes.float().view(len(KINDS), CELL, _FINE, CELL, _FINE).mean((2, 4))


@lru_cache(maxsize=8)
def _tiles(device: torch.device) -> Tensor:
    """What a cell of each content looks like, `[1 + OBJECTS, 3, CELL, CELL]`."""
    cover, colour = silhouettes()[:, None, None], _PALETTE[None, :, :, None, None]
    objects = (_BACKGROUND + cover * (colour - _BACKGROUND)).flatten(0, 1)
    return torch.cat([torch.full_like(objects[:1], _BACKGROUND), objects]).to(device)


def draw_scenes(scenes: Tensor) -> Tensor:
    """Images `[B, 3, 32, 32]` in [-1, 1] of scenes `[B, 16]`; cells of `MESS` are drawn empty."""
    tiles = _tiles(scenes.device)[scenes.clamp(min=0)]
    return tiles.view(-1, GRID, GRID, 3, CELL, CELL).permute(0, 3, 1, 4, 2, 5).reshape(-1, *SHAPE)


def cells_of(images: Tensor) -> Tensor:
    """The cells of images `[B, C, 32, 32]`, `[B, 16, C, 8, 8]`."""
    cells = images.view(len(images), -1, GRID, CELL, GRID, CELL).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(len(images), CELLS, -1, CELL, CELL)


def cell_boxes() -> Tensor:
    """The cells' boxes `[16, 4]`: left, top, right, bottom, in pixels."""
    row, column = torch.arange(CELLS) // GRID, torch.arange(CELLS) % GRID
    return CELL * torch.stack([column, row, column + 1, row + 1], -1).float()


def _painted(images: Tensor) -> Tensor:
    """Each pixel's nearest colour, bool `[B, 16, colours, 8, 8]`; none where the background is nearest."""
    anchors = torch.cat([torch.full((1, 3), _BACKGROUND), _PALETTE]).to(images)
    pixels = cells_of(images).movedim(2, -1)
    nearest = (pixels[..., None, :] - anchors).square().sum(-1).argmin(-1)
    return nearest[:, :, None] == torch.arange(1, len(anchors), device=images.device)[:, None, None]


def read_scenes(images: Tensor, overlap: float = 0.75, specks: int = 5) -> Tensor:
    """Scenes `[B, 16]` of images `[B, 3, 32, 32]`, by thresholds alone; cells without a clear content are `MESS`.

    Every pixel takes the nearest colour. A cell is empty if at most `specks` pixels are painted. It holds the kind
    whose silhouette overlaps its most frequent colour most, if intersection over union is at least `overlap` and at
    most `specks` pixels have another colour.
    """
    painted = _painted(images)
    area = painted.flatten(3).sum(3)
    main, colour = area.max(2)
    total = area.sum(2)
    mask = painted.gather(2, colour[..., None, None, None].expand(-1, -1, 1, CELL, CELL)).flatten(2)
    shapes = (silhouettes() >= 0.5).flatten(1).to(images.device)
    both = (mask[:, :, None] & shapes).sum(3)
    ratio, kind = (both / (mask[:, :, None] | shapes).sum(3)).max(2)
    clear = (ratio >= overlap) & (total - main <= specks)
    return torch.where(total <= specks, 0, torch.where(clear, code(kind, colour), MESS))


def read_detections(images: Tensor) -> Detections:
    """What `read_scenes` finds, as detections `[B, 16]` with the boxes that the objects really fill."""
    scenes = read_scenes(images)
    kind, colour = kind_and_colour(scenes)
    filled = _painted(images).any(2)
    sides = []
    for other in (2, 3):
        line = filled.any(other).float()
        sides.append((line.argmax(2), CELL - line.flip(2).argmax(2)))
    (left, right), (top, bottom) = sides
    corner = cell_boxes().to(images.device)[:, [0, 1, 0, 1]]
    box = corner + torch.stack([left, top, right, bottom], -1)
    return Detections(kind, colour, box, (scenes > 0).float())
