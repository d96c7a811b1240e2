"""Scenes: how they are drawn, and that the rule reads back what was drawn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regimen.functions.scenes import (
    CELL,
    CELLS,
    COLOURS,
    GRID,
    KINDS,
    MESS,
    OBJECTS,
    SHAPE,
    cell_boxes,
    cells_of,
    code,
    draw_scenes,
    kind_and_colour,
    read_detections,
    read_scenes,
    silhouettes,
)


def crowded(count: int, rng: torch.Generator) -> Tensor:
    content = 1 + torch.randint(OBJECTS, (count, CELLS), generator=rng)
    return torch.where(torch.rand(count, CELLS, generator=rng) < 0.6, content, 0)


def test_codes_count_every_kind_and_colour_once() -> None:
    kind, colour = torch.meshgrid(torch.arange(len(KINDS)), torch.arange(len(COLOURS)), indexing="ij")
    codes = code(kind, colour)
    assert sorted(codes.flatten().tolist()) == list(range(1, OBJECTS + 1))
    back = kind_and_colour(codes)
    assert torch.equal(back[0], kind)
    assert torch.equal(back[1], colour)


def test_every_object_is_read_back_in_every_cell() -> None:
    scenes = torch.zeros(OBJECTS * CELLS, CELLS, dtype=torch.int64)
    scenes[torch.arange(len(scenes)), torch.arange(len(scenes)) % CELLS] = 1 + torch.arange(len(scenes)) // CELLS
    images = draw_scenes(scenes)
    assert images.shape == (len(scenes), *SHAPE)
    assert images.amin() == -1
    assert images.amax() == 1
    assert torch.equal(read_scenes(images), scenes)


@pytest.mark.parametrize("noise", [0.0, 0.15, 0.3])
def test_crowded_scenes_are_read_back_under_noise(noise: float, rng: torch.Generator) -> None:
    scenes = crowded(64, rng)
    images = draw_scenes(scenes)
    images = images + noise * torch.randn(images.shape, generator=rng)
    assert (read_scenes(images) == scenes).float().mean() > 0.99


def test_shapes_stand_where_they_should() -> None:
    shapes = dict(zip(KINDS, silhouettes(), strict=True))
    areas = {name: float(shape.sum()) for name, shape in shapes.items()}
    # Square of side 6; disc of radius 3.4; a cross of two bars 2 x 6; half of a triangle of base and height 6.5.
    assert areas["square"] == pytest.approx(36, abs=0.01)
    assert areas["disc"] == pytest.approx(torch.pi * 3.4**2, rel=0.02)
    assert areas["cross"] == pytest.approx(20, abs=0.01)
    assert areas["triangle"] == pytest.approx(6.5 * 6.5 / 2, rel=0.02)
    for shape in shapes.values():
        torch.testing.assert_close(shape, shape.flip(1))
    assert shapes["triangle"][0].sum() < shapes["triangle"][6].sum()


def test_cells_are_in_row_order() -> None:
    scenes = torch.zeros(1, CELLS, dtype=torch.int64)
    scenes[0, 6] = 1
    image = draw_scenes(scenes)[0]
    lit = (image[0] > 0).nonzero()
    left, top, right, bottom = cell_boxes()[6].tolist()
    assert (left, top, right, bottom) == (16, 8, 24, 16)
    assert lit.amin(0).tolist() == [top + 1, left + 1]
    assert lit.amax(0).tolist() == [bottom - 2, right - 2]
    cells = cells_of(image[None])
    assert cells.shape == (1, CELLS, 3, CELL, CELL)
    assert [i for i in range(CELLS) if (cells[0, i, 0] > 0).any()] == [6]
    assert cell_boxes().shape == (GRID * GRID, 4)


def test_what_is_no_object_is_a_mess() -> None:
    def cell_read(paint: Tensor) -> int:
        images = torch.full((1, *SHAPE), -1.0)
        images[0, :, :CELL, :CELL] = paint
        return int(read_scenes(images)[0, 0])

    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    dark = torch.full((3, CELL, CELL), -1.0)
    assert cell_read(dark) == 0
    stripe = dark.clone()
    stripe[:, :, :3] = red
    assert cell_read(stripe) == MESS
    assert cell_read(red.expand(3, CELL, CELL)) == MESS
    speck = dark.clone()
    speck[:, 0, :5] = red[:, 0]
    assert cell_read(speck) == 0
    speck[:, 1, 0] = red[:, 0, 0]
    assert cell_read(speck) == MESS
    two = draw_scenes(torch.tensor([[1] + [0] * 15]))[0, :, :CELL, :CELL].clone()
    assert cell_read(two) == 1
    two[:, :, 4:] = two[[1, 0, 2], :, 4:]
    assert cell_read(two) == MESS
    assert torch.equal(draw_scenes(torch.full((1, CELLS), MESS)), torch.full((1, *SHAPE), -1.0))


def test_detections_are_what_the_rule_reads_with_tight_boxes() -> None:
    square, cross = code(torch.tensor(0), torch.tensor(1)), code(torch.tensor(3), torch.tensor(2))
    scenes = torch.zeros(1, CELLS, dtype=torch.int64)
    scenes[0, 0], scenes[0, 15] = square, cross
    found = read_detections(draw_scenes(scenes))
    assert found.score[0].nonzero().flatten().tolist() == [0, 15]
    assert found.label[0, [0, 15]].tolist() == [KINDS.index("square"), KINDS.index("cross")]
    assert found.colour[0, [0, 15]].tolist() == [COLOURS.index("green"), COLOURS.index("blue")]
    assert found.box[0, 0].tolist() == [1, 1, 7, 7]
    assert found.box[0, 15].tolist() == [25, 25, 31, 31]
