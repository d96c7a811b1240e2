"""What the scenes' world asks for: captions in GenEval's categories, and instructions to edit a scene.

A table of prompts has the columns `prompt_ids [N, 8]` and `prompt_mask`, `requirements [N, 2, 6]` (see
`geneval_score`; all 0 for edits), `edit` (bool), `source [N, 16]` (the scene to edit; empty for captions) and
`target [N, 16]`: the exact result of an edit, or one of the many scenes that a caption fits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.functions.geneval import ANY, RELATIONS, relative_position
from regimen.functions.scenes import CELLS, COLOURS, GRID, KINDS, cell_boxes, code

CATEGORIES = ("single", "two", "counting", "colours", "position", "attribution")
OPERATIONS = ("recolour", "move", "remove")
DIRECTIONS = ("left", "right", "up", "down")
PLURALS = ("squares", "discs", "triangles", "crosses")
PAD = "."
WORDS = (
    PAD, "a", "two", "three", "and", "left", "right", "above", "below", "of", "the", "paint", "move", "remove", "up",
    "down", *COLOURS, *KINDS, *PLURALS,
)  # fmt: skip
LENGTH = 8

_STEPS = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])


def tokens(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids int64 `[N, 8]` and their mask of texts in the world's `WORDS`.

    Raises:
        ValueError: a text has a word that is not one of them, or more than eight.
    """
    ids = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
    for row, text in enumerate(texts):
        words = text.split()
        unknown = [word for word in words if word not in WORDS]
        if unknown or len(words) > LENGTH:
            raise ValueError(f"scene prompt '{text}': expected at most {LENGTH} of the words {', '.join(WORDS[1:])}")
        ids[row, : len(words)] = torch.tensor([WORDS.index(word) for word in words])
    return ids, ids > 0


def texts(prompt_ids: Tensor) -> list[str]:
    """The texts of token ids `[N, 8]`."""
    return [" ".join(WORDS[i] for i in row if i) for row in prompt_ids.tolist()]


def sample_captions(count: int, rng: torch.Generator) -> TensorDict:
    """A table of `count` captions, in equal parts from every category, with a scene that fits each.

    Relations are those of `relative_position` between the cells; where two hold, either may be named.
    """
    category = torch.arange(count) % len(CATEGORIES)
    kind, colour = _pair(len(KINDS), count, rng), _pair(len(COLOURS), count, rng)
    cell = _distinct(CELLS, 3, count, rng)
    counted = category == CATEGORIES.index("counting")
    paired = (category[:, None] == torch.tensor([CATEGORIES.index(c) for c in ("two", "position", "attribution")])).any(
        1
    )
    number = torch.where(counted, 2 + torch.randint(2, (count,), generator=rng), 1)

    alike = torch.stack([kind[:, 0], torch.where(paired, kind[:, 1], kind[:, 0]), kind[:, 0]], 1)
    hues = torch.stack([colour[:, 0], torch.where(paired, colour[:, 1], colour[:, 0]), colour[:, 0]], 1)
    target = _scene(alike, hues, cell, number + paired.long())

    boxes = cell_boxes()
    holds = relative_position(boxes[cell[:, 0]], boxes[cell[:, 1]])
    relation = torch.multinomial(holds.float(), 1, generator=rng)[:, 0]
    placed = category == CATEGORIES.index("position")
    coloured = category >= CATEGORIES.index("counting")
    ones, unused = torch.ones_like(number), torch.full_like(number, ANY)
    first = [kind[:, 0], number, number, torch.where(coloured, colour[:, 0], ANY), torch.where(placed, relation, ANY)]
    second = [kind[:, 1], ones, ones, torch.where(coloured, colour[:, 1], ANY), unused]
    requirements = torch.stack(
        [torch.stack([*first, ones], 1), torch.stack([*second, ones], 1) * paired.long()[:, None]], 1
    )
    rows = zip(*(x.tolist() for x in (category, kind, colour, number, relation)), strict=True)
    return _table([_caption(*row) for row in rows], requirements, None, target)


def sample_edits(count: int, rng: torch.Generator) -> TensorDict:
    """A table of `count` edits of scenes of one to three objects, which all differ in kind.

    In equal parts: an object gets another colour, moves to a free neighbouring cell, or goes. (An object without a
    free neighbouring cell goes instead of moving.)
    """
    operation = torch.arange(count) % len(OPERATIONS)
    number = 1 + torch.randint(3, (count,), generator=rng)
    kind, cell = _distinct(len(KINDS), 3, count, rng), _distinct(CELLS, 3, count, rng)
    colour = torch.randint(len(COLOURS), (count, 3), generator=rng)
    source = _scene(kind, colour, cell, number)

    where = torch.stack([cell[:, 0] % GRID, cell[:, 0] // GRID], 1)[:, None] + _STEPS
    inside = ((where >= 0) & (where < GRID)).all(2)
    neighbour = (where[..., 1] * GRID + where[..., 0]).clamp(0, CELLS - 1)
    free = inside & (source.gather(1, neighbour) == 0)
    stuck = ~free.any(1)
    operation = torch.where(stuck & (operation == OPERATIONS.index("move")), OPERATIONS.index("remove"), operation)
    direction = torch.multinomial((free | stuck[:, None]).float(), 1, generator=rng)
    hue = (colour[:, 0] + 1 + torch.randint(len(COLOURS) - 1, (count,), generator=rng)) % len(COLOURS)

    results = torch.stack(
        [
            source.scatter(1, cell[:, :1], code(kind[:, 0], hue)[:, None]),
            source.scatter(1, cell[:, :1], 0).scatter(1, neighbour.gather(1, direction), code(kind, colour)[:, :1]),
            source.scatter(1, cell[:, :1], 0),
        ]
    )
    target = results[operation, torch.arange(count)]
    rows = zip(*(x.tolist() for x in (operation, kind[:, 0], colour[:, 0], hue, direction[:, 0])), strict=True)
    requirements = torch.zeros(count, 2, 6, dtype=torch.int64)
    return _table([_instruction(*row) for row in rows], requirements, source, target)


def _caption(category: int, kind: list[int], colour: list[int], number: int, relation: int) -> str:
    plain = [f"a {KINDS[k]}" for k in kind]
    full = [f"a {COLOURS[c]} {KINDS[k]}" for k, c in zip(kind, colour, strict=True)]
    return {
        "single": plain[0],
        "two": f"{plain[0]} and {plain[1]}",
        "counting": f"{('two', 'three')[number == 3]} {COLOURS[colour[0]]} {PLURALS[kind[0]]}",
        "colours": full[0],
        "position": f"{full[0]} {RELATIONS[relation]} {full[1]}",
        "attribution": f"{full[0]} and {full[1]}",
    }[CATEGORIES[category]]


def _instruction(operation: int, kind: int, colour: int, hue: int, direction: int) -> str:
    what = f"the {COLOURS[colour]} {KINDS[kind]}"
    return {
        "recolour": f"paint {what} {COLOURS[hue]}",
        "move": f"move {what} {DIRECTIONS[direction]}",
        "remove": f"remove {what}",
    }[OPERATIONS[operation]]


def _pair(size: int, count: int, rng: torch.Generator) -> Tensor:
    """Two different numbers below `size` in each row, `[count, 2]`."""
    return _distinct(size, 2, count, rng)


def _distinct(size: int, draws: int, count: int, rng: torch.Generator) -> Tensor:
    """`draws` different numbers below `size` in each row, `[count, draws]`."""
    return torch.rand(count, size, generator=rng).argsort(1)[:, :draws]


def _scene(kind: Tensor, colour: Tensor, cell: Tensor, number: Tensor) -> Tensor:
    """Scenes `[N, 16]` of the first `number [N]` objects `[N, 3]` in different cells."""
    there = torch.arange(kind.shape[1]) < number[:, None]
    empty = torch.zeros(len(kind), CELLS, dtype=torch.int64)
    return empty.scatter(1, cell, torch.where(there, code(kind, colour), 0))


def _table(prompts: list[str], requirements: Tensor, source: Tensor | None, target: Tensor) -> TensorDict:
    ids, mask = tokens(prompts)
    edit = torch.full((len(ids),), source is not None)
    source = torch.zeros_like(target) if source is None else source
    return TensorDict(
        {
            "prompt_ids": ids, "prompt_mask": mask, "requirements": requirements,
            "edit": edit, "source": source, "target": target,
        },
        batch_size=[len(ids)],
    )  # fmt: skip
