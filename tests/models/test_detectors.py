"""Networks that find objects; see also tests/rewards/test_geneval.py, where they are asked as judges."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tiny_models
from regimen.functions.geneval import COLOURS as NAMES
from regimen.functions.scenes import CELLS, COLOURS, KINDS, OBJECTS, cell_boxes, draw_scenes
from regimen.models.detectors import COLOUR_VALUES, CellDetector, DetectorFromTransformers


def test_cell_detector_sees_each_cell_by_itself() -> None:
    torch.manual_seed(0)
    model = CellDetector(8)
    images = torch.randn(2, 3, 32, 32)
    logits = model(images)
    assert logits.shape == (2, CELLS, 1 + OBJECTS)
    changed = images.clone()
    changed[:, :, 8:16, 16:24] += 1
    moved = (model(changed) - logits).abs().amax((0, 2))
    assert moved.nonzero().flatten().tolist() == [6]


def test_detections_are_marginals_of_the_cells_probabilities() -> None:
    """Kind and colour are each the likeliest on their own, whatever their likeliest pair is."""

    class Told(CellDetector):
        def forward(self, images: Tensor) -> Tensor:
            chances = torch.full((len(images), CELLS, 1 + OBJECTS), 1e-9)
            chances[..., 0] = 0.1
            pairs = chances[..., 1:].view(len(images), CELLS, len(KINDS), len(COLOURS))
            # The likeliest pair is (3, 3); the likeliest kind is 1, and the likeliest colour 0.
            pairs[..., 3, 3], pairs[..., 1, 0], pairs[..., 1, 1], pairs[..., 2, 0] = 0.3, 0.22, 0.2, 0.18
            return chances.log()

    found = Told(8).detect(torch.zeros(2, 3, 32, 32))
    assert found.label.unique().tolist() == [1]
    assert found.colour.unique().tolist() == [0]
    assert found.score.unique().tolist() == pytest.approx([0.9])
    assert torch.equal(found.box[1], cell_boxes())


def test_fitting_learns_freezes_and_is_decided_by_the_stream() -> None:
    def fitted(seed: int) -> CellDetector:
        torch.manual_seed(0)
        return CellDetector(16).fit(torch.Generator().manual_seed(seed), steps=60)

    one, same, other = fitted(0), fitted(0), fitted(1)
    content = torch.randint(1 + OBJECTS, (32, CELLS), generator=torch.Generator().manual_seed(5))
    images = draw_scenes(content)
    assert (one(images).argmax(-1) == content).float().mean() > 0.8
    assert torch.equal(one(images), same(images))
    assert not torch.equal(one(images), other(images))
    assert not any(p.requires_grad for p in one.parameters())
    assert not one.detect(images).score.requires_grad


def test_fitting_works_where_gradients_are_off() -> None:
    with torch.no_grad():
        CellDetector(8).fit(torch.Generator().manual_seed(0), steps=2)


def test_palette_has_every_colour_of_geneval() -> None:
    assert len(COLOUR_VALUES) == len(NAMES)
    detector = DetectorFromTransformers(tiny_models.yolos(), size=(32, 32))
    images = torch.tensor(COLOUR_VALUES)[:, :, None, None].expand(-1, -1, 16, 16)
    whole = torch.tensor([[[0.0, 0.0, 16.0, 16.0]]]).expand(len(images), -1, -1)
    assert [NAMES[i] for i in detector._nearest_colour(images, whole)[:, 0].tolist()] == list(NAMES)


def test_colours_may_be_asked_elsewhere() -> None:
    asked: list[torch.Size] = []

    def colour(images: Tensor, box: Tensor) -> Tensor:
        asked.append(box.shape)
        return torch.full(box.shape[:2], 7)

    found = DetectorFromTransformers(tiny_models.yolos(), size=(32, 32), colour=colour)(torch.rand(2, 3, 20, 20))
    assert asked == [(2, 7, 4)]
    assert found.colour.unique().tolist() == [7]


def test_boxes_are_in_pixels_of_the_images_given() -> None:
    """The same picture, larger: boxes grow with it, and what is found stays."""
    detector = DetectorFromTransformers(tiny_models.yolos(spread=0.3), size=(32, 32))
    # Of one colour each, so that resizing is exact.
    colours = torch.rand(2, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    one, other = detector(colours.expand(-1, -1, 32, 32)), detector(colours.expand(-1, -1, 64, 128))
    torch.testing.assert_close(other.box, one.box * torch.tensor([4.0, 2.0, 4.0, 2.0]), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(other.score, one.score, atol=1e-4, rtol=0)
    assert torch.equal(other.label, one.label)


def test_the_model_is_frozen_and_may_be_of_half_precision() -> None:
    detector = DetectorFromTransformers(tiny_models.yolos().bfloat16(), size=(32, 32))
    assert not any(p.requires_grad for p in detector.model.parameters())
    found = detector(torch.rand(2, 3, 20, 20))
    assert found.score.dtype == found.box.dtype == torch.float32
    assert ((found.score >= 0) & (found.score <= 1)).all()


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_a_backbone_that_needs_timm_is_named(tmp_path: Path) -> None:
    from transformers import DetrConfig

    DetrConfig(num_labels=3).save_pretrained(tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ImportError, match=r"needs more: pip install 'regimen-rl\[judges\]' .*timm"):
        DetectorFromTransformers.from_pretrained(str(tmp_path))
