"""GenEval (Ghosh et al. 2023): whether the objects found in an image are those that a prompt asks for.

Everything is a batch of tensors, so that hundreds of images are scored at once. Labels and colours are indices
into lists of names that the caller keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

RELATIONS = ("left of", "right of", "above", "below")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""GenEval's colours, in its order."""

ANY = -1
"""In a requirement: no colour, or no relation, is asked for."""

FIELDS = ("label", "count", "most", "colour", "relation", "target")
"""What the six numbers of a requirement are, see `geneval_score`."""

Counting = Literal["exact", "share"]


@dataclass(frozen=True)
class Detections:
    """Up to `K` objects found in each of `B` images.

    Attributes:
        label, colour: int64 `[B, K]`.
        box: `[B, K, 4]`: left, top, right, bottom, in any unit.
        score: `[B, K]`, confidence in [0, 1]; 0 where there is no object.
    """

    label: Tensor
    colour: Tensor
    box: Tensor
    score: Tensor


def relative_position(a: Tensor, b: Tensor, margin: float = 0.1) -> Tensor:
    """Which `RELATIONS` hold between boxes, bool `[..., 4]`: whether `a` is left of `b`, and so on.

    GenEval's rule: the offset of the centres, less `margin` times the sum of both extents in each direction, must
    make up more than half of the offset's length. So neighbours on a diagonal are both beside and above.

    Args:
        a, b: boxes `[..., 4]`: left, top, right, bottom; they broadcast.
        margin: share of the extents that counts as no offset.
    """
    offset = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2
    extents = (a[..., 2:] - a[..., :2]) + (b[..., 2:] - b[..., :2])
    clear = (offset.abs() - margin * extents).clamp(min=0) * offset.sign()
    dx, dy = (clear / offset.norm(dim=-1, keepdim=True).clamp(min=1e-6)).unbind(-1)
    return torch.stack([dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5], -1)


def geneval_score(
    detections: Detections,
    requirements: Tensor,
    *,
    threshold: float = 0.3,
    margin: float = 0.1,
    counting: Counting = "exact",
) -> tuple[Tensor, Tensor]:
    """How far each image is what its prompt asks for.

    A requirement is six integers (`FIELDS`): objects of class `label`; at least `count` of them (0: no requirement
    here) and at most `most`; of a `colour`, or `ANY`; in a `relation` (index into `RELATIONS`), or `ANY`, to the
    objects of requirement number `target`. Number, colour and relation are one demand each; the last two are met
    only where the number is, and the relation only where the colours of both sides are. Colour and relation are
    read off the `count` most confident objects; the relation must hold between every pair.

    Args:
        detections: what was found.
        requirements: int64 `[B, R, 6]`.
        threshold: objects with less confidence are not there (GenEval: 0.3, and 0.9 for counting).
        margin: see `relative_position`.
        counting: `"exact"` grades a number as right or wrong, `"share"` as `1 - |found - count| / count` (Flow-GRPO,
            Liu et al. 2025), which is a denser signal; the strict answer is the same.

    Returns:
        Share of demands that are met, `[B]` in [0, 1], and whether all are, bool `[B]`; 1 and True without any.

    Raises:
        ValueError: `requirements` is not `[B, R, 6]` for the detections' B, or `counting` is unknown.
    """
    batch = len(detections.score)
    if requirements.ndim != 3 or requirements.shape[0] != batch or requirements.shape[2] != len(FIELDS):
        raise ValueError(f"requirements have shape {list(requirements.shape)}, expected [{batch}, R, {len(FIELDS)}]")
    if counting not in get_args(Counting):
        raise ValueError(f"geneval_score: counting is '{counting}', expected one of {', '.join(get_args(Counting))}")
    label, count, most, colour, relation, target = requirements.unbind(-1)
    order = detections.score.argsort(dim=1, descending=True, stable=True)
    score, labels, colours = (x.gather(1, order) for x in (detections.score, detections.label, detections.colour))
    box = detections.box.gather(1, order[..., None].expand(-1, -1, 4))

    there = (labels[:, None] == label[..., None]) & (score >= threshold)[:, None]
    found = there.sum(2)
    numbered = (found >= count) & (found <= most)
    chosen = there & (there.cumsum(2) <= count[..., None])
    painted = (chosen & (colours[:, None] == colour[..., None])).sum(2) >= count
    matched = numbered & (painted | (colour < 0))
    placed = matched & matched.gather(1, target.clamp(min=0)) & _all_placed(chosen, box, relation, target, margin)

    used = count > 0
    demanded = torch.stack([used, used & (colour >= 0), used & (relation >= 0)])
    met = torch.stack([numbered, numbered & painted, placed]) & demanded
    grade = met.float()
    if counting == "share":
        near = (1 - (found - count).abs() / count.clamp(min=1)).clamp(min=0)
        grade = torch.stack([torch.where(used, near, 0), grade[1], grade[2]])
    demands = demanded.sum((0, 2))
    graded = torch.where(demands > 0, grade.sum((0, 2)) / demands.clamp(min=1), 1.0)
    return graded, (met == demanded).all(2).all(0)


def _all_placed(chosen: Tensor, box: Tensor, relation: Tensor, target: Tensor, margin: float) -> Tensor:
    """bool `[B, R]`: every chosen object stands in the relation to every chosen object of the target."""
    holds = relative_position(box[:, :, None], box[:, None, :], margin).permute(0, 3, 1, 2)
    index = relation.clamp(min=0)[..., None, None].expand(-1, -1, *holds.shape[2:])
    others = chosen.gather(1, target.clamp(min=0)[..., None].expand_as(chosen))
    pairs = chosen[..., :, None] & others[..., None, :]
    return ~(pairs & ~holds.gather(1, index)).flatten(2).any(2)


def requirements_from_metadata(
    metadata: Sequence[Mapping[str, Any]], labels: Sequence[str], colours: Sequence[str] = COLOURS
) -> Tensor:
    """Requirements `[N, R, 6]` of GenEval's metadata records.

    A record has `include`, a list of `{"class", "count"}` with optional `"color"` and `"position": [relation,
    number of the other entry]`, and optional `exclude`, a list of `{"class", "count"}` of which so many must not
    be found.

    Args:
        metadata: the records.
        labels: names of the detector's classes, in its order.
        colours: names of the colours, in the detector's order.

    Raises:
        ValueError: a record asks for a class, a colour or a relation that there is not, or excludes a class that
            it does not include.
    """
    slots = max((len(record.get("include", ())) for record in metadata), default=1)
    table = torch.zeros(len(metadata), max(slots, 1), len(FIELDS), dtype=torch.int64)
    table[..., 2], table[..., 3:5] = torch.iinfo(torch.int64).max, ANY
    for row, record in enumerate(metadata):
        excluded = {entry["class"]: int(entry["count"]) for entry in record.get("exclude", ())}
        for slot, entry in enumerate(record.get("include", ())):
            where = f"GenEval record {row}, class '{entry['class']}'"
            relation, target = entry.get("position", (None, 0))
            most = excluded.pop(entry["class"], None)
            table[row, slot] = torch.tensor(
                [
                    _index(entry["class"], labels, f"{where}: class"),
                    int(entry.get("count", 1)),
                    table[row, slot, 2] if most is None else most - 1,
                    _index(entry.get("color"), colours, f"{where}: colour"),
                    _index(relation, RELATIONS, f"{where}: relation"),
                    int(target),
                ]
            )
        if excluded:
            raise ValueError(f"GenEval record {row} excludes {sorted(excluded)}, which it does not include")
    return table


def _index(name: str | None, names: Sequence[str], what: str) -> int:
    if name is None:
        return ANY
    if name not in names:
        raise ValueError(f"{what} '{name}' is none of: {', '.join(names)}")
    return list(names).index(name)
