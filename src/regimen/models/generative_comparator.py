"""A vision-language model as a judge of pairs, with a gradient into the images (OneReward, arXiv 2508.21066)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.functional import interpolate

from regimen.models.comparators import Criteria, Questions

TEMPLATE = (
    "Both images are results of the task '{task}'. {text}Is the first image better than the second one in {criterion}? "
    "Answer Yes or No."
)


class QwenPixels:
    """What the image processor of the Qwen2-VL family makes of an image, as a differentiable function.

    The processors go by way of bytes, where gradients end. This resizes (bicubic, anti-aliased), normalises and cuts
    into patches as they do, and agrees with them to within the rounding of a byte.
    """

    def __init__(self, image_processor: Any) -> None:
        """Read the settings of a `Qwen2VLImageProcessor` (or its PIL variant)."""
        self.patch, self.merge = int(image_processor.patch_size), int(image_processor.merge_size)
        self.frames = int(image_processor.temporal_patch_size)
        self.mean, self.std = list(image_processor.image_mean), list(image_processor.image_std)
        self.fewest, self.most = (int(image_processor.size[key]) for key in ("shortest_edge", "longest_edge"))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches down and across, of an image of this size."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        high, wide = smart_resize(height, width, self.patch * self.merge, self.fewest, self.most)
        return high // self.patch, wide // self.patch

    def __call__(self, images: Tensor) -> Tensor:
        """`pixel_values [N * patches, 3 * frames * patch^2]` of images `[N, 3, H, W]` in [0, 1]."""
        down, across = self.grid(*images.shape[2:])
        size = down * self.patch, across * self.patch
        if size != tuple(images.shape[2:]):
            images = interpolate(images, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        # Patches that are merged stand together.
        blocks = ((images - mean) / std).unflatten(2, (down // self.merge, self.merge, self.patch))
        blocks = blocks.unflatten(5, (across // self.merge, self.merge, self.patch))
        patches = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
        return patches.expand(*[-1] * 6, self.frames, -1, -1).flatten(0, 4).flatten(1)


class GenerativeComparator(nn.Module):
    """A Qwen2-VL (or 2.5) that is shown two images and asked which is better; the verdict is the odds of one word.

    The log-odds are `l_yes - l_no`, the logits of two tokens in the place of the answer, which is the log-odds of their
    softmax alone. The gradient reaches the images through the vision tower.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        criteria: Criteria,
        *,
        template: str = TEMPLATE,
        verdict_tokens: tuple[str, str] = ("Yes", "No"),
        texts: Callable[[TensorDict], Sequence[str]] | None = None,
        to_rgb: Callable[[Tensor], Tensor] = lambda image: image,
    ) -> None:
        """Make a judge.

        Args:
            model: such as `Qwen2_5_VLForConditionalGeneration`.
            processor: the model's own: its `tokenizer`, `image_processor`, `image_token` and `apply_chat_template` are
                used.
            criteria: what it may be asked.
            template: the question, with `{task}`, `{criterion}` and `{text}`.
            verdict_tokens: the answers, of one token each: the first is better, the second is.
            texts: what is said of each sample; nothing by default.
            to_rgb: images as they are compared to images `[R, 3, H, W]` in [0, 1].

        Raises:
            ValueError: a verdict is not one token.
        """
        super().__init__()
        ids = [processor.tokenizer.encode(word, add_special_tokens=False) for word in verdict_tokens]
        if odd := [word for word, token in zip(verdict_tokens, ids, strict=True) if len(token) != 1]:
            raise ValueError(f"GenerativeComparator: verdicts {odd} are not one token each; choose others")
        self.model, self.criteria, self.template = model, criteria, template
        self._processor, self._texts, self._to_rgb = processor, texts, to_rgb
        self._yes, self._no = (token[0] for token in ids)
        self.pixels = QwenPixels(processor.image_processor)

    @classmethod
    def from_pretrained(cls, path: str, criteria: Criteria, **options: Any) -> Self:
        """Load model and processor from a folder or hub name; `options` go to the constructor.

        Raises:
            ImportError: the processor needs a package that is not installed (Qwen's: torchvision).
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        return cls(
            AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path), criteria, **options
        )

    def compare(self, questions: Questions, a: Tensor, b: Tensor) -> Tensor:
        """Log-odds `[R]` that the first is better.

        Raises:
            ValueError: a criterion does not apply to the task that it is asked of.
        """
        for task, criterion in set(zip(questions.task, questions.criterion, strict=True)):
            self.criteria.check(task, criterion)
        first, second = self._to_rgb(a), self._to_rgb(b)
        down, across = self.pixels.grid(*first.shape[2:])
        inputs = self._tokens(questions, down * across // self.pixels.merge**2, first.device)
        logits = self.model(
            **inputs,
            pixel_values=self.pixels(torch.stack([first, second], 1).flatten(0, 1)),
            image_grid_thw=torch.tensor([[1, down, across]], device=first.device).repeat(2 * len(first), 1),
            logits_to_keep=1,
        ).logits[:, -1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        margin: Tensor = logits[:, self._yes] - logits[:, self._no]
        return margin

    def _tokens(self, questions: Questions, per_image: int, device: torch.device) -> dict[str, Tensor]:
        """The chats as tokens, the same length by padding on the left; an image is as many tokens as it has patches."""
        texts = [""] * len(questions) if self._texts is None else self._texts(questions.context)
        asked = zip(questions.task, questions.criterion, texts, strict=True)
        token, tokenizer = self._processor.image_token, self._processor.tokenizer
        chats = [
            self._chat(self.template.format(task=task, criterion=criterion, text=text)).replace(
                token, token * per_image
            )
            for task, criterion, text in asked
        ]
        said = tokenizer(chats, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        ids = said["input_ids"].to(device)
        shown = (ids == tokenizer.convert_tokens_to_ids(token)).int()
        mask = said["attention_mask"].to(device)
        return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": shown}

    def _chat(self, question: str) -> str:
        content: list[dict[str, str]] = [{"type": "image"}] * 2 + [{"type": "text", "text": question}]
        text: str = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return text
