"""Vision-language models as judges: a question about some images, answered by a number from 0 to 9."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from regimen.knobs import Weight
from regimen.rewards.base import Reward
from regimen.rewards.expression import Scene, SumReward
from regimen.rollout import Rollout

Images = Callable[[Rollout], Tensor]
"""A rollout to images `[B, 3, H, W]` in [0, 1]."""

EDIT_TEMPLATES = {
    "instruction": "The second image is an edit of the first one. The instruction was: {text}. How fully does the "
    "second image do what was asked? Answer with one digit, from 0 (not at all) to 9 (fully).",
    "consistency": "The second image is an edit of the first one. The instruction was: {text}. How well does the "
    "second image keep all that the instruction leaves alone? Answer with one digit, from 0 (not at all) to 9 (fully).",
}


def expected_choice(logits: Tensor, choices: Tensor) -> Tensor:
    """Mean place, from 0 to 1, of a model's answer among ordered choices: `[B]`.

    With `p` the softmax over the choices' logits alone, `sum_i p_i i / (C - 1)`. It is finer than the likeliest
    choice, so that a group of samples has a spread.

    Args:
        logits: `[B, vocabulary]` of the answer's first token.
        choices: token of each choice, int64 `[C]`, from the worst to the best.
    """
    places = torch.linspace(0, 1, len(choices), device=logits.device)
    return logits.float()[:, choices].softmax(-1) @ places


class VLMReward(Reward):
    """A vision-language model's answer to a question about each sample, `[B]` in [0, 1]; see `expected_choice`."""

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        template: str,
        *,
        images: Sequence[Images],
        texts: Callable[[Rollout], Sequence[str]],
        choices: Sequence[str] = tuple("0123456789"),
        batch: int = 8,
        name: str = "vlm",
    ) -> None:
        """Make the reward.

        Args:
            model: such as `Qwen2_5_VLForConditionalGeneration`; it is frozen.
            processor: the model's own, with a chat template.
            template: the question, in which `{text}` is replaced by the sample's text.
            images: what is shown before the question, in order.
            texts: a text per sample.
            choices: possible answers from the worst to the best, of one token each. (10 is two tokens to many
                models, of which the first is 1.)
            batch: samples per pass.
            name: of the component.

        Raises:
            ValueError: a choice is not one token.
        """
        self._model, self._processor = model.requires_grad_(False).eval(), processor
        self.template, self.images, self.texts = template, tuple(images), texts
        self.choices, self.batch, self.name = tuple(choices), batch, name
        ids = [processor.tokenizer.encode(choice, add_special_tokens=False) for choice in choices]
        if odd := [choice for choice, token in zip(choices, ids, strict=True) if len(token) != 1]:
            raise ValueError(f"reward '{name}': choices {odd} are not one token each; choose others")
        self._tokens = torch.tensor([token[0] for token in ids])

    @torch.no_grad()
    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        """The expected answer about each sample."""
        shown = [images(rollout) for images in self.images]
        texts = self.texts(rollout)
        parts = [slice(start, start + self.batch) for start in range(0, len(rollout), self.batch)]
        return torch.cat([self._answers([images[rows] for images in shown], texts[rows]) for rows in parts])

    def _answers(self, shown: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        device = shown[0].device
        questions = [self.template.format(text=text) for text in texts]
        pictures = [[self._picture(image) for image in images] for images in zip(*shown, strict=True)]
        inputs = self._processor(
            text=[self._chat(question, len(shown)) for question in questions],
            images=[picture for row in pictures for picture in row],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(device)
        logits = self._model.to(device)(**inputs, logits_to_keep=1).logits[:, -1]
        return expected_choice(logits, self._tokens.to(device))

    def _chat(self, question: str, images: int) -> str:
        content: list[dict[str, str]] = [{"type": "image"}] * images + [{"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        text: str = self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text

    @staticmethod
    def _picture(image: Tensor) -> Any:
        return (image.clamp(0, 1) * 255).round().byte().cpu().numpy()


class VLMEditReward(SumReward):
    """An edit judged by a vision-language model: half `instruction` (is it followed), half `consistency` (is the rest
    kept)."""

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        source: Images,
        instruction: Callable[[Rollout], Sequence[str]],
        *,
        templates: Mapping[str, str] = EDIT_TEMPLATES,
        batch: int = 8,
    ) -> None:
        """Make the reward.

        Args:
            model, processor, batch: see `VLMReward`.
            source: the rollout to the images before the edit, `[B, 3, H, W]` in [0, 1]; the results are its column
                `image`.
            instruction: the rollout to the instructions.
            templates: a question per component; each has the weight 1 / their number, as a knob.
        """
        components = [
            VLMReward(
                model, processor, template, images=(source, _result), texts=instruction, batch=batch, name=name
            )
            for name, template in templates.items()
        ]  # fmt: skip
        super().__init__([(Weight.of(1 / len(components), part.name), part) for part in components])

    @classmethod
    def from_pretrained(
        cls, path: str, source: Images, instruction: Callable[[Rollout], Sequence[str]], **options: Any
    ) -> Self:
        """Load model and processor from a folder or hub name; `options` go to the model's `from_pretrained`.

        Raises:
            ImportError: the model or its processor needs a package that is not installed (Qwen's: torchvision).
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            processor = AutoProcessor.from_pretrained(path)
            model = AutoModelForImageTextToText.from_pretrained(path, **options)
        except ImportError as error:
            why = " ".join(str(error).split())
            raise ImportError(f"VLMEditReward: {path} needs more: pip install 'regimen-rl[judges]' ({why})") from error
        return cls(model, processor, source, instruction)


def _result(rollout: Rollout) -> Tensor:
    image: Tensor = rollout["image"]
    return image
