"""GenEval's rule on hand-made detections, as a reward, and over detectors of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from regimen.functions.geneval import (
    ANY,
    COLOURS,
    RELATIONS,
    Detections,
    geneval_score,
    relative_position,
    requirements_from_metadata,
)
from regimen.functions.scenes import draw_scenes, read_detections
from regimen.models.detectors import DetectorFromTransformers
from regimen.rewards.base import Reward
from regimen.rewards.expression import Scene
from regimen.rewards.geneval import GenEvalReward
from regimen.rewards.judge import judge
from regimen.rollout import Rollout
from regimen.tasks.worlds.scene_prompts import sample_captions

LABELS = ("cat", "dog", "bench")
MANY = torch.iinfo(torch.int64).max


def found(*objects: tuple[str, str, tuple[float, float, float, float], float]) -> Detections:
    """Detections of one image: class, colour, box, score."""
    labels, colours, boxes, scores = zip(*objects, strict=True)
    return Detections(
        torch.tensor([[LABELS.index(name) for name in labels]]),
        torch.tensor([[COLOURS.index(name) for name in colours]]),
        torch.tensor([boxes]),
        torch.tensor([scores]),
    )


def asked(*include: dict[str, object], exclude: tuple[dict[str, object], ...] = ()) -> Tensor:
    return requirements_from_metadata([{"include": include, "exclude": exclude}], LABELS)


def box(x: float, y: float, size: float = 10.0) -> tuple[float, float, float, float]:
    return (x, y, x + size, y + size)


TWO_CATS_AND_A_DOG = found(
    ("cat", "red", box(0, 0), 0.9), ("dog", "blue", box(50, 0), 0.8), ("cat", "green", box(0, 50), 0.7),
    ("bench", "red", box(50, 50), 0.2),
)  # fmt: skip


def test_relations_of_boxes_are_those_of_geneval() -> None:
    centre = torch.tensor(box(0, 0))

    def names(x: float, y: float) -> set[str]:
        held = relative_position(torch.tensor(box(x, y)), centre)
        return {name for name, holds in zip(RELATIONS, held.tolist(), strict=True) if holds}

    assert names(-20, 0) == {"left of"}
    assert names(20, 0) == {"right of"}
    assert names(0, -20) == {"above"}
    assert names(0, 20) == {"below"}
    assert names(20, 20) == {"right of", "below"}
    # The margin takes 0.1 (10 + 10) = 2 from each offset: (16 - 2) / 24.08 = 0.58, (18 - 2) / 24.08 = 0.66.
    assert names(16, 18) == {"right of", "below"}
    # (10 - 2) / 24.17 = 0.33: not half of the way.
    assert names(10, 22) == {"below"}
    assert names(1, 1) == set()
    assert names(0, 0) == set()


@pytest.mark.parametrize(
    ("include", "graded", "strict"),
    [
        ([{"class": "dog", "count": 1}], 1.0, True),
        ([{"class": "bench", "count": 1}], 0.0, False),
        ([{"class": "cat", "count": 1}], 1.0, True),
        ([{"class": "cat", "count": 2}], 1.0, True),
        ([{"class": "cat", "count": 3}], 0.0, False),
        ([{"class": "dog", "count": 1, "color": "blue"}], 1.0, True),
        ([{"class": "dog", "count": 1, "color": "red"}], 0.5, False),
        ([{"class": "cat", "count": 1, "color": "red"}], 1.0, True),
        ([{"class": "cat", "count": 1, "color": "green"}], 0.5, False),
        ([{"class": "cat", "count": 3, "color": "green"}], 0.0, False),
        ([{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}], 1.0, True),
        ([{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["above", 0]}], 2 / 3, False),
        ([{"class": "dog", "count": 1}, {"class": "cat", "count": 2, "position": ["left of", 0]}], 1.0, True),
        ([{"class": "dog", "count": 2}, {"class": "cat", "count": 1, "position": ["left of", 0]}], 1 / 3, False),
    ],
)
def test_share_of_demands_met(include: list[dict[str, object]], graded: float, strict: bool) -> None:
    got, all_met = geneval_score(TWO_CATS_AND_A_DOG, asked(*include))
    assert float(got) == pytest.approx(graded)
    assert bool(all_met) == strict


def test_excluded_number_is_one_too_many() -> None:
    one_cat = asked({"class": "cat", "count": 1}, exclude=({"class": "cat", "count": 2},))
    assert not bool(geneval_score(TWO_CATS_AND_A_DOG, one_cat)[1])
    assert bool(geneval_score(TWO_CATS_AND_A_DOG, one_cat, threshold=0.75)[1])


def test_number_can_be_graded_by_its_share() -> None:
    three, one = asked({"class": "cat", "count": 3}), asked({"class": "cat", "count": 1})
    for requirement, share in ((three, 2 / 3), (one, 0.0)):
        graded, _ = geneval_score(TWO_CATS_AND_A_DOG, requirement, counting="share")
        assert float(graded) == pytest.approx(share)


def test_no_requirement_is_met() -> None:
    graded, strict = geneval_score(TWO_CATS_AND_A_DOG, torch.zeros(1, 2, 6, dtype=torch.int64))
    assert float(graded) == 1
    assert bool(strict)


def test_metadata_become_numbers() -> None:
    table = requirements_from_metadata(
        [
            {"include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]},
            {"include": [{"class": "cat", "color": "red"}, {"class": "bench", "position": ["below", 0]}]},
        ],
        LABELS,
    )
    assert table.tolist() == [
        [[1, 2, 2, ANY, ANY, 0], [0, 0, MANY, ANY, ANY, 0]],
        [[0, 1, MANY, COLOURS.index("red"), ANY, 0], [2, 1, MANY, ANY, RELATIONS.index("below"), 0]],
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"include": [{"class": "cow", "count": 1}]}, "record 0, class 'cow': class 'cow' is none of: cat, dog, bench"),
        ({"include": [{"class": "cat", "color": "mauve"}]}, "colour 'mauve' is none of"),
        ({"include": [{"class": "cat", "position": ["near", 0]}]}, "relation 'near' is none of"),
        ({"include": [], "exclude": [{"class": "cat", "count": 1}]}, "excludes \\['cat'\\], which it does not include"),
    ],
)
def test_wrong_metadata_are_named(record: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        requirements_from_metadata([record], LABELS)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"shape \[2, 1, 6\], expected \[1, R, 6\]"):
        geneval_score(TWO_CATS_AND_A_DOG, torch.zeros(2, 1, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="counting is 'about', expected one of exact, share"):
        geneval_score(TWO_CATS_AND_A_DOG, asked({"class": "cat"}), counting="about")  # type: ignore[arg-type]


def rollout_of(images: Tensor, requirements: Tensor) -> Rollout:
    count = len(images)
    return Rollout.create(
        task="draw",
        group=torch.arange(count),
        mask=torch.ones(count, 1, dtype=torch.bool),
        context={"requirements": requirements},
        columns={"image": images},
    )


def scored(reward: Reward, rollout: Rollout) -> Tensor:
    judged, _ = judge(reward, rollout, Scene())
    value: Tensor = judged.rewards[reward.name]
    return value


def test_reward_is_the_share_and_does_not_apply_without_requirements() -> None:
    rows = sample_captions(60, torch.Generator().manual_seed(0))
    images, requirements = draw_scenes(rows["target"]), rows["requirements"].clone()
    requirements[::2] = 0
    value = scored(GenEvalReward(read_detections), rollout_of(images, requirements))
    assert value[::2].isnan().all()
    assert (value[1::2] == 1).all()
    wrong = rollout_of(images, rows["requirements"].roll(1, 0))
    graded, strict = (scored(GenEvalReward(read_detections, graded=g), wrong) for g in (True, False))
    assert ((graded > 0) & (graded < 1)).any()
    assert set(strict.tolist()) <= {0.0, 1.0}
    assert (strict <= graded).all()


def yolos() -> torch.nn.Module:
    from transformers import YolosConfig, YolosForObjectDetection

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 32],
        patch_size=8, num_detection_tokens=7, num_labels=3,
    )  # fmt: skip
    config.id2label = dict(enumerate(LABELS))
    return YolosForObjectDetection(config).eval()


def test_detector_of_transformers_from_disk(tmp_path: Path) -> None:
    yolos().save_pretrained(tmp_path)
    detector = DetectorFromTransformers.from_pretrained(str(tmp_path), size=(32, 32))
    assert detector.labels == list(LABELS)
    images = torch.rand(3, 3, 40, 60, generator=torch.Generator().manual_seed(0))
    detections = detector(images)
    assert detections.box.shape == (3, 7, 4)
    assert ((detections.score > 0) & (detections.score < 1)).all()
    direct = detector.model(pixel_values=detector_pixels(detector, images))
    expected = direct.logits.softmax(-1)[..., :-1]
    torch.testing.assert_close(detections.score, expected.amax(-1))
    assert torch.equal(detections.label, expected.argmax(-1))
    width = (detections.box[..., 2] - detections.box[..., 0]) / 60
    torch.testing.assert_close(width, direct.pred_boxes[..., 2])
    requirements = asked({"class": "cat", "count": 1}).expand(3, -1, -1)
    value = scored(GenEvalReward(detector, threshold=0.0), rollout_of(images, requirements))
    assert ((value >= 0) & (value <= 1)).all()


def detector_pixels(detector: DetectorFromTransformers, images: Tensor) -> Tensor:
    resized = torch.nn.functional.interpolate(images, (32, 32), mode="bilinear", antialias=True, align_corners=False)
    return (resized - detector.mean.view(-1, 1, 1)) / detector.std.view(-1, 1, 1)


def test_open_vocabulary_detector_takes_its_classes_from_texts() -> None:
    from transformers import OwlViTConfig, OwlViTForObjectDetection

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = OwlViTConfig(
        text_config={**small, "vocab_size": 30, "max_position_embeddings": 8, "eos_token_id": 2},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    text = {"input_ids": torch.tensor([[5, 6, 2], [7, 8, 2]]), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}
    detector = DetectorFromTransformers(OwlViTForObjectDetection(config), size=(32, 32), softmax=False, text=text)
    detections = detector(torch.rand(3, 3, 32, 32))
    assert detections.label.shape == (3, 16)
    assert int(detections.label.max()) < 2


def test_colour_is_read_off_the_middle_of_the_box() -> None:
    detector = DetectorFromTransformers(yolos(), size=(32, 32))
    images = torch.full((1, 3, 40, 60), 0.95)
    images[:, :, 10:30, 5:25] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    images[:, :, 10:30, 35:55] = torch.tensor([0.15, 0.3, 0.85])[:, None, None]
    boxes = torch.tensor([[[3.0, 8, 27, 32], [33, 8, 57, 32], [0, 0, 4, 4]]])
    named = [COLOURS[i] for i in detector._nearest_colour(images, boxes)[0].tolist()]
    assert named == ["red", "blue", "white"]
