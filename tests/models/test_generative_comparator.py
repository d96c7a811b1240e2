"""A tiny Qwen2.5-VL as a judge of pairs: what it is shown, and the gradient through its eyes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

import tiny_models
from regimen.models.comparators import Criteria, preference
from regimen.models.generative_comparator import GenerativeComparator, QwenPixels
from regimen.objectives import PairwiseVerdictObjective
from regimen.objectives.base import Batch
from regimen.rewards import PairwiseReward
from regimen.rollout import Rollout

CRITERIA = Criteria({"fill": ("structure", "alignment"), "remove": ("removal quality",)})


def image_processor() -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
    )


@pytest.fixture(scope="module")
def judge() -> GenerativeComparator:
    tokenizer = tiny_models.byte_tokenizer(additional_special_tokens=["<image>", "Yes", "No"])
    model, processor = tiny_models.qwen(tokenizer), SimpleNamespace(tokenizer=tokenizer, image_token="<image>")
    processor.image_processor = image_processor()
    processor.apply_chat_template = lambda chat, tokenize, add_generation_prompt: "".join(
        "[<image>]" if part["type"] == "image" else part["text"] for part in chat[0]["content"]
    )
    return GenerativeComparator(model, processor, CRITERIA, texts=lambda context: [str(n) for n in context["said"]])


def rollout() -> Rollout:
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 3, 16, 24, generator=rng)
    parts = [
        Rollout.create(
            task=task, group=torch.arange(count), mask=torch.ones(count, 1, dtype=torch.bool),
            context={"said": torch.tensor([7, 12345][:count])},
            columns={"image": images[0, :count], "reference_image": images[1, :count]},
        )
        for task, count in (("fill", 2), ("remove", 1))
    ]  # fmt: skip
    return Rollout.cat(parts)


@pytest.mark.parametrize("size", [(16, 24), (20, 33), (64, 64)])
def test_pixels_are_those_of_the_model_s_own_processor(size: tuple[int, int]) -> None:
    processor = image_processor()
    coarse = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    images = (torch.nn.functional.interpolate(coarse, size, mode="bilinear") * 255).round() / 255
    pictures = [np.asarray((image * 255).byte().permute(1, 2, 0)) for image in images]
    theirs = processor(pictures, return_tensors="pt")
    pixels = QwenPixels(processor)
    assert [1, *pixels.grid(*size)] == theirs["image_grid_thw"][0].tolist()
    # A byte is 1/255 of the range, and is divided by a deviation of about 0.27.
    assert (pixels(images) - theirs["pixel_values"]).abs().max() < 1.5 / 255 / 0.26


def test_the_gradient_reaches_the_pixels_and_agrees_with_finite_differences(judge: GenerativeComparator) -> None:
    samples = rollout()
    questions = CRITERIA.questions(samples)
    double = judge.double()
    a = samples["image"][questions.row].double().requires_grad_()
    b = samples["reference_image"][questions.row].double()
    value = preference(double, questions, a, b).log().sum()
    (gradient,) = torch.autograd.grad(value, a)
    direction = torch.randn(a.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = 1e-3

    def at(distance: float) -> Tensor:
        with torch.no_grad():
            return preference(double, questions, a + distance * direction, b).log().sum()

    slope = (at(step) - at(-step)) / (2 * step)
    judge.float()
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=2e-2)
    assert bool((gradient.flatten(1).abs().sum(1) > 0).all())


def test_a_judge_is_told_criterion_and_text_whatever_stands_beside_it(judge: GenerativeComparator) -> None:
    samples = rollout()
    questions = CRITERIA.questions(samples)
    a, b = samples["image"][questions.row], samples["reference_image"][questions.row]
    with torch.no_grad():
        margins = judge.compare(questions, a, b)
        assert margins[0] != margins[1]  # One sample, two criteria.
        alone = CRITERIA.questions(samples[:1])
        own = judge.compare(alone, a[:2], b[:2])
    # Texts of other lengths pad a chat on the left, which changes nothing.
    assert torch.allclose(own, margins[:2], atol=1e-4)


def test_a_reward_of_it_trains_what_made_the_images_and_labels_train_it(judge: GenerativeComparator) -> None:
    samples = rollout()
    image = samples["image"].clone().requires_grad_()
    answer = PairwiseReward(CRITERIA, transform="log").answer(
        samples.with_columns(image=image), {"reward_model": judge}, {}
    )
    assert answer.total is not None
    answer.total.value.sum().backward()
    assert image.grad is not None
    assert bool((image.grad.flatten(1).abs().sum(1) > 0).all())
    asked = CRITERIA.applicable(samples)
    pair = {name: samples[name][:, None].expand(-1, 3, -1, -1, -1) for name in ("image", "reference_image")}
    labelled = samples.with_columns(
        first=pair["image"], second=pair["reference_image"], label=asked.float(), asked=asked
    )
    optimizer = torch.optim.Adam(judge.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        batch = Batch(labelled, {"reward_model": judge}, {}, torch.Generator().manual_seed(0))
        loss = PairwiseVerdictObjective(swap_augment=False)(batch).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1


def test_bad_verdicts_and_criteria_are_named(judge: GenerativeComparator) -> None:
    with pytest.raises(ValueError, match=r"verdicts \['Maybe'\] are not one token"):
        GenerativeComparator(nn.Identity(), judge._processor, CRITERIA, verdict_tokens=("Yes", "Maybe"))
    samples = rollout().of_task("remove")
    asked = torch.tensor([[True, False, False]])
    questions = CRITERIA.questions(samples, asked)
    assert isinstance(questions.context, TensorDict)
    with pytest.raises(ValueError, match="'structure' does not apply to task 'remove'"):
        judge.compare(questions, samples["image"], samples["image"])
