"""Captions and instructions, checked by reading their words again."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.functions.geneval import RELATIONS, geneval_score
from regimen.functions.scenes import CELLS, COLOURS, GRID, KINDS, draw_scenes, read_detections
from regimen.tasks.worlds.scene_prompts import (
    CATEGORIES,
    DIRECTIONS,
    LENGTH,
    PLURALS,
    WORDS,
    sample_captions,
    sample_edits,
    texts,
    tokens,
)

Object = tuple[int, str, str]  # cell, colour, kind


@pytest.fixture(scope="module")
def captions() -> TensorDict:
    return sample_captions(600, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def edits() -> TensorDict:
    return sample_edits(900, torch.Generator().manual_seed(0))


def objects(scene: list[int]) -> list[Object]:
    """What stands where, by the code's definition."""
    return [(cell, COLOURS[(c - 1) % 4], KINDS[(c - 1) // 4]) for cell, c in enumerate(scene) if c]


def related(relation: str, a: int, b: int) -> bool:
    """Whether a cell stands in a relation to another: more than half of the way, in grid steps, each of extent 1."""
    dx, dy = a % GRID - b % GRID, a // GRID - b // GRID
    length = (dx**2 + dy**2) ** 0.5
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    return (along - 0.2) / length > 0.5


def fits(caption: str, scene: list[int]) -> bool:
    """Whether a scene is all that a caption says and nothing else, from the words alone."""
    there, words = objects(scene), caption.split()
    if words[0] in ("two", "three"):
        number, colour, plural = words
        wanted = (colour, KINDS[PLURALS.index(plural)])
        return [o[1:] for o in there] == [wanted] * (2 if number == "two" else 3)
    relation = next((r for r in RELATIONS if f" {r} " in caption), None)
    parts = caption.split(f" {relation} " if relation else " and ")
    described = [part.split()[1:] for part in parts]
    matched = []
    for *colour, kind in described:
        same = [o for o in there if o[2] == kind and (not colour or o[1] == colour[0])]
        if len(same) != 1:
            return False
        matched += same
    if len(there) != len(parts):
        return False
    return relation is None or related(relation, matched[0][0], matched[1][0])


def test_every_caption_fits_its_scene_and_comes_from_every_category(captions: TensorDict) -> None:
    said = texts(captions["prompt_ids"])
    for caption, scene in zip(said, captions["target"].tolist(), strict=True):
        assert fits(caption, scene), (caption, objects(scene))
    kinds = [said[i :: len(CATEGORIES)] for i in range(len(CATEGORIES))]
    assert all(len(c.split()) == 2 for c in kinds[0])
    assert all(c.count("a ") == 2 and len(c.split()) == 5 for c in kinds[1])
    assert all(c.split()[0] in ("two", "three") for c in kinds[2])
    assert all(len(c.split()) == 3 for c in kinds[3])
    assert all(any(f" {r} " in c for r in RELATIONS) for c in kinds[4])
    assert all(" and " in c and len(c.split()) == 7 for c in kinds[5])
    assert {r for c in kinds[4] for r in RELATIONS if f" {r} " in c} == set(RELATIONS)
    assert not captions["edit"].any()
    assert not captions["source"].any()


def test_requirements_are_met_by_the_scene_and_by_no_scene_that_does_not_fit(captions: TensorDict) -> None:
    found = read_detections(draw_scenes(captions["target"]))
    graded, strict = geneval_score(found, captions["requirements"])
    assert strict.all()
    assert (graded == 1).all()
    said = texts(captions["prompt_ids"])
    for shift in (1, 2, 3, 6):
        _, met = geneval_score(found, captions["requirements"].roll(shift, 0))
        judged = met.tolist()
        for i, scene in enumerate(captions["target"].tolist()):
            caption = said[i - shift]
            # A caption says what must be there, not that nothing else may be.
            if fits(caption, scene):
                assert judged[i], (caption, objects(scene))
            elif len(objects(scene)) <= len(objects(captions["target"][i - shift].tolist())):
                assert not judged[i], (caption, objects(scene))


def test_every_instruction_gives_its_target_when_it_is_carried_out(edits: TensorDict) -> None:
    counts = dict.fromkeys(("paint", "move", "remove"), 0)
    rows = zip(texts(edits["prompt_ids"]), edits["source"].tolist(), edits["target"].tolist(), strict=True)
    for instruction, source, target in rows:
        verb, _, colour, kind, *rest = instruction.split()
        counts[verb] += 1
        there = objects(source)
        chosen = [o for o in there if o[1:] == (colour, kind)]
        assert len(chosen) == 1, (instruction, there)
        cell = chosen[0][0]
        left = [o for o in there if o[0] != cell]
        if verb == "paint":
            assert rest[0] != colour
            left.append((cell, rest[0], kind))
        elif verb == "move":
            dx, dy = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[rest[0]]
            x, y = cell % GRID + dx, cell // GRID + dy
            assert 0 <= x < GRID
            assert 0 <= y < GRID
            assert y * GRID + x not in [o[0] for o in left]
            left.append((y * GRID + x, colour, kind))
        assert sorted(left) == objects(target), (instruction, there, objects(target))
        assert len({o[2] for o in there}) == len(there)
        assert 1 <= len(there) <= 3
    assert min(counts.values()) > 290
    assert counts["paint"] == 300
    assert {i.split()[-1] for i in texts(edits["prompt_ids"]) if i.startswith("move")} == set(DIRECTIONS)
    assert edits["edit"].all()
    assert not edits["requirements"].any()


def test_what_cannot_move_goes() -> None:
    """In a corner between two others there is no free neighbour; among many scenes this happens."""
    edits = sample_edits(30_000, torch.Generator().manual_seed(1))
    moves = edits[torch.arange(30_000) % 3 == 1]
    gone = moves[(moves["source"] > 0).sum(1) > (moves["target"] > 0).sum(1)]
    assert 0 < len(gone) < 200
    assert all(text.startswith("remove") for text in texts(gone["prompt_ids"]))
    for source, target in zip(gone["source"].tolist(), gone["target"].tolist(), strict=True):
        (cell,) = {o[0] for o in objects(source)} - {o[0] for o in objects(target)}
        row, column = divmod(cell, GRID)
        beside = [(row + y, column + x) for x, y in ((-1, 0), (1, 0), (0, -1), (0, 1))]
        inside = [y * GRID + x for y, x in beside if 0 <= x < GRID and 0 <= y < GRID]
        assert all(source[other] for other in inside)


def test_prompts_are_words_and_back(captions: TensorDict, edits: TensorDict) -> None:
    said = texts(torch.cat([captions["prompt_ids"], edits["prompt_ids"]]))
    ids, mask = tokens(said)
    assert torch.equal(ids, torch.cat([captions["prompt_ids"], edits["prompt_ids"]]))
    assert torch.equal(mask, torch.cat([captions["prompt_mask"], edits["prompt_mask"]]))
    assert mask.sum(1).tolist() == [len(text.split()) for text in said]
    assert int(mask.sum(1).max()) <= LENGTH
    assert len(set(WORDS)) == len(WORDS)
    assert {word for text in said for word in text.split()} == set(WORDS[1:])
    with pytest.raises(ValueError, match="scene prompt 'a purple square': expected at most 8 of the words a, two"):
        tokens(["a square", "a purple square"])
    with pytest.raises(ValueError, match="expected at most 8"):
        tokens(["a " * 9])


def test_prompts_are_decided_by_the_stream() -> None:
    def made(seed: int) -> list[Tensor]:
        rng = torch.Generator().manual_seed(seed)
        return [sample_captions(30, rng)["target"], sample_edits(30, rng)["target"]]

    assert all(torch.equal(a, b) for a, b in zip(made(0), made(0), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(made(0), made(1), strict=True))


def test_objects_stand_in_every_cell(captions: TensorDict, edits: TensorDict) -> None:
    for scenes in (captions["target"], edits["source"], edits["target"]):
        used = (scenes > 0).sum(0)
        assert used.shape == (CELLS,)
        assert used.min() > 0.4 * used.float().mean()
