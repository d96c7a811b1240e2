"""Vision-language models as judges: the formula, and a tiny LLaVA loaded from disk as a real one is."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny_models
from regimen import Knobs
from regimen.rewards import SCORED, Reward, Scene, judge
from regimen.rewards.vlm import EDIT_TEMPLATES, VLMEditReward, VLMReward, expected_choice
from regimen.rollout import Rollout

DIGITS = tuple("0123456789")


def rollout_of(images: Tensor, sources: Tensor, texts: list[str]) -> Rollout:
    count = len(images)
    return Rollout.create(
        task="edit", group=torch.arange(count), mask=torch.ones(count, 1, dtype=torch.bool),
        columns={"image": images, "source": sources, "said": texts},
    )  # fmt: skip


@pytest.fixture
def edits() -> Rollout:
    images = torch.rand(5, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    texts = ["paint it red", "x", "remove the dog that sits on the left bench", "turn it", "make {it} 7"]
    return rollout_of(images, images.flip(0), texts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.save(tmp_path_factory.mktemp("llava"), *tiny_models.llava())


def said(rollout: Rollout) -> list[str]:
    return list(rollout["said"])


def source(rollout: Rollout) -> Tensor:
    image: Tensor = rollout["source"]
    return image


def result(rollout: Rollout) -> Tensor:
    image: Tensor = rollout["image"]
    return image


# The formula


def test_expected_choice_is_the_mean_place_of_the_answer() -> None:
    choices = torch.tensor([4, 2, 7])
    logits = torch.full((4, 9), -50.0)
    logits[0, 4] = logits[1, 7] = logits[2, 2] = 50.0
    # Equal odds for the first and the last, and a token that is no choice is left out.
    logits[3, 4] = logits[3, 7] = 3.0
    logits[3, 0] = 100.0
    assert expected_choice(logits, choices).tolist() == pytest.approx([0, 1, 0.5, 0.5])
    told = torch.log(torch.tensor([[0.2, 0.3, 0.5]]))
    assert expected_choice(told, torch.arange(3)).item() == pytest.approx(0.3 * 0.5 + 0.5)
    assert expected_choice(told.bfloat16(), torch.arange(3)).dtype == torch.float32


# Stand-ins that show what is asked


class Recorder:
    """A processor that keeps what it is given."""

    def __init__(self) -> None:
        self.tokenizer, self.calls = tiny_models.byte_tokenizer(), list[dict[str, Any]]()

    def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        (message,) = messages
        assert message["role"] == "user"
        return "".join("#" if part["type"] == "image" else part["text"] for part in message["content"])

    def __call__(self, **given: Any) -> Any:
        self.calls.append(given)

        class Inputs(dict[str, Any]):
            def to(self, device: Any) -> Any:
                return self

        return Inputs(count=len(given["text"]))


class Brightness(nn.Module):
    """A model that answers with the digit 3, and counts samples."""

    def forward(self, count: int, logits_to_keep: int) -> Any:
        logits = torch.zeros(count, logits_to_keep, 300)
        logits[..., tiny_models.letters()["3"]] = 50.0
        return type("Output", (), {"logits": logits})


def test_questions_and_pictures_are_in_order(edits: Rollout) -> None:
    processor = Recorder()
    reward = VLMReward(
        Brightness(), processor, "did it {text}?", images=(source, result), texts=said, batch=2, name="asked"
    )
    assert reward.score(edits, Scene()).tolist() == pytest.approx([1 / 3] * 5)
    assert [len(call["text"]) for call in processor.calls] == [2, 2, 1]
    assert processor.calls[2]["text"] == ["##did it make {it} 7?"]
    for start, call in zip((0, 2, 4), processor.calls, strict=True):
        shown = [torch.from_numpy(picture) for picture in call["images"]]
        assert len(shown) == 2 * len(call["text"])
        for row in range(len(call["text"])):
            for place, column in enumerate(("source", "image")):
                expected = (edits[column][start + row] * 255).round().byte()
                assert torch.equal(shown[2 * row + place], expected)


def test_pictures_out_of_range_are_clipped() -> None:
    picture = VLMReward._picture(torch.tensor([-0.5, 0.0, 0.5, 1.0, 7.0]))
    assert picture.tolist() == [0, 0, 128, 255, 255]


def test_choices_of_more_than_one_token_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reward 'vlm': choices \['10'\] are not one token each; choose others"):
        VLMReward(Brightness(), Recorder(), "{text}", images=(result,), texts=said, choices=("1", "10"))


# A real model


@pytest.fixture(scope="module")
def loaded(folder: str) -> VLMEditReward:
    return VLMEditReward.from_pretrained(folder, source, said)


def by_hand(reward: VLMReward, rollout: Rollout, row: int) -> float:
    """One sample alone, without padding, and the answer read off the full logits."""
    model, processor = reward._model, reward._processor
    content = [{"type": "image"}] * 2 + [{"type": "text", "text": reward.template.format(text=said(rollout)[row])}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pictures = [(rollout[name][row] * 255).round().byte().numpy() for name in ("source", "image")]
    inputs = processor(text=text, images=pictures, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].double()
    tokens = [processor.tokenizer.encode(digit)[0] for digit in DIGITS]
    chances = logits[tokens].softmax(0)
    return float(sum(chances[i] * i for i in range(10)) / 9)


def test_scores_are_those_of_each_sample_asked_alone(loaded: VLMEditReward, edits: Rollout) -> None:
    judged, report = judge(loaded, edits, Scene(knobs=Knobs.of(loaded)))
    assert report.failed == 0
    for leaf in loaded.leaves():
        assert isinstance(leaf, VLMReward)
        expected = [by_hand(leaf, edits, row) for row in range(5)]
        assert judged.rewards[leaf.name].tolist() == pytest.approx(expected, abs=1e-4)
        assert len({round(value, 6) for value in expected}) == 5
    assert list(EDIT_TEMPLATES) == [leaf.name for leaf in loaded.leaves()]


def test_edit_reward_is_half_instruction_and_half_consistency(loaded: VLMEditReward, edits: Rollout) -> None:
    board = Knobs.of(loaded)
    assert dict(board) == {"weight/instruction": 0.5, "weight/consistency": 0.5}
    judged, _ = judge(loaded, edits, Scene(knobs=board))
    half = (judged.rewards["instruction"] + judged.rewards["consistency"]) / 2
    torch.testing.assert_close(judged.reward, half)
    assert not torch.allclose(judged.rewards["instruction"], judged.rewards["consistency"], atol=1e-7)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_how_many_are_asked_at_once_changes_nothing(batch: int, folder: str, edits: Rollout) -> None:
    def asked(batch: int) -> Tensor:
        model, processor = tiny_models.llava()
        reward = VLMEditReward(model, processor, source, said, batch=batch)
        leaf = next(iter(reward.leaves()))
        value = leaf.score(edits, Scene())
        assert isinstance(value, Tensor)
        return value

    torch.testing.assert_close(asked(batch), asked(5), atol=1e-6, rtol=0)


def test_both_pictures_and_the_text_matter(loaded: VLMEditReward, edits: Rollout) -> None:
    leaf: Reward = next(iter(loaded.leaves()))
    base = leaf.score(edits, Scene())
    assert isinstance(base, Tensor)
    changes: list[Callable[[], Rollout]] = [
        lambda: edits.with_columns(image=1 - edits["image"]),
        lambda: edits.with_columns(source=1 - edits["source"]),
        lambda: edits.with_columns(said=[f"do not {text}" for text in said(edits)]),
        lambda: edits.with_columns(source=edits["image"], image=edits["source"]),
    ]
    for change in changes:
        other = leaf.score(change(), Scene())
        assert isinstance(other, Tensor)
        # The third sample of a flipped batch has one picture twice.
        assert ((other - base).abs() > 1e-7).sum() >= 4


def test_the_judge_is_frozen_and_keeps_no_gradient(loaded: VLMEditReward, edits: Rollout) -> None:
    for leaf in loaded.leaves():
        assert isinstance(leaf, VLMReward)
        assert not any(p.requires_grad for p in leaf._model.parameters())
        assert not leaf._model.training
    painted = edits.with_columns(image=edits["image"].clone().requires_grad_())
    answer = loaded.judge(painted, Scene(knobs=Knobs.of(loaded)))
    assert answer.total is not None
    assert answer.total.status.tolist() == [SCORED] * 5
    assert not answer.total.value.requires_grad


def test_half_precision_weights_are_loaded_as_asked(folder: str, edits: Rollout, loaded: VLMEditReward) -> None:
    half = VLMEditReward.from_pretrained(folder, source, said, dtype=torch.bfloat16)
    values = []
    for reward in (half, loaded):
        leaf = next(iter(reward.leaves()))
        assert isinstance(leaf, VLMReward)
        value = leaf.score(edits, Scene())
        assert isinstance(value, Tensor)
        assert value.dtype == torch.float32
        values.append((value, next(leaf._model.parameters()).dtype))
    assert [dtype for _, dtype in values] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(values[0][0], values[1][0], atol=0.02, rtol=0)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_processor_that_needs_torchvision_is_named(tmp_path: Path) -> None:
    """Qwen2.5-VL's processor also reads videos, for which transformers wants torchvision."""
    tiny_models.byte_tokenizer(additional_special_tokens=["<|image_pad|>", "<|video_pad|>"]).save_pretrained(tmp_path)
    settings = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    with pytest.raises(
        ImportError, match=r"VLMEditReward: .* needs more: pip install 'regimen-rl\[judges\]' .*orchvision"
    ):
        VLMEditReward.from_pretrained(str(tmp_path), source, said)
